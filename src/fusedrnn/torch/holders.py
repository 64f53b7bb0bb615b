"""Advice for ``accelerate`` of an object that is not a module but holds some, such as an estimator or an agent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.nn import Module

# Attributes and attributes of attributes. Modules further away seldom belong to the object.
_DEPTH = 2
_MAX_NAMED = 4
_INSTANTIATE = ", a class: give a module of it, or build it within `with fusedrnn.torch.accelerated():`"
_NOT_YET = (
    ", which holds no module yet; if it builds its network later, as in fit() or load(), let it do so "
    "within `with fusedrnn.torch.accelerated():`"
)


def advice(holder: object) -> str:
    """The end of an error message: what to pass instead of this object."""
    if isinstance(holder, type):
        return _INSTANTIATE if issubclass(holder, Module) else ""
    if holder is None or isinstance(holder, (str, bytes, int, float)):
        return ""
    paths = list(_module_paths("model", holder, _DEPTH, set()))
    if not paths:
        return _NOT_YET
    more = f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
    return f", which holds modules: give {', '.join(paths[:_MAX_NAMED])}{more}"


def _module_paths(path: str, holder: object, depth: int, seen: set[int]) -> Iterator[str]:
    """Expressions for the modules in an object, nearest first, without the modules inside these."""
    if id(holder) in seen:
        return
    seen.add(id(holder))
    children = _children(path, holder)
    yield from (child_path for child_path, child in children if isinstance(child, Module))
    if depth > 1:
        for child_path, child in children:
            if not isinstance(child, Module):
                yield from _module_paths(child_path, child, depth - 1, seen)


def _children(path: str, holder: Any) -> list[tuple[str, object]]:
    if isinstance(holder, Mapping):
        return [(f"{path}[{key!r}]", value) for key, value in holder.items()]
    if isinstance(holder, (list, tuple)):
        return [(f"{path}[{index}]", value) for index, value in enumerate(holder)]
    attributes = getattr(holder, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(holder, type):
        return []
    return [(f"{path}.{name}", value) for name, value in attributes.items()]
