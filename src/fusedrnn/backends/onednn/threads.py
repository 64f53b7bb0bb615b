"""How many threads oneDNN runs on: as its runtime lets itself be told."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from fusedrnn.backends.onednn.library import OPENMP, SEQUENTIAL, Library

_PARALLELISM = 0
"""The parameter of TBB's global control that bounds the threads of the process."""

_forked = False


def _child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_child)


def allowed(asked: int) -> int:
    """Threads for a call that may use ``asked``: one in a forked child, whose runtime has lost its others."""
    return 1 if _forked else asked


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
