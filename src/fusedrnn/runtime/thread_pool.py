"""The pool: threads that wait inside machine code for jobs, and how many of them a call may use.

The pool belongs to the process. One call at a time has it; a call that finds it taken runs on its own thread alone,
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

from fusedrnn import env
from fusedrnn.jit import sync
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import Job, address, function, load, load_once
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
    return env.num_threads()


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
    if not 1 <= threads <= env.MOST_THREADS:
        raise ValueError(f"threads must be from 1 to {env.MOST_THREADS}; got {shown(threads)}")
    return int(threads)


class PoolFunctions(NamedTuple):
    """Functions of machine code that threads of the pool and their callers run."""

    dispatch: Callable[..., None]
    stop: Callable[..., None]
    work: Callable[..., None]


@load_once()
def load_pool() -> PoolFunctions:
    """The functions that a pool runs on."""
    code = load("pool", current_target(), sync.build_gang)
    counts = {"dispatch": 6, "stop": 1, "work": 3}
    return PoolFunctions(*(function(code, name, count) for name, count in counts.items()))


class ThreadPool:
    """Some threads beside the caller's, and the control block they share.

    Each thread holds on to the pool for as long as it lives: the memory it waits on cannot go before it does.
    """

    def __init__(self, workers: int) -> None:
        self._dispatch, self._stop, self._work = load_pool()
        self.workers, self._process = workers, os.getpid()
        self._control = aligned_empty((len(sync.CONTROL.names),), np.int64)
        self._control[:] = 0
        self._address: int = self._control.ctypes.data
        crowded = workers + 1 > env.processors()
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
        except BaseException:  # no more threads to be had, or an interrupt: a pool is whole or is not
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


class ThreadTeam:
    """So many threads for a call: the caller's and those of the pool.

    Attributes:
        threads: Their number.
        spins: Turns of a waiting loop before a member of a job sleeps.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        # When a call ended last, and when several threads did; calls so far that came soon after another.
        self._ended, self._worked, self._close = 0.0, 0.0, 0
        self.spins = _CROWDED_SPINS if threads > env.processors() else _BUSY_SPINS

    def note_call_start(self) -> bool:
        """Whether a call that begins now finds the threads awake, or is one of so many that they should be."""
        now = perf_counter()
        self._close = self._close + 1 if now - self._ended < _CLOSE else 0
        return now - self._worked < _AWAKE or self._close >= _SEVERAL

    def note_call_end(self, members: int) -> None:
        """A call has ended that so many of them ran."""
        self._ended = now = perf_counter()
        if members > 1:
            self._worked = now

    def run(self, job: Job, call: int, members: int) -> bool:
        """Run ``job(call, member)`` for every member, wait for all; False if there are not so many threads now."""
        with borrow_pool(self.threads) as pool:
            if pool is None:
                return False
            pool.run(address(job), call, members)
        return True


@lru_cache(maxsize=64)
def pool_team(threads: int) -> ThreadTeam:
    """The caller's thread and so many of the pool that they are that many."""
    return ThreadTeam(threads)


class PoolLease:
    """Leave to use the pool, for as long as someone holds it: if its holder fails anywhere, it goes with its frame."""


_pool: ThreadPool | None = None
_lock = Lock()
_lease: weakref.ref[PoolLease] | None = None


def try_acquire_pool() -> PoolLease | None:
    """Leave to use the pool; None if another call has it.

    That may be an outer call of this thread, which a signal handler interrupted.
    """
    global _lease
    with _lock:
        if _lease is not None and _lease() is not None:
            return None
        lease = PoolLease()
        _lease = weakref.ref(lease)
        return lease


def release_pool(lease: PoolLease) -> None:
    """End the lease now: a traceback may hold the frame that holds it."""
    global _lease
    with _lock:
        if _lease is not None and _lease() is lease:
            _lease = None


@contextmanager
def borrow_pool(threads: int) -> Iterator[ThreadPool | None]:
    """The process's pool with that many members, caller included.

    None if one thread is enough, if another call has the pool, or if the system gives no more threads, which is
    warned of.
    """
    lease = None if threads == 1 else try_acquire_pool()
    if lease is None:
        yield None
        return
    try:
        yield get_pool(threads)
    finally:
        release_pool(lease)


def get_pool(threads: int) -> ThreadPool | None:
    """The pool with that many members, made anew if the one there is has another size."""
    global _pool
    if _pool is None or _pool.workers != threads - 1:
        _dismiss()
        try:
            _pool = ThreadPool(threads - 1)
        except RuntimeError as error:
            warnings.warn(f"running on one thread: {threads} could not be had ({error})", RuntimeWarning, stacklevel=2)
    return _pool


def _dismiss() -> None:
    global _pool
    pool, _pool = _pool, None  # in this order: an interrupt must not leave a pool that has been stopped
    if pool is not None:
        pool.stop()


def _at_exit() -> None:
    lease = try_acquire_pool()
    if lease is not None:
        _dismiss()


def _forget() -> None:
    """In a forked child the pool's threads do not exist, and it may be told to run on other processors."""
    global _pool, _lease
    _pool, _lease = None, None
    _default.cache_clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
