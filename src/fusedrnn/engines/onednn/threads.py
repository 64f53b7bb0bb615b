"""How many threads oneDNN runs on: what its runtime can be told."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from fusedrnn.engines.onednn.library import OPENMP, SEQUENTIAL, SYCL, Library

_PARALLELISM = 0
"""The parameter of TBB's global control that bounds the threads of the process."""

_in_use = _left_behind = False


def _child() -> None:
    global _left_behind
    _left_behind = _in_use


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_child)


def allowed(library: Library, asked: int) -> int:
    """Threads for a call that may use ``asked``: one in a forked child, where a runtime's other threads are not.

    Raises:
        NotImplementedError: If the runtime cannot go on in such a child at all.
    """
    if not _left_behind:
        return asked
    if library.runtime == SYCL:
        raise NotImplementedError(
            "engine 'onednn' runs on SYCL, which a child forked after its first use cannot go on with; "
            "start processes by spawn"
        )
    return 1


class _GlobalControl(ctypes.Structure):
    """``tbb::global_control``, whose layout is part of TBB's binary interface."""

    _fields_ = (("value", ctypes.c_size_t), ("reserved", ctypes.c_ssize_t), ("parameter", ctypes.c_int))


def bounds(library: Library) -> Callable[[int], AbstractContextManager[None]]:
    """What makes a context in which the library uses no more than so many threads.

    OpenMP is told for the calling thread alone. TBB knows a bound for the process alone: the lowest of those in force,
    and it still cuts work into as many parts as there are processors. A sequential library has nothing to be told.

    Raises:
        ImportError: If the library's runtime cannot be told.
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
    # Looked up in the library's own runtime, of which a process may have several.
    get, set_ = library.cdll.omp_get_max_threads, library.cdll.omp_set_num_threads

    @contextmanager
    def bounded(count: int) -> Iterator[None]:
        before = get()
        set_(count)
        try:
            yield
        finally:
            set_(before)

    return bounded


def _tbb(library: Library) -> Callable[[int], AbstractContextManager[None]]:
    create = library.cdll["_ZN3tbb6detail2r16createERNS0_2d114global_controlE"]
    destroy = library.cdll["_ZN3tbb6detail2r17destroyERNS0_2d114global_controlE"]

    @contextmanager
    def bounded(count: int) -> Iterator[None]:
        control = _GlobalControl(count, 0, _PARALLELISM)
        create(ctypes.byref(control))
        try:
            yield
        finally:
            destroy(ctypes.byref(control))

    return bounded
