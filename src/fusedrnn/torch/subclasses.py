"""Subclasses of torch.nn's layers that leave the arithmetic alone: our implementation beneath their own code."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from torch.nn import Module, RNNBase, RNNCellBase

from fusedrnn.torch import class_map as pairs
from fusedrnn.torch.class_map import OURS

# What a subclass may define although torch.nn's class has it too: our forward makes no use of it.
_HARMLESS = {
    "__init__", "forward", "extra_repr", "reset_parameters", "flatten_parameters", "all_weights", "__repr__",
    "__getstate__", "__setstate__", "_replicate_for_data_parallel", "__prepare_scriptable__", "__constants__",
    "__jit_unused_properties__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__slots__",
    "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__parameters__", "__overloads__",
    "__orig_bases__", "__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__",
    "__classdictcell__", "__reduce__", "__reduce_ex__",
}  # fmt: skip
# Ways to change what any attribute is, and attributes that a class may define in the place of instances.
_ATTRIBUTES = {
    "__getattr__", "__getattribute__", "__setattr__", "__delattr__", "__class__", "mode", "nonlinearity", "input_size",
    "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size", "training",
    "_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights", "_parameters",
}  # fmt: skip
_WEIGHTS = "weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh"
_lock = threading.Lock()
_beneath: weakref.WeakKeyDictionary[type[Module], weakref.ref[type[Module]]] = weakref.WeakKeyDictionary()


def torchs_class(kind: type) -> type[Module] | None:
    """The class of torch.nn's six that a class is derived from, or is; None if there is none."""
    return next((base for base in kind.__mro__ if base in OURS), None)


def changes(module: Module) -> str:
    """What a subclass of a layer of torch.nn's does that ours beneath it would ignore; empty if nothing."""
    kind = type(module)
    kind = pairs.parametrized_base(kind) or kind
    known = torchs_class(kind)
    if known is None:
        return "has a forward of its own"
    own = kind.__mro__[: kind.__mro__.index(known)]
    ours = [base for base in OURS[known].__mro__ if base.__module__.startswith("fusedrnn.") or base in (known, RNNBase)]
    taken = {name for base in (*ours, RNNCellBase) for name in vars(base)} | _ATTRIBUTES
    for base in own:
        overridden = vars(base).keys() & taken - _HARMLESS | {name for name in vars(base) if name.startswith(_WEIGHTS)}
        if overridden:
            return f"overrides {', '.join(sorted(overridden))}"
        forward = vars(base).get("forward")
        if forward is not None and not _calls_super(forward):
            return "has a forward that does not call super().forward"
    return ""


def _calls_super(function: Any) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return isinstance(code, CodeType) and _names(code, "super")


def _names(code: CodeType, name: str) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return name in code.co_names or any(_names(each, name) for each in inner)


def beneath(kind: type[Module]) -> type[Module]:
    """A class like a subclass of torch.nn's, whose ``super().forward`` is ours. The same one each time."""
    if (base := pairs.parametrized_base(kind)) is not None:
        return pairs.parametrized_over(kind, beneath(base))
    known = torchs_class(kind)
    if known is None:
        raise TypeError(f"kind must be a subclass of a layer of torch.nn's; got {kind.__name__}")
    ref = _beneath.get(kind)
    combined = ref() if ref is not None else None
    if combined is None:
        body: dict[str, Any] = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        if kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__:
            # Pickles name the subclass, since this class is in no module.
            body["__reduce_ex__"] = _reduce
        body["_fusedrnn_beneath"] = kind
        metaclass: Any = type(kind)
        with _unannounced(kind):
            created: type[Module] = metaclass(kind.__name__, (kind, OURS[known]), body)
        _beneath[kind] = weakref.ref(created)
        return created
    return combined


@contextmanager
def _unannounced(kind: type[Module]) -> Iterator[None]:
    """While it lasts, a class is not told of the subclass that is made here; of any other it is.

    A base with another ``__init_subclass__`` would not do: a module can take on only classes of its own layout.
    """
    own = vars(kind).get("__init_subclass__")

    def init_subclass(cls: Any, /, **options: Any) -> None:
        if "_fusedrnn_beneath" not in vars(cls):
            inherited: Any = super(kind, cls).__init_subclass__ if own is None else own.__get__(None, cls)
            inherited(**options)

    untyped: Any = kind
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
    parts: Any = object.__reduce_ex__(self, 2)
    kind: Any = type(self)
    return _new, (kind._fusedrnn_beneath,), *parts[2:]


def _new(kind: type[Module]) -> Module:
    combined = beneath(kind)
    return combined.__new__(combined)
