"""The gang: threads that wait inside machine code for jobs, and how many of them a call may use.

The gang belongs to the process. One call at a time has it; a call that finds it taken runs on its own thread alone,
with the same bits. After a fork the child makes a new one when it first needs it.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from fusedrnn import config
from fusedrnn.codegen import sync
from fusedrnn.engine import machine
from fusedrnn.engine.locks import Lock
from fusedrnn.engine.workspace import aligned_empty

# Turns of a waiting loop, some 15 ns each: an idle thread sleeps after about 50 us, one that waits for the other
# members of its own job after a few hundred. Where there are more threads than processors, nobody spins.
_IDLE_SPINS, _BUSY_SPINS, _CROWDED_SPINS = 3_000, 20_000, 10

_count: int | None = None
_limit: ContextVar[int | None] = ContextVar("fusedrnn_threads", default=None)


def get_num_threads() -> int:
    """Threads that a call made here may use."""
    limit = _limit.get()
    if limit is not None:
        return limit
    return config.num_threads() if _count is None else _count


def set_num_threads(threads: int) -> None:
    """Set how many threads calls may use, in the whole process.

    Raises:
        TypeError: If ``threads`` is no integer.
        ValueError: If it is not from 1 to 1024.
    """
    global _count
    _count = _checked(threads)


@contextmanager
def thread_limits(threads: int) -> Iterator[None]:
    """Use that many threads for the calls made inside the ``with`` block, by this thread or task alone."""
    token = _limit.set(_checked(threads))
    try:
        yield
    finally:
        _limit.reset(token)


def _checked(threads: int) -> int:
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)):
        raise TypeError(f"threads must be an integer; got {threads!r}")
    if not 1 <= threads <= config.MOST_THREADS:
        raise ValueError(f"threads must be from 1 to {config.MOST_THREADS}; got {threads}")
    return int(threads)


class Gang:
    """Some threads beside the caller's, and the control block they share."""

    def __init__(self, workers: int) -> None:
        code = machine.gang_code()
        self.workers = workers
        self._control = aligned_empty((len(sync.CONTROL.names),), np.int64)
        self._control[:] = 0
        self._address = self._control.ctypes.data
        self._dispatch, self._stop = machine.function(code, "dispatch", 6), machine.function(code, "stop", 1)
        work = machine.function(code, "work", 3)
        crowded = workers + 1 > config.processors()
        self.spins = _CROWDED_SPINS if crowded else _BUSY_SPINS
        self._control[sync.CONTROL.index["spins"]] = _CROWDED_SPINS if crowded else _IDLE_SPINS
        self._threads: list[threading.Thread] = []
        try:
            for member in range(1, workers + 1):
                arguments = self._address, member, 0
                thread = threading.Thread(target=work, args=arguments, name=f"fusedrnn-{member}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:  # the system has no more threads for us: those that wait on our memory must not outlive it
            self.stop()
            raise

    def run(self, function: int, arguments: int, members: int) -> None:
        """Run ``function(arguments, member)`` for members 0 (on this thread) to ``members - 1``; wait for all."""
        self._dispatch(self._address, function, arguments, members, self.workers, self.spins)

    def stop(self) -> None:
        """End the threads and wait until they have."""
        self._stop(self._address)
        for thread in self._threads:
            thread.join()


_gang: Gang | None = None
_taken = Lock()


@contextmanager
def borrow_gang(threads: int) -> Iterator[Gang | None]:
    """The process's gang with that many members, caller included; None if another call has it or one is enough."""
    global _gang
    if threads == 1 or not _taken.acquire(blocking=False):
        yield None
        return
    try:
        if _gang is None or _gang.workers != threads - 1:
            _dismiss()
            _gang = Gang(threads - 1)
        yield _gang
    finally:
        _taken.release()


def _dismiss() -> None:
    global _gang
    if _gang is not None:
        _gang.stop()
        _gang = None


def _at_exit() -> None:
    if _taken.acquire(blocking=False):
        _dismiss()
        _taken.release()


def _forget() -> None:
    """In a forked child the gang's threads do not exist."""
    global _gang
    _gang = None


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
