"""TorchScript classes: layers of ours inside a ``torch.jit.ScriptModule`` are compiled as torch.nn's.

``torch.jit.script`` asks each module what to compile instead of it. The constructor of a subclass of ScriptModule
compiles its submodules without asking, so that we replace ours before that.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.nn import Module

import torch
from fusedrnn.torch.class_map import TORCHS, as_torch_module, counterpart


def register() -> None:
    """Patch the compiler of modules; does nothing if this torch has another one."""
    recursive: Any = getattr(torch.jit, "_recursive", None)
    create = getattr(recursive, "create_script_module", None)
    if create is None:
        return

    @functools.wraps(create)
    def create_script_module(nn_module: Module, stubs_fn: Any, *args: Any, **options: Any) -> Any:
        if isinstance(nn_module, torch.jit.ScriptModule):  # traced modules stay as they are
            _replace_ours(nn_module)
        return create(nn_module, stubs_fn, *args, **options)

    recursive.create_script_module = create_script_module


def _replace_ours(parent: Module) -> None:
    """Replace each module of ours inside a module by torch.nn's; one used twice stays one module."""
    replacements: dict[Module, Module] = {}
    for module in list(parent.modules()):
        for name, child in module._modules.items():
            if child is not None and counterpart(type(child), TORCHS) is not None:
                if child not in replacements:
                    replacements[child] = as_torch_module(child)
                module._modules[name] = replacements[child]
