"""Our classes and torch.nn's that they stand for."""

from __future__ import annotations

from collections.abc import Mapping

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
    base = kind.__bases__[0]
    made = kind.__module__ == parametrize.__name__ and kind.__name__ == f"Parametrized{base.__name__}"
    if not made or base not in pairs:
        return None
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (pairs[base],), own)


def twin(module: Module) -> Module:
    """A module of torch.nn's with the very parameters, buffers and hooks of one of ours; a subclass stays itself."""
    kind = counterpart(type(module), TORCHS)
    if kind is None:
        return module
    other: Module = object.__new__(kind)
    other.__dict__.update(module.__dict__)
    return other
