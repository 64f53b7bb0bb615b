"""Locks that are open in a forked child, even if another thread held them in the parent.

A lock may also guard something that a child cannot renew, such as a lock inside another library. Then a fork waits
while another thread holds it.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

_RLock: Any = type(threading.RLock())  # threading.RLock is a function, not the type


class Lock(_RLock):  # type: ignore[misc]
    """A re-entrant lock that is renewed in a forked child, where the thread that forked is the only one.

    The methods that acquire and release it are those of a C type: no signal handler runs inside of them, so an
    interrupt cannot leave it locked.

    Args:
        guards_fork: Whether a fork waits until no other thread holds it.
    """

    def __new__(cls, *, guards_fork: bool = False) -> Lock:
        """A new lock."""
        del guards_fork
        lock: Lock = super().__new__(cls)
        return lock

    def __init__(self, *, guards_fork: bool = False) -> None:
        _all.add(self)
        if guards_fork and hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self.acquire, after_in_parent=self.release, after_in_child=self.release)

    def renew(self) -> None:
        """Open the lock, unless this thread holds it, since this thread continues in the child."""
        if not self._is_owned():
            self._at_fork_reinit()


_all: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _all:
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
