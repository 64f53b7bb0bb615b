"""torch.compile: our layers are traced, where it leaves every RNN, GRU and LSTM out of the graph.

Dynamo breaks the graph at any instance of ``torch.nn.RNN``, ``GRU`` and ``LSTM``, ours among them, because tracing
torch's own unrolls them step by step. ``torch._dynamo.config.allow_rnn`` is its one way around, and would let those in
as well. So the option is on only while Dynamo wraps a layer of ours. Dynamo takes longer to import than torch; nothing
here imports it before its user does.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

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
    if not first:
        return
    if _DYNAMO in sys.modules:
        _patch()
    else:
        sys.meta_path.insert(0, _Watch())


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
    from torch import _dynamo
    from torch._dynamo import config
    from torch._dynamo.variables.builder import VariableBuilder

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


class _Watch(importlib.abc.MetaPathFinder):
    """Waits for Dynamo to be imported, patches it, and is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _DYNAMO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loaded = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                loaded(module)
                _patch()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
