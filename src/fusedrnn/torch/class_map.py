"""The classes of torch.nn that our classes replace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

Classes = Mapping[type[Module], type[Module]]

OURS: dict[type[Module], type[Module]] = {}
"""From torch.nn's classes to ours."""
TORCHS: dict[type[Module], type[Module]] = {}
"""From our classes to torch.nn's."""


def register(*classes: type[Module]) -> None:
    """Add some of our classes; each replaces the class of torch.nn that is its last base."""
    for ours in classes:
        torchs = ours.__bases__[-1]
        OURS[torchs], TORCHS[ours] = ours, torchs
        ours.__module__ = "fusedrnn.torch"  # the public name, which pickles store


def counterpart(cls: type, classes: Classes) -> type[Module] | None:
    """The class that ``classes`` (:data:`OURS` or :data:`TORCHS`) has for a class; None if there is none.

    For a parametrized class it is the parametrized counterpart of its base.
    """
    if cls in classes:
        return classes[cls]
    # A class that subclasses.py has made names the subclass of torch.nn's class from which it was derived.
    if classes is TORCHS and "_fusedrnn_beneath" in vars(cls):
        subclass: type[Module] = vars(cls)["_fusedrnn_beneath"]
        return subclass
    base = parametrized_base(cls)
    other = None if base is None else counterpart(base, classes)
    return None if other is None else parametrized_over(cls, other)


def parametrized_base(cls: type) -> type[Module] | None:
    """The class from which torch.nn.utils.parametrize created this one; None if it did not."""
    base = cls.__bases__[0]
    is_parametrized = cls.__module__ == parametrize.__name__ and cls.__name__ == f"Parametrized{base.__name__}"
    return base if is_parametrized else None


def parametrized_over(cls: type, base: type[Module]) -> type[Module]:
    """A parametrized class with another base."""
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    metaclass: Any = type(base)
    parametrized: type[Module] = metaclass(cls.__name__, (base,), body)
    return parametrized


def as_torch_module(module: Module) -> Module:
    """torch.nn's module with the same parameters, buffers and hooks; the module itself if it is not one of ours."""
    cls = counterpart(type(module), TORCHS)
    if cls is None:
        return module
    other: Module = object.__new__(cls)
    other.__dict__.update(vars(module))
    forget(other)
    return other


def forget(module: Module) -> None:
    """Remove what our layers add to the attributes of torch.nn's."""
    for name in ("compute", "_last_call"):
        vars(module).pop(name, None)


def torch_class(cls: type) -> type[Module] | None:
    """Which of torch.nn's six classes a class is or is derived from; None if there is none."""
    return next((base for base in cls.__mro__ if base in OURS), None)


def is_scripted(module: Module) -> bool:
    """Whether a module was one of torch.nn's six classes before torch.jit compiled it, by the name of its class."""
    return isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", "") in _torch_names()


def is_quantized(module: Module) -> bool:
    """Whether a module is torch.ao's quantized version of one of torch.nn's six classes."""
    cls = type(module)
    return cls.__module__.startswith("torch.ao.") and cls.__name__ in _torch_names()


def _torch_names() -> set[str]:
    return {cls.__name__ for cls in OURS}
