"""The FMA peak of this machine, measured: the ceiling that every figure is a share of."""

from __future__ import annotations

import statistics
import time

import numpy as np

from fusedrnn.codegen.peak import CHAINS, RESULT_BYTES, TURNS, build_peak
from fusedrnn.codegen.target import current
from fusedrnn.engine import machine
from fusedrnn.engine.threads import Team
from fusedrnn.engine.workspace import aligned_empty

_ROUNDS = 15


def measure_peak(dtype: str = "float32", threads: int = 1) -> float:
    """GFLOP/s of that many threads that only multiply and add, in the vectors of the target in force.

    Raises:
        RuntimeError: If another call has the threads.
    """
    target = current()
    code = machine.load(f"peak_{dtype}", target, lambda: build_peak(dtype, target))
    results = aligned_empty(((threads + 1) * RESULT_BYTES,), np.uint8)
    results[:] = 0
    job = machine.function(code, "peak", 2)
    seconds = []
    team = Team(threads)
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        if threads == 1:
            job(results.ctypes.data, 0)
        elif not team.run(job, results.ctypes.data, threads):
            raise RuntimeError(f"the peak of {threads} threads cannot be measured while another call uses them")
        seconds.append(time.perf_counter() - began)
    operations = 2 * CHAINS * target.lanes(dtype) * TURNS * threads
    return operations / statistics.median(seconds) / 1e9
