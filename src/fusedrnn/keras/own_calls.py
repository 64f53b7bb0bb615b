"""Layers and cells whose calls do more than the methods of their class."""

from __future__ import annotations

from typing import Any

_METHODS = frozenset(("__call__", "call", "get_initial_state", "inner_loop"))
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
"""The attributes of a PyTorch module, which a layer is on that backend."""


def has_own_calls(layer: Any) -> bool:
    """Whether a layer or a cell has a method of its own in place of its class's, or PyTorch's hooks of calls."""
    attributes = vars(layer)
    return not _METHODS.isdisjoint(attributes) or any([bool(attributes.get(name)) for name in _HOOKS])
