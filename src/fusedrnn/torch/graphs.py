"""Recurrent operators in graphs of TorchScript, torch.export and torch.fx; our layers as torch.fx nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module

# Parts of the names of torch's recurrent operators, including quantized ones and those of oneDNN.
_NAME_PARTS = "lstm", "gru", "rnn_tanh", "rnn_relu", "rnn_layer"


def is_fx_proxy(value: Any) -> bool:
    """Whether torch.fx is tracing the call with this argument."""
    return isinstance(value, torch.fx.Proxy)


def as_fx_node(module: Module, forward: Any, *args: Any) -> Any:
    """The node of a module in a torch.fx graph. By itself, torch.fx makes leaves only of torch.nn's own classes.

    Raises:
        TraceError: If the module's own forward is not ``forward``, ours, but has called it.
    """
    if getattr(module.forward, "__func__", None) is not forward:
        # The node would run the whole module on what its forward has computed.
        raise torch.fx.proxy.TraceError(
            f"torch.fx cannot trace the forward of {type(module).__name__}, which calls fusedrnn's; "
            "let is_leaf_module of your torch.fx.Tracer return True for this module"
        )
    tracer = args[0].tracer
    while args and args[-1] is None:
        args = args[:-1]
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})


def recurrent_operators(module: Module) -> list[str]:
    """The names of the recurrent operators in a module's own graph, without repetition; none if it has no graph."""
    if isinstance(module, torch.jit.ScriptModule):
        try:
            graph: Any = module.graph
        except RuntimeError:  # it has no forward
            return []
        names = _node_kinds(graph)
    elif isinstance(module, torch.fx.GraphModule):
        names = (str(node.target) for node in module.graph.nodes if node.op == "call_function")
    else:
        return []
    return list(dict.fromkeys(name for name in names if is_ours(name) or any(part in name for part in _NAME_PARTS)))


def is_ours(operator: str) -> bool:
    """Whether a name is that of the fused operator."""
    return operator.startswith("fusedrnn.")


def _node_kinds(block: Any) -> Iterator[str]:
    """The kinds of all nodes in a TorchScript graph or block."""
    for node in block.nodes():
        yield str(node.kind())
        for inner in node.blocks():
            yield from _node_kinds(inner)
