"""Limits the number of threads that oneDNN uses, for each of its CPU runtimes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from fusedrnn.engines.onednn.library import OPENMP, SEQUENTIAL, SYCL, Library

_PARALLELISM = 0
"""The parameter of TBB's global control that limits the threads of the process."""

_in_use = _left_behind = False


def _child() -> None:
    global _left_behind
    _left_behind = _in_use


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_child)


def clamp_threads(library: Library, num_threads: int) -> int:
    """``num_threads``, or 1 in a forked child, which does not inherit the runtime's other threads.

    Raises:
        NotImplementedError: If the runtime cannot run in a forked child.
    """
    if not _left_behind:
        return num_threads
    if library.runtime == SYCL:
        raise NotImplementedError(
            "engine 'onednn' runs on SYCL, which a child forked after its first use cannot go on with; "
            "start processes by spawn"
        )
    return 1


class _GlobalControl(ctypes.Structure):
    """``tbb::global_control``, whose layout is part of TBB's binary interface."""

    _fields_ = (("value", ctypes.c_size_t), ("reserved", ctypes.c_ssize_t), ("parameter", ctypes.c_int))


def thread_limit(library: Library) -> Callable[[int], AbstractContextManager[None]]:
    """Return a function that takes a number of threads and returns a context which limits the library to it.

    OpenMP limits the calling thread only. TBB limits the whole process, to the lowest of the active limits, and still
    splits work into one part per processor. A sequential library needs no limit.

    Raises:
        ImportError: If the library's runtime has no functions to limit threads.
    """
    global _in_use
    _in_use = True
    if library.runtime == SEQUENTIAL:
        return lambda count: nullcontext()
    try:
        return _openmp(library) if library.runtime == OPENMP else _tbb(library)
    except AttributeError as error:
        raise ImportError(f"the threads of {library.path} cannot be bounded: {error}") from None


def _openmp(library: Library) -> Callable[[int], AbstractContextManager[None]]:
    # A process may hold several OpenMP runtimes: take the functions from the one of this library.
    get, set_ = library.cdll.omp_get_max_threads, library.cdll.omp_set_num_threads

    @contextmanager
    def limited(count: int) -> Iterator[None]:
        before = get()
        set_(count)
        try:
            yield
        finally:
            set_(before)

    return limited


def _tbb(library: Library) -> Callable[[int], AbstractContextManager[None]]:
    create = library.cdll["_ZN3tbb6detail2r16createERNS0_2d114global_controlE"]
    destroy = library.cdll["_ZN3tbb6detail2r17destroyERNS0_2d114global_controlE"]

    @contextmanager
    def limited(count: int) -> Iterator[None]:
        control = _GlobalControl(count, 0, _PARALLELISM)
        create(ctypes.byref(control))
        try:
            yield
        finally:
            destroy(ctypes.byref(control))

    return limited
