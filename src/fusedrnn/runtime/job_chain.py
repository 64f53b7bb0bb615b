"""Several jobs as one: all threads run the first, wait for each other, and run the next."""

from __future__ import annotations

from fusedrnn.jit.builder import Function, Module
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import Job, function, load, load_once
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.sync import emit_barrier, emit_wait

CHAIN = Struct("num_jobs", "num_threads", "barrier", "spins")
"""The arguments of a chain; its jobs follow. The barrier is zero at first."""
CHAINED_JOB = Struct("function", "arguments")
"""A job of a chain. All threads call it, and those that it does not need must return at once."""


@load_once()
def load_job_chain() -> Job:
    """The job that runs a chain."""
    return function(load("job_chain", current_target(), build_job_chain), "run_chain", 2)


def build_job_chain() -> Module:
    """The module of ``run_chain(chain, thread)``."""
    module = Module("job_chain")
    barrier = emit_barrier(module, emit_wait(module))
    f = Function(module, "run_chain", ["chain", "thread"], exported=True)
    chain, thread = f.arguments
    c = CHAIN.read(f, chain)
    with f.loop(0, c.num_jobs) as index:
        with f.if_((index > 0) & (c.num_threads > 1)):
            f.call(barrier, c.barrier, c.num_threads, c.spins)
        job = CHAINED_JOB.read(f, chain + CHAIN.size + index * CHAINED_JOB.size)
        f.call_address(job.function, job.arguments, thread)
    f.ret()
    return module
