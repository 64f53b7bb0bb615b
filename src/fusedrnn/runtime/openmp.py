"""A team of threads of an OpenMP runtime, in a process where others use that runtime too.

OpenMP's threads spin for some milliseconds after each job. The threads of a separate pool would have to compete with
them for the processors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from fusedrnn.jit.builder import I32, I64, Function, Module
from fusedrnn.jit.c_function import c_function, emit_c_function
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import Job, address, load, load_once
from fusedrnn.jit.struct import Struct
from fusedrnn.runtime.thread_pool import ThreadTeam

_OMP_JOB = Struct("job", "arguments", "num_threads", "omp_get_num_threads", "omp_get_thread_num", "failed")
"""A job, its arguments and number of threads; functions of the runtime; whether the runtime granted fewer threads."""


class OpenMP:
    """The functions of an OpenMP runtime, under GNU's names, which other runtimes have too.

    Args:
        library: A library that has these functions, or was linked with one that has them.

    Attributes:
        parallel, get_num_threads, get_thread_num: The addresses of the functions.

    Raises:
        AttributeError: If it does not have them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.parallel, self.get_num_threads, self.get_thread_num = (
            address(function)
            for function in (library.GOMP_parallel, library.omp_get_num_threads, library.omp_get_thread_num)
        )


class OpenMPTeam(ThreadTeam):
    """The caller's thread and those of the runtime."""

    def __init__(self, threads: int, runtime: OpenMP) -> None:
        super().__init__(threads)
        self._run, run_share = _load()
        self._functions = runtime.parallel, runtime.get_num_threads, runtime.get_thread_num, run_share

    def run(self, job: Job, arguments: int, num_threads: int) -> bool:
        """Run ``job(arguments, tid)`` on that many threads and wait for all; False if the runtime grants fewer."""
        return bool(self._run(*self._functions, address(job), arguments, num_threads))


@load_once()
def _load() -> tuple[Callable[..., int], int]:
    """``run_in_parallel`` as a builtin function of the interpreter, and the address of ``run_share``."""
    code = load("openmp", current_target(), build_openmp)
    return c_function("run_in_parallel", code), code.address("run_share")


def build_openmp() -> Module:
    """The module of ``run_in_parallel`` and ``run_share``."""
    module = Module("openmp")
    _emit_run_share(module)
    emit_c_function(module, _emit_run_in_parallel(module))
    return module


def _emit_run_in_parallel(module: Module) -> Function:
    """A function that starts a parallel region for a job; it returns 1 if the job has run, else 0.

    Its arguments are the addresses of three functions of the runtime and of ``run_share``; then the job, its arguments
    and the number of threads.
    """
    names = ["parallel", "get_num_threads", "get_thread_num", "run_share", "job", "arguments", "num_threads"]
    f = Function(module, "run_in_parallel", names, returns=True)
    parallel, get_num_threads, get_thread_num, run_share, job, arguments, num_threads = f.arguments
    omp_job = f.alloca(_OMP_JOB.size)
    fields = {
        "job": job, "arguments": arguments, "num_threads": num_threads, "omp_get_num_threads": get_num_threads,
        "omp_get_thread_num": get_thread_num, "failed": f.constant(0),
    }  # fmt: skip
    for name, value in fields.items():
        f.store(value, omp_job + _OMP_JOB.offset(name))
    f.call_address(parallel, run_share, omp_job, num_threads, f.constant(0))
    f.ret(_OMP_JOB.read(f, omp_job).failed.is_zero.zext(I64))
    return f


def _emit_run_share(module: Module) -> None:
    """``run_share(omp_job)``, which every thread of a parallel region calls."""
    f = Function(module, "run_share", ["omp_job"], exported=True)
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
