"""``accelerated`` and ``accelerate_new``: torch.nn's layers become ours when they are created."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch.nn import Module

from fusedrnn.locks import Lock
from fusedrnn.torch.class_map import OURS
from fusedrnn.torch.conversion import convert

# __setstate__ runs after a pickle or a copy has set a module's attributes.
_METHODS = ("__init__", "__setstate__")


class _Setting:
    """The options of one context, or of the process. Contexts may end in any order, and in another thread."""

    __slots__ = ("active", "subclasses")

    def __init__(self, subclasses: bool) -> None:
        self.subclasses, self.active = subclasses, True


_context_settings: ContextVar[tuple[_Setting, ...]] = ContextVar("fusedrnn_accelerated", default=())
_process_setting: _Setting | None = None
_lock = Lock()
_users = 0
_patches = ExitStack()


@contextmanager
def accelerated(*, subclasses: bool = False) -> Iterator[None]:
    """Within this context torch.nn's recurrent layers and cells become ours when constructed, unpickled or copied.

    This applies to all code that creates layers, under whatever name it has imported torch.nn's classes. Layers that
    :func:`accelerate` would leave unchanged stay unchanged. Layers that exist already stay unchanged, and layers
    created within the context stay ours after it. The context applies to the calling thread (or asyncio task); see
    :func:`accelerate_new` for all threads. It may be nested, and may be used as a decorator.

    Args:
        subclasses: As in :func:`accelerate`.

    Example:
        >>> with accelerated():
        ...     net = torch.nn.LSTM(8, 16)
        >>> type(net).__module__
        'fusedrnn.torch'
    """
    setting = _Setting(subclasses)
    _count_users(1)
    _context_settings.set((*_active_settings(), setting))
    try:
        yield
    finally:
        setting.active = False
        _context_settings.set(_active_settings())
        _count_users(-1)


def _active_settings() -> tuple[_Setting, ...]:
    """The settings of this thread's or task's contexts, the innermost last."""
    return tuple([setting for setting in _context_settings.get() if setting.active])


def accelerate_new(enabled: bool = True, *, subclasses: bool = False) -> None:
    """Like :func:`accelerated` for the whole process and all its threads, from now on.

    Args:
        enabled: Whether new layers of torch.nn's classes become ours. Existing layers stay unchanged.
        subclasses: As in :func:`accelerate`.
    """
    global _process_setting
    before, _process_setting = _process_setting, _Setting(subclasses) if enabled else None
    _count_users((_process_setting is not None) - (before is not None))


def _count_users(change: int) -> None:
    """Patch the classes for the first user, and restore them after the last."""
    global _users
    with _lock:
        before, _users = _users, _users + change
        if not before and _users:
            for cls in OURS:
                for name in _METHODS:
                    _patches.callback(_patch(cls, name))
        elif before and not _users:
            _patches.close()


def _patch(cls: type[Module], name: str) -> Callable[[], None]:
    """Patch a method so that it converts the module at its end. Returns a function that restores the method."""
    own, method = vars(cls).get(name), getattr(cls, name)

    @functools.wraps(method)
    def patched(self: Module, *args: Any, **options: Any) -> None:
        method(self, *args, **options)
        setting = (_active_settings() or (_process_setting,))[-1]
        if setting is not None:
            convert(self, subclasses=setting.subclasses)

    def restore() -> None:
        if vars(cls).get(name) is not patched:
            return  # another library has wrapped ours since, so ours must stay; it does nothing
        if own is None:
            delattr(cls, name)
        else:
            setattr(cls, name, own)

    setattr(cls, name, patched)
    return restore
