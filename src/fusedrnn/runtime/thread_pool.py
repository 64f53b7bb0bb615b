"""The gang: threads that wait inside machine code for jobs, and how many of them a call may use.

The gang belongs to the process. One call at a time has it; a call that finds it taken runs on its own thread alone,
with the same bits. After a fork the child makes a new one when it first needs it.
"""

from __future__ import annotations

import atexit
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from time import perf_counter
from typing import NamedTuple

import numpy as np

from fusedrnn import env as config
from fusedrnn.jit import sync
from fusedrnn.jit.loader import Job, address, function, load, load_once
from fusedrnn.jit.target import current
from fusedrnn.locks import Lock
from fusedrnn.runtime.buffers import aligned_empty
from fusedrnn.scalars import shown

# Turns of a waiting loop, 15 ns or more each: an idle thread sleeps after a quarter of a millisecond, one that waits
# for the other members of its own job a little later. Where there are more threads than processors, nobody spins.
_IDLE_SPINS, _BUSY_SPINS, _CROWDED_SPINS = 16_000, 20_000, 10
# Seconds after a job in which its threads are awake; so many calls, one so soon after the other, are worth waking them.
_AWAKE, _CLOSE, _SEVERAL = 2e-4, 5e-5, 3

_count: int | None = None
_limit: ContextVar[int | None] = ContextVar("fusedrnn_threads", default=None)


def get_num_threads() -> int:
    """Threads that a call made here may use."""
    limit = _limit.get()
    if limit is not None:
        return limit
    return _default() if _count is None else _count


@lru_cache(maxsize=1)
def _default() -> int:
    """What the environment said when first asked: to ask it takes as long as a short call."""
    return config.num_threads()


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
        raise ValueError(f"threads must be from 1 to {config.MOST_THREADS}; got {shown(threads)}")
    return int(threads)


class PoolFunctions(NamedTuple):
    """Functions of machine code that threads of the pool and their callers run."""

    dispatch: Callable[..., None]
    stop: Callable[..., None]
    work: Callable[..., None]


@load_once()
def load_pool() -> PoolFunctions:
    """The functions that a pool runs on."""
    code = load("gang", current(), sync.build_gang)
    counts = {"dispatch": 6, "stop": 1, "work": 3}
    return PoolFunctions(*(function(code, name, count) for name, count in counts.items()))


class Gang:
    """Some threads beside the caller's, and the control block they share.

    Each thread holds on to the gang for as long as it lives: the memory it waits on cannot go before it does.
    """

    def __init__(self, workers: int) -> None:
        self._dispatch, self._stop, self._work = load_pool()
        self.workers, self._process = workers, os.getpid()
        self._control = aligned_empty((len(sync.CONTROL.names),), np.int64)
        self._control[:] = 0
        self._address: int = self._control.ctypes.data
        crowded = workers + 1 > config.processors()
        self._spins = _CROWDED_SPINS if crowded else _BUSY_SPINS
        self._control[sync.CONTROL.index["spins"]] = _CROWDED_SPINS if crowded else _IDLE_SPINS
        self._places = np.full(workers + 1, -1, np.int64)
        self._control[sync.CONTROL.index["places"]] = 0 if crowded else self._places.ctypes.data
        self._threads: list[threading.Thread] = []
        try:
            for member in range(1, workers + 1):
                thread = threading.Thread(target=self._live, args=(member,), name=f"fusedrnn-{member}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:  # no more threads to be had, or an interrupt: a gang is whole or is not
            self._stop(self._address)
            raise

    def _live(self, member: int) -> None:
        self._work(self._address, member, 0)

    def control(self) -> int:
        """Where its control block is, for whoever dispatches a job.

        Raises:
            RuntimeError: In a child that was forked inside this call, by a signal handler say.
        """
        if os.getpid() != self._process:
            raise RuntimeError("this process was forked inside the call: the threads to run it on do not exist here")
        return self._address

    def run(self, function: int, arguments: int, members: int) -> None:
        """Run ``function(arguments, member)`` for members 0 (on this thread) to ``members - 1``; wait for all.

        Raises:
            RuntimeError: As :meth:`control` does.
        """
        self._dispatch(self.control(), function, arguments, members, self.workers, self._spins)

    def stop(self) -> None:
        """End the threads and wait until they have; if that is interrupted they end all the same."""
        self._stop(self._address)
        for thread in self._threads:
            thread.join()


class Team:
    """So many threads for a call: the caller's and those of the gang.

    Attributes:
        threads: Their number.
        spins: Turns of a waiting loop before a member of a job sleeps.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        # When a call ended last, and when several threads did; calls so far that came soon after another.
        self._ended, self._worked, self._close = 0.0, 0.0, 0
        self.spins = _CROWDED_SPINS if threads > config.processors() else _BUSY_SPINS

    def begin(self) -> bool:
        """Whether a call that begins now finds the threads awake, or is one of so many that they should be."""
        now = perf_counter()
        self._close = self._close + 1 if now - self._ended < _CLOSE else 0
        return now - self._worked < _AWAKE or self._close >= _SEVERAL

    def end(self, members: int) -> None:
        """A call has ended that so many of them ran."""
        self._ended = now = perf_counter()
        if members > 1:
            self._worked = now

    def run(self, job: Job, call: int, members: int) -> bool:
        """Run ``job(call, member)`` for every member, wait for all; False if there are not so many threads now."""
        with borrow_gang(self.threads) as gang:
            if gang is None:
                return False
            gang.run(address(job), call, members)
        return True


@lru_cache(maxsize=64)
def own_team(threads: int) -> Team:
    """The caller's thread and so many of the gang that they are that many."""
    return Team(threads)


class Permit:
    """Leave to use the gang, for as long as someone holds it: if its holder fails anywhere, it goes with its frame."""


_gang: Gang | None = None
_lock = Lock()
_permit: weakref.ref[Permit] | None = None


def permitted() -> Permit | None:
    """Leave to use the gang; None if another call has it.

    That may be an outer call of this thread, which a signal handler interrupted.
    """
    global _permit
    with _lock:
        if _permit is not None and _permit() is not None:
            return None
        permit = Permit()
        _permit = weakref.ref(permit)
        return permit


def returned(permit: Permit) -> None:
    """End the permit now: a traceback may hold the frame that holds it."""
    global _permit
    with _lock:
        if _permit is not None and _permit() is permit:
            _permit = None


@contextmanager
def borrow_gang(threads: int) -> Iterator[Gang | None]:
    """The process's gang with that many members, caller included.

    None if one thread is enough, if another call has the gang, or if the system gives no more threads, which is
    warned of.
    """
    permit = None if threads == 1 else permitted()
    if permit is None:
        yield None
        return
    try:
        yield hired(threads)
    finally:
        returned(permit)


def hired(threads: int) -> Gang | None:
    """The gang with that many members, made anew if the one there is has another size."""
    global _gang
    if _gang is None or _gang.workers != threads - 1:
        _dismiss()
        try:
            _gang = Gang(threads - 1)
        except RuntimeError as error:
            warnings.warn(f"running on one thread: {threads} could not be had ({error})", RuntimeWarning, stacklevel=2)
    return _gang


def _dismiss() -> None:
    global _gang
    gang, _gang = _gang, None  # in this order: an interrupt must not leave a gang that has been stopped
    if gang is not None:
        gang.stop()


def _at_exit() -> None:
    permit = permitted()
    if permit is not None:
        _dismiss()


def _forget() -> None:
    """In a forked child the gang's threads do not exist, and it may be told to run on other processors."""
    global _gang, _permit
    _gang, _permit = None, None
    _default.cache_clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
