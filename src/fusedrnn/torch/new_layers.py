"""Layers of torch.nn's that are ours from the start: for networks that a library builds or loads by itself."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.nn import Module

from fusedrnn.torch.class_map import OURS
from fusedrnn.torch.conversion import convert

# After a constructor, and after a pickle or a copy has given a module its attributes.
_METHODS = ("__init__", "__setstate__")


class _Setting:
    """What one context or the whole process asks for. Contexts may end in any order, and in another thread."""

    __slots__ = ("active", "subclasses")

    def __init__(self, subclasses: bool) -> None:
        self.subclasses, self.active = subclasses, True


_here: ContextVar[tuple[_Setting, ...]] = ContextVar("fusedrnn_accelerated", default=())
_everywhere: _Setting | None = None
_lock = threading.Lock()
_uses = 0
# What is in the place of which methods: class, name, ours, and the class's own, if it has one.
_patched: list[tuple[type[Module], str, Callable[..., None], Callable[..., None] | None]] = []


@contextmanager
def accelerated(*, subclasses: bool = False) -> Iterator[None]:
    """Within this context torch.nn's recurrent layers and cells come out as ours: built, unpickled or copied.

    It does not matter who builds them, nor by which name they know torch.nn's classes; what :func:`accelerate` would
    leave alone is left alone. Layers that were there before stay as they are, those that were built stay ours. The
    context is the calling thread's (or asyncio task's); see :func:`accelerate_new` for all threads. It may be nested,
    and be used as a decorator.

    Args:
        subclasses: As for :func:`accelerate`.

    Example:
        >>> with accelerated():
        ...     net = torch.nn.LSTM(8, 16)
        >>> type(net).__module__
        'fusedrnn.torch'
    """
    setting = _Setting(subclasses)
    _use(1)
    _here.set((*_active(), setting))
    try:
        yield
    finally:
        setting.active = False
        _here.set(_active())
        _use(-1)


def _active() -> tuple[_Setting, ...]:
    """The settings of the contexts that this thread or task is in, the innermost last."""
    return tuple([setting for setting in _here.get() if setting.active])


def accelerate_new(enabled: bool = True, *, subclasses: bool = False) -> None:
    """The same for the whole process and all its threads, from now on; or no longer.

    Args:
        enabled: Whether new layers of torch.nn's come out as ours. Those that exist stay what they are.
        subclasses: As for :func:`accelerate`.
    """
    global _everywhere
    before, _everywhere = _everywhere, _Setting(subclasses) if enabled else None
    _use((_everywhere is not None) - (before is not None))


def _use(change: int) -> None:
    """Count who needs the classes patched; with the first they are, with the last no longer."""
    global _uses
    with _lock:
        before, _uses = _uses, _uses + change
        if not before and _uses:
            for kind in OURS:
                for name in _METHODS:
                    _patch(kind, name)
        elif before and not _uses:
            while _patched:
                _restore(*_patched.pop())


def _patch(kind: type[Module], name: str) -> None:
    method: Callable[..., None] = getattr(kind, name)

    @functools.wraps(method)
    def patched(self: Module, *args: Any, **options: Any) -> None:
        method(self, *args, **options)
        setting = (_active() or (_everywhere,))[-1]
        if setting is not None:
            convert(self, setting.subclasses)

    _patched.append((kind, name, patched, vars(kind).get(name)))
    setattr(kind, name, patched)


def _restore(kind: type[Module], name: str, patched: Callable[..., None], own: Callable[..., None] | None) -> None:
    if vars(kind).get(name) is not patched:
        return  # somebody has wrapped it since: it stays, and does nothing
    if own is None:
        delattr(kind, name)
    else:
        setattr(kind, name, own)
