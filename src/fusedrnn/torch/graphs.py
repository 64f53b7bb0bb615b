"""Recurrent operators in graphs: TorchScript's once it is frozen, torch.export's, torch.fx's. They are no layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.nn import Module

import torch

# Parts of the names of torch's recurrent operators, quantised ones and those of oneDNN among them.
_PARTS = "lstm", "gru", "rnn_tanh", "rnn_relu", "rnn_layer"


def recurrent_operators(module: Module) -> list[str]:
    """The recurrent operators that a module's own graph runs, each once; none if it has no graph."""
    if isinstance(module, torch.jit.ScriptModule):
        try:
            graph: Any = module.graph
        except RuntimeError:  # it has no forward
            return []
        names = _scripted(graph)
    elif isinstance(module, torch.fx.GraphModule):
        names = (str(node.target) for node in module.graph.nodes if node.op == "call_function")
    else:
        return []
    return list(dict.fromkeys(name for name in names if is_ours(name) or any(part in name for part in _PARTS)))


def is_ours(operator: str) -> bool:
    """Whether it is the fused operator."""
    return operator.startswith("fusedrnn.")


def _scripted(block: Any) -> Iterator[str]:
    """What the nodes of a graph of TorchScript's, or of a block in it, are."""
    for node in block.nodes():
        yield str(node.kind())
        for inner in node.blocks():
            yield from _scripted(inner)
