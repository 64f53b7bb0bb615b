"""torch.compile: our layers are traced, where it leaves every RNN, GRU and LSTM out of the graph.

Dynamo breaks the graph at any instance of ``torch.nn.RNN``, ``GRU`` and ``LSTM``, ours among them, because tracing
torch's own unrolls them step by step. ``torch._dynamo.config.allow_rnn`` is its one way around, and would let those in
as well. So the option is on only while Dynamo wraps a layer of ours. Dynamo takes longer to import than torch; nothing
here imports it before its user does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fusedrnn.torch.imports import after_import

_DYNAMO = "torch._dynamo"
_classes: tuple[type[torch.nn.Module], ...] = ()
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def trace(*classes: type[torch.nn.Module]) -> None:
    """Let torch.compile trace instances of these classes and of those derived from them, from now on.

    With a torch whose Dynamo is built otherwise nothing happens: there the graph breaks, as at torch's own layers.
    """
    global _classes
    first = not _classes
    _classes += classes
    if first:
        after_import(_DYNAMO, _patch)


def breaks() -> bool:
    """Whether torch.nn's own forward would break the graph here, and therefore should: see :func:`eagerly`."""
    return torch.compiler.is_dynamo_compiling() and not _is_exporting()


def eagerly(module: torch.nn.Module, *args: Any) -> Any:
    """torch.nn's forward of one of our modules; once Dynamo is there, out of its sight."""
    theirs: Any = next(kind for kind in type(module).__mro__ if kind.__module__ == torch.nn.RNN.__module__)
    return theirs.forward(module, *args)


def _traceable(module: torch.nn.Module) -> bool:
    """Whether it runs on our operator; else its forward is torch's, which is not to be unrolled."""
    return (
        isinstance(module, _classes)
        and all(p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64) for p in module.parameters())
    )


def _patch() -> None:
    global eagerly
    from torch._dynamo import config
    from torch._dynamo.variables.builder import VariableBuilder

    from torch import _dynamo

    untyped: Any = _dynamo
    eagerly = untyped.disable(eagerly)
    wrapped = getattr(VariableBuilder, "wrap_module", None)
    if wrapped is None or not hasattr(config, "allow_rnn"):
        return

    def wrap_module(self: Any, value: torch.nn.Module) -> Any:
        if not _traceable(value):
            return wrapped(self, value)
        with config.patch(allow_rnn=True):
            return wrapped(self, value)

    VariableBuilder.wrap_module = wrap_module  # type: ignore[method-assign]
