"""The thread pool, and how many threads a call may use.

The threads wait inside machine code for jobs. The pool belongs to the process, and one job at a time has it: a call
that finds it busy runs on its own thread, with the same bits. After a fork the child makes a new pool when needed.
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
from typing import NamedTuple

import numpy as np

from fusedrnn import env
from fusedrnn.jit.c_function import c_function
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import Job, address, function, load, load_once
from fusedrnn.locks import Lock
from fusedrnn.runtime.buffers import aligned_empty
from fusedrnn.runtime.native_state import control_cell, publish_num_threads, publish_pool
from fusedrnn.runtime.pool_kernel import CLOSE, CONTROL, MANY_CLOSE, NO_POOL, RAN, SPINNING, build_pool
from fusedrnn.scalars import as_int, shown

# Iterations of a waiting loop, each of 15 ns or more. An idle thread sleeps after a quarter of a millisecond; a thread
# that waits for others of its own job, a little later. With more threads than processors, threads sleep at once.
_IDLE_SPINS, _BUSY_SPINS, _OVERSUBSCRIBED_SPINS = 16_000, 20_000, 10

_num_threads: int | None = None
_limit: ContextVar[int | None] = ContextVar("fusedrnn_threads", default=None)


def get_num_threads() -> int:
    """How many threads a call made here may use."""
    limit = _limit.get() or _num_threads
    return _default() if limit is None else limit


def process_num_threads() -> int:
    """How many threads a call may use outside :func:`thread_limits`, as on the threads of other runtimes."""
    return _default() if _num_threads is None else _num_threads


@lru_cache(maxsize=1)
def _default() -> int:
    """The number from the environment, read once: reading it takes as long as a short call."""
    return env.num_threads()


def set_num_threads(threads: int) -> None:
    """Set how many threads calls may use, in the whole process.

    Raises:
        TypeError: If ``threads`` is no integer.
        ValueError: If it is not from 1 to 1024.
    """
    global _num_threads
    _num_threads = _checked(threads)
    publish_num_threads(_num_threads)


@contextmanager
def thread_limits(threads: int) -> Iterator[None]:
    """Use that many threads for calls made inside the ``with`` block, by this thread or task alone."""
    token = _limit.set(_checked(threads))
    try:
        yield
    finally:
        _limit.reset(token)


def _checked(threads: int) -> int:
    number = as_int("threads", threads)
    if not 1 <= number <= env.MAX_THREADS:
        raise ValueError(f"threads must be from 1 to {env.MAX_THREADS}; got {shown(threads)}")
    return number


def _is_oversubscribed(num_threads: int) -> bool:
    return num_threads > env.processors()


class PoolFunctions(NamedTuple):
    """The functions of :mod:`fusedrnn.runtime.pool_kernel`."""

    dispatch: Callable[..., int]
    stop: Callable[..., None]
    worker_loop: Callable[..., None]
    run_on_pool: Callable[..., int]


@load_once()
def load_pool() -> PoolFunctions:
    """Load the machine code of the pool."""
    code = load("pool", current_target(), build_pool)
    dispatch, run_on_pool = function(code, "dispatch", 4, returns=True), c_function("run_on_pool", code)
    return PoolFunctions(dispatch, function(code, "stop", 1), function(code, "worker_loop", 3), run_on_pool)


class ThreadPool:
    """Some threads beside the caller's, and the control block they share.

    Each thread refers to the pool for as long as it runs, so that the memory it waits on is not freed before it ends.

    Attributes:
        workers: How many threads there are beside the caller's.
        control: The address of the control block.
    """

    def __init__(self, workers: int) -> None:
        self._functions = load_pool()
        self.workers = workers
        self._control = aligned_empty((len(CONTROL),), np.int64)
        self._control[:] = 0
        self.control: int = self._control.ctypes.data
        oversubscribed = _is_oversubscribed(workers + 1)
        self._control[CONTROL.index["spins"]] = _OVERSUBSCRIBED_SPINS if oversubscribed else _IDLE_SPINS
        self._cpu_of_thread = np.full(workers + 1, -1, np.int64)
        self._control[CONTROL.index["cpu_of_thread"]] = 0 if oversubscribed else self._cpu_of_thread.ctypes.data
        self._control[CONTROL.index["workers"]] = workers
        self._control[CONTROL.index["caller_spins"]] = _OVERSUBSCRIBED_SPINS if oversubscribed else _BUSY_SPINS
        self._threads: list[threading.Thread] = []
        try:
            for tid in range(1, workers + 1):
                thread = threading.Thread(target=self._run_worker, args=(tid,), name=f"fusedrnn-{tid}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:  # no more threads in the system, or an interrupt: leave no incomplete pool behind
            self._functions.stop(self.control)
            raise

    def _run_worker(self, tid: int) -> None:
        self._functions.worker_loop(self.control, tid, 0)

    @property
    def memory(self) -> tuple[object, ...]:
        """The arrays that hold the control block and what it refers to."""
        return self._control, self._cpu_of_thread

    @property
    def is_busy(self) -> bool:
        """Whether a job runs."""
        return bool(self._control[CONTROL.index["busy"]])

    def stop(self) -> None:
        """End the threads and wait until they have ended. If the wait is interrupted they end all the same."""
        self._functions.stop(self.control)
        for thread in self._threads:
            thread.join()


class ThreadTeam:
    """The threads that a call may use: the caller's and those of the pool.

    Attributes:
        threads: Their number.
        spins: Iterations of a waiting loop before a thread of a job sleeps.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.spins = _OVERSUBSCRIBED_SPINS if _is_oversubscribed(threads) else _BUSY_SPINS
        # When the last call ended; when the last one on several threads did; how many calls in a row have been close.
        self._call_ended, self._job_ended, self._num_close = 0.0, 0.0, 0

    def note_call_start(self, now: float) -> bool:
        """Note that a call starts. Returns whether the threads still spin, or should, after so many close calls."""
        self._num_close = self._num_close + 1 if now - self._call_ended < CLOSE else 0
        return now - self._job_ended < SPINNING or self._num_close >= MANY_CLOSE

    def note_call_end(self, num_threads: int, now: float) -> None:
        """A call on that many threads has ended."""
        self._call_ended = now
        if num_threads > 1:
            self._job_ended = now

    def run(self, job: Job, arguments: int, num_threads: int) -> bool:
        """Run ``job(arguments, tid)`` on that many threads and wait for all; False if the threads are not free now."""
        functions, cell = load_pool(), control_cell()
        values = cell, self.threads, address(functions.dispatch), address(job), arguments, num_threads
        status = functions.run_on_pool(*values)
        if status == NO_POOL and ensure_pool(self.threads):
            status = functions.run_on_pool(*values)
        return status == RAN


@lru_cache(maxsize=64)
def pool_team(threads: int) -> ThreadTeam:
    """The team of the caller's thread and ``threads - 1`` of the pool."""
    return ThreadTeam(threads)


class PoolLease:
    """Permission to change the pool while this object lives: it is freed with its holder's frame if that fails."""


_pool: ThreadPool | None = None
_lock = Lock()
_lease: weakref.ref[PoolLease] | None = None


def try_acquire_pool() -> PoolLease | None:
    """Permission to change the pool; None while another call has it, or a job runs.

    The other call may be an outer call of this thread, which a signal handler interrupted.
    """
    global _lease
    with _lock:
        if (_lease is not None and _lease() is not None) or (_pool is not None and _pool.is_busy):
            return None
        lease = PoolLease()
        _lease = weakref.ref(lease)
        return lease


def release_pool(lease: PoolLease) -> None:
    """End the lease now, since a traceback may keep the frame that holds it."""
    global _lease
    with _lock:
        if _lease is not None and _lease() is lease:
            _lease = None


def ensure_pool(threads: int) -> bool:
    """Give the process a pool of that many threads, the caller's included. A pool of another size is replaced.

    Returns whether there is one: not if a job runs on another, or, with a warning, if the system has no more threads.
    """
    global _pool
    lease = try_acquire_pool()
    if lease is None:
        return False
    try:
        if _pool is None or _pool.workers != threads - 1:
            _shutdown_pool()
            _pool = ThreadPool(threads - 1)
        # Also if an interrupt came between the two the last time.
        publish_pool(_pool.control, _pool.memory)
    except RuntimeError as error:
        message = f"{threads} threads cannot be started ({error}): calls run on one"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    finally:
        release_pool(lease)
    return _pool is not None


def _shutdown_pool() -> None:
    global _pool
    pool, _pool = _pool, None  # in this order: an interrupt must not leave a pool that has been stopped
    publish_pool(0)
    if pool is not None:
        pool.stop()


def _at_exit() -> None:
    lease = try_acquire_pool()
    if lease is not None:
        _shutdown_pool()


def _after_fork_in_child() -> None:
    """Forget the pool, whose threads do not exist here, and the default, since the processors may differ here."""
    global _pool, _lease
    _pool, _lease = None, None
    publish_pool(0)
    _default.cache_clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
