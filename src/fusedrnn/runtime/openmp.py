"""A team of threads of an OpenMP runtime, in a process where others use that runtime too.

OpenMP's threads spin for some milliseconds after each job. The threads of a separate pool would have to compete with
them for the processors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from fusedrnn.jit.builder import I32, I64, Function, Module
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import Job, address, function, load, load_once
from fusedrnn.jit.struct import Struct
from fusedrnn.runtime.thread_pool import ThreadTeam

_OMP_JOB = Struct("job", "arguments", "num_threads", "omp_get_num_threads", "omp_get_thread_num", "failed")
"""A job, its arguments and number of threads; functions of the runtime; whether the runtime granted fewer threads."""


class OpenMP:
    """The functions of an OpenMP runtime, under GNU's names, which other runtimes have too.

    Args:
        library: A library that has these functions, or was linked with one that has them.

    Raises:
        AttributeError: If it does not have them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.parallel: Any = library.GOMP_parallel
        self.parallel.restype = None
        self.parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        functions = library.omp_get_num_threads, library.omp_get_thread_num
        self.addresses = tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)


class OpenMPTeam(ThreadTeam):
    """The caller's thread and those of the runtime."""

    def __init__(self, threads: int, runtime: OpenMP) -> None:
        super().__init__(threads)
        self._runtime = runtime
        self._run_job = _load_run_job()

    def run(self, job: Job, arguments: int, num_threads: int) -> bool:
        """Run ``job(arguments, tid)`` on that many threads and wait for all; False if the runtime grants fewer."""
        values = address(job), arguments, num_threads, *self._runtime.addresses, 0
        omp_job = (ctypes.c_int64 * len(_OMP_JOB))(*values)
        self._runtime.parallel(self._run_job, ctypes.addressof(omp_job), num_threads, 0)
        return not omp_job[_OMP_JOB.index["failed"]]


@load_once()
def _load_run_job() -> Callable[..., None]:
    return function(load("openmp", current_target(), build_run_job), "run_job", 1)


def build_run_job() -> Module:
    """The module of ``run_job(omp_job)``, which every thread of a parallel region calls."""
    module = Module("openmp")
    f = Function(module, "run_job", ["omp_job"], exported=True)
    (omp_job,) = f.arguments
    fields = _OMP_JOB.read(f, omp_job)
    granted = f.call_address(fields.omp_get_num_threads, returns=I32).sext(I64)
    with f.if_else(granted.equals(fields.num_threads)) as (enough, too_few):
        with enough:
            tid = f.call_address(fields.omp_get_thread_num, returns=I32).sext(I64)
            f.call_address(fields.job, fields.arguments, tid)
        with too_few:
            f.store(1, omp_job + _OMP_JOB.offset("failed"))
    f.ret()
    return module
