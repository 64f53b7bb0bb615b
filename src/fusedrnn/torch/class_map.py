"""Our classes and torch.nn's that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module
from torch.nn.utils import parametrize

OURS: dict[type[Module], type[Module]] = {}
"""Our class for one of torch.nn's."""
TORCHS: dict[type[Module], type[Module]] = {}
"""The other way round."""


def pair(*classes: type[Module]) -> None:
    """Take up classes of ours, each with that of torch.nn's which comes last among its bases."""
    for ours in classes:
        torchs = ours.__bases__[-1]
        OURS[torchs], TORCHS[ours] = ours, torchs
        ours.__module__ = "fusedrnn.torch"  # where users find it, and pickles name it


def counterpart(kind: type, pairs: Mapping[type[Module], type[Module]]) -> type[Module] | None:
    """The class on the other side; for the class that a parametrization made, the same one made over that."""
    if kind in pairs:
        return pairs[kind]
    # A class that was made to have ours beneath a subclass of torch.nn's knows that subclass.
    if pairs is TORCHS and "_fusedrnn_beneath" in vars(kind):
        subclass: type[Module] = vars(kind)["_fusedrnn_beneath"]
        return subclass
    base = parametrized_base(kind)
    other = None if base is None else counterpart(base, pairs)
    return None if other is None else parametrized_over(kind, other)


def parametrized_base(kind: type) -> type[Module] | None:
    """What a parametrization made a class from, or None if none did."""
    base = kind.__bases__[0]
    made = kind.__module__ == parametrize.__name__ and kind.__name__ == f"Parametrized{base.__name__}"
    return base if made else None


def parametrized_over(kind: type, base: type[Module]) -> type[Module]:
    """The class that a parametrization made, over another base."""
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    metaclass: Any = type(base)
    made: type[Module] = metaclass(kind.__name__, (base,), own)
    return made


def twin(module: Module) -> Module:
    """A module of torch.nn's with the very parameters, buffers and hooks of one of ours; a subclass stays itself."""
    kind = counterpart(type(module), TORCHS)
    if kind is None:
        return module
    other: Module = object.__new__(kind)
    other.__dict__.update(module.__dict__)
    return other
