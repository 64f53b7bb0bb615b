"""Locks that a forked child finds open, whoever held them in the parent.

A lock may also stand for something that a child cannot renew, such as a lock inside another library: no process forks
then while a thread holds it.
"""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class Lock:
    """A re-entrant lock, renewed in a forked child, where the thread that held it does not exist.

    Args:
        guards_fork: Whether a fork waits until no other thread holds it.
    """

    def __init__(self, *, guards_fork: bool = False) -> None:
        self._lock = threading.RLock()
        _all.add(self)
        if guards_fork and hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self.acquire, after_in_parent=self.release)

    def acquire(self, blocking: bool = True) -> bool:
        """Take it; without ``blocking`` say at once whether that was possible."""
        return self._lock.acquire(blocking)

    def release(self) -> None:
        """Give it back."""
        self._lock.release()

    def renew(self) -> None:
        """Forget who holds it."""
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


_all: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _all:
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
