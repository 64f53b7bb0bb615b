"""The ceilings of this machine, measured: the FMA peak, and how fast caches and memory are read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from fusedrnn.codegen.peak import CHAINS, READING, RESULT_BYTES, TURNS, build_peak, build_reading, reading_group
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
    seconds = _timed(machine.function(code, "peak", 2), results.ctypes.data, threads, _ROUNDS)
    operations = 2 * CHAINS * target.lanes(dtype) * TURNS * threads
    return operations / statistics.median(seconds) / 1e9


def measure_reading(size: int, threads: int, read: int, rounds: int) -> float:
    """GB/s that so many threads read together, each some bytes of its own, again and again until it has read enough.

    Args:
        size: Bytes of a thread's array.
        threads: Their number.
        read: Bytes that a thread reads in a round, at least.
        rounds: How often to measure; the best counts.

    Raises:
        RuntimeError: If another call has the threads.
    """
    target = current()
    group = reading_group(target)
    size = max(1, size // group) * group
    code = machine.load("reading", target, lambda: build_reading(target))
    arrays, results = aligned_empty((threads * size,), np.uint8), aligned_empty((threads * group,), np.uint8)
    arrays[:] = 0
    turns = -(-read // size)
    fields = {"arrays": arrays.ctypes.data, "size": size, "turns": turns, "results": results.ctypes.data}
    call = np.array([fields[name] for name in READING.names], np.int64)
    seconds = _timed(machine.function(code, "read", 2), call.ctypes.data, threads, rounds)
    return threads * size * turns / min(seconds) / 1e9


def _timed(job: Callable[..., None], call: int, threads: int, rounds: int) -> list[float]:
    """Seconds of each of some rounds of a job on that many threads."""
    seconds = []
    team = Team(threads)
    for _ in range(rounds):
        began = time.perf_counter()
        if threads == 1:
            job(call, 0)
        elif not team.run(job, call, threads):
            raise RuntimeError(f"{threads} threads cannot be measured while another call uses them")
        seconds.append(time.perf_counter() - began)
    return seconds
