"""What to accelerate where somebody gives an object that is no module but may hold some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.nn import Module

# Attributes of attributes are looked at, and no more: a module that is further away is seldom the object's own.
_DEPTH = 2
_MOST_NAMED = 4
_LATER = (
    "which holds no module yet; if it builds its network later, as in fit() or load(), let it do so "
    "within `with fusedrnn.torch.accelerated():`"
)


def advice(given: object) -> str:
    """The end of a sentence: what to pass in the place of something that is no module."""
    if isinstance(given, type):
        return ", a class: give a module of it, or build it within `with fusedrnn.torch.accelerated():`" * issubclass(
            given, Module
        )
    if given is None or isinstance(given, (str, bytes, int, float)):
        return ""
    paths = list(_modules("model", given, _DEPTH, set()))
    if not paths:
        return f", {_LATER}"
    more = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return f", which holds modules: give {', '.join(paths[:_MOST_NAMED])}{more}"


def _modules(path: str, given: object, depth: int, seen: set[int]) -> Iterator[str]:
    """How to get at each module below an object: the nearest ones, not the modules inside these."""
    if id(given) in seen:
        return
    seen.add(id(given))
    for name, value in _parts(path, given):
        if isinstance(value, Module):
            yield name
    if depth > 1:
        for name, value in _parts(path, given):
            if not isinstance(value, Module):
                yield from _modules(name, value, depth - 1, seen)


def _parts(path: str, given: Any) -> list[tuple[str, object]]:
    if isinstance(given, Mapping):
        return [(f"{path}[{key!r}]", value) for key, value in given.items()]
    if isinstance(given, (list, tuple)):
        return [(f"{path}[{index}]", value) for index, value in enumerate(given)]
    attributes = getattr(given, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(given, type):
        return []
    return [(f"{path}.{name}", value) for name, value in attributes.items()]
