"""Subclasses of torch.nn's layers that do not change the arithmetic: equivalent classes with our implementation."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from torch.nn import Module

from fusedrnn.locks import Lock
from fusedrnn.torch.class_map import OURS, parametrized_base, parametrized_over, torch_class

# Names of torch.nn's class that a subclass may override, since our forward does not use them. Names that begin with two
# underscores are allowed too.
_HARMLESS = {
    "forward", "extra_repr", "reset_parameters", "flatten_parameters", "all_weights", "_replicate_for_data_parallel",
    "train",
}  # fmt: skip
# Hooks into attribute access, and instance attributes that a class could define instead.
_ATTRIBUTES = {
    "__getattr__", "__getattribute__", "__setattr__", "__delattr__", "__class__", "mode", "nonlinearity", "input_size",
    "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size", "training",
    "_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights", "_parameters",
}  # fmt: skip
_WEIGHTS = "weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh"
_lock = Lock()
_combined: weakref.WeakKeyDictionary[type[Module], weakref.ref[type[Module]]] = weakref.WeakKeyDictionary()


def changes(module: Module) -> str:
    """What a subclass of torch.nn's layer changes and our implementation would ignore; empty if nothing."""
    cls = type(module)
    cls = parametrized_base(cls) or cls
    parent = torch_class(cls)
    if parent is None:
        return "has a forward of its own"
    bases = [base for base in OURS[parent].__mro__ if base.__module__.startswith(("fusedrnn.", parent.__module__))]
    names = {name for base in bases for name in vars(base) if not name.startswith("__")}
    reserved = names - _HARMLESS | _ATTRIBUTES
    for base in cls.__mro__[: cls.__mro__.index(parent)]:
        overridden = [name for name in sorted(vars(base)) if name in reserved or name.startswith(_WEIGHTS)]
        if overridden:
            return f"overrides {', '.join(overridden)}"
        forward = vars(base).get("forward")
        if forward is not None and not _calls_super(forward):
            return "has a forward that does not call super().forward"
    return ""


def _calls_super(function: Any) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return isinstance(code, CodeType) and _uses_name(code, "super")


def _uses_name(code: CodeType, name: str) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return name in code.co_names or any(_uses_name(each, name) for each in inner)


def beneath(cls: type[Module]) -> type[Module]:
    """A class like a subclass of torch.nn's, but its ``super().forward`` is ours. Every call returns the same class."""
    if (base := parametrized_base(cls)) is not None:
        return parametrized_over(cls, beneath(base))
    parent = torch_class(cls)
    if parent is None:
        raise TypeError(f"cls must be a subclass of a layer of torch.nn's; got {cls.__name__}")
    ref = _combined.get(cls)
    combined = ref() if ref is not None else None
    if combined is None:
        body: dict[str, Any] = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        if cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__:
            body["__reduce_ex__"] = _reduce  # pickles name the subclass, since the combined class is in no module
        body["_fusedrnn_beneath"] = cls
        metaclass: Any = type(cls)
        with _without_init_subclass(cls):
            combined = metaclass(cls.__name__, (cls, OURS[parent]), body)
        _combined[cls] = weakref.ref(combined)
    return combined


@contextmanager
def _without_init_subclass(cls: type[Module]) -> Iterator[None]:
    """Within this context, ``cls.__init_subclass__`` ignores the class created here, but not others.

    A base with another ``__init_subclass__`` is no alternative, since a module can only change to a class of the same
    layout.
    """
    own = vars(cls).get("__init_subclass__")

    def init_subclass(subclass: Any, /, **options: Any) -> None:
        if "_fusedrnn_beneath" not in vars(subclass):
            inherited: Any = super(cls, subclass).__init_subclass__ if own is None else own.__get__(None, subclass)
            inherited(**options)

    untyped: Any = cls
    with _lock:
        untyped.__init_subclass__ = classmethod(init_subclass)
        try:
            yield
        finally:
            if own is None:
                del untyped.__init_subclass__
            else:
                untyped.__init_subclass__ = own


def _reduce(self: Module, protocol: Any) -> Any:
    state: Any = object.__reduce_ex__(self, 2)
    cls: Any = type(self)
    return _new, (cls._fusedrnn_beneath,), *state[2:]


def _new(kind: type[Module]) -> Module:
    """Create an empty module when a pickle is loaded. Pickles store the name of this function."""
    combined = beneath(kind)
    return combined.__new__(combined)
