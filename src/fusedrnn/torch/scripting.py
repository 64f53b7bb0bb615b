"""TorchScript classes: layers of ours inside a ``torch.jit.ScriptModule`` are compiled as torch.nn's.

``torch.jit.script`` asks each module what to compile in its place. A subclass of ScriptModule compiles its submodules
at the end of its constructor without asking: before that, ours are replaced.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.nn import Module

import torch
from fusedrnn.torch import class_map as pairs


def register() -> None:
    """Have it done from now on; nothing if this torch compiles modules otherwise."""
    recursive: Any = getattr(torch.jit, "_recursive", None)
    create = getattr(recursive, "create_script_module", None)
    if create is None:
        return

    @functools.wraps(create)
    def create_script_module(nn_module: Module, stubs_fn: Any, *args: Any, **options: Any) -> Any:
        if isinstance(nn_module, torch.jit.ScriptModule):  # traced modules stay as they are
            _replace(nn_module)
        return create(nn_module, stubs_fn, *args, **options)

    recursive.create_script_module = create_script_module


def _replace(parent: Module) -> None:
    """Put torch.nn's module in the place of each of ours below a module."""
    twins: dict[Module, Module] = {}
    for module in list(parent.modules()):
        for name, child in module._modules.items():
            if child is not None and pairs.counterpart(type(child), pairs.TORCHS) is not None:
                if child not in twins:
                    twins[child] = pairs.twin(child)
                module._modules[name] = twins[child]
