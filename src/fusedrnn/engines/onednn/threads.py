"""Limits the number of threads that oneDNN uses, for each of its CPU runtimes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from fusedrnn.engines.onednn.library import OPENMP, SEQUENTIAL, SYCL, Library

_TBB_PARALLELISM = 0
"""The parameter of TBB's global control that limits the threads of the process."""

_used = _used_before_fork = False


def _after_fork() -> None:
    global _used_before_fork
    _used_before_fork = _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _GlobalControl(ctypes.Structure):
    """``tbb::global_control``, whose layout is part of TBB's binary interface."""

    _fields_ = (("value", ctypes.c_size_t), ("reserved", ctypes.c_ssize_t), ("parameter", ctypes.c_int))


def thread_limit(library: Library) -> Callable[[int], AbstractContextManager[int]]:
    """Return a function that takes a number of threads and returns a context which limits the library to it.

    The context's value is the number that the library may use: 1 in a forked child, which does not inherit the
    runtime's other threads. OpenMP limits the calling thread only. TBB limits the whole process, to the lowest of the
    active limits, and still splits work into one part per processor. A sequential library needs no limit.

    Raises:
        ImportError: If the library's runtime has no functions to limit threads.
        NotImplementedError: In the returned function's context, if the runtime cannot run in a forked child.
    """
    global _used
    _used = True
    runtimes = {SEQUENTIAL: _sequential, OPENMP: _openmp}
    try:
        begin, end = runtimes.get(library.runtime, _tbb)(library.cdll)
    except AttributeError as error:
        raise ImportError(f"the threads of {library.path} cannot be limited: {error}") from None

    @contextmanager
    def limit(num_threads: int) -> Iterator[int]:
        if _used_before_fork and library.runtime == SYCL:
            raise NotImplementedError(
                "engine 'onednn' runs on SYCL, which does not work in a child that was forked after its first use; "
                "start processes with the method spawn"
            )
        allowed = 1 if _used_before_fork else num_threads
        state = begin(allowed)
        try:
            yield allowed
        finally:
            end(state)

    return limit


# For each runtime: a function that begins a limit and returns a state, and one that takes the state and ends the limit.
_Limit = tuple[Callable[[int], Any], Callable[[Any], object]]


def _sequential(cdll: ctypes.CDLL) -> _Limit:
    return lambda num_threads: None, lambda state: None


def _openmp(cdll: ctypes.CDLL) -> _Limit:
    # A process may hold several OpenMP runtimes: take the functions from the one of this library.
    get, set_ = cdll.omp_get_max_threads, cdll.omp_set_num_threads

    def begin(num_threads: int) -> int:
        before: int = get()
        set_(num_threads)
        return before

    return begin, set_


def _tbb(cdll: ctypes.CDLL) -> _Limit:
    create = cdll["_ZN3tbb6detail2r16createERNS0_2d114global_controlE"]
    destroy = cdll["_ZN3tbb6detail2r17destroyERNS0_2d114global_controlE"]

    def begin(num_threads: int) -> _GlobalControl:
        control = _GlobalControl(num_threads, 0, _TBB_PARALLELISM)
        create(ctypes.byref(control))
        return control

    return begin, lambda control: destroy(ctypes.byref(control))
