"""The ceilings of this machine, measured: the FMA peak, and how fast caches and memory are read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusedrnn import env
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import Job, function, load, load_once
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.sync import BARRIER_BYTES
from fusedrnn.jit.target import Target
from fusedrnn.runtime.buffers import aligned_empty
from fusedrnn.runtime.peak_kernel import (
    CHAINS,
    PEAK,
    PROCESSORS_AT,
    READING,
    RESULT_BYTES,
    TURNS,
    build_peak,
    build_reading,
    reading_group,
)
from fusedrnn.runtime.thread_pool import ThreadTeam

_SAMPLES = 24
"""Samples of a peak that is measured for itself: some 30 ms, in which a processor reaches its full frequency."""

_ROUNDS = 3
"""Rounds of a sample, half a millisecond each: shorter than a time slice, so that one of them is undisturbed."""

_TRIES = 40
"""Samples at most until the threads have run on as many processors as they may use."""


@dataclass(frozen=True)
class PeakSample:
    """A short measurement of the FMA peak.

    Attributes:
        gflops: The rate of the threads together, of the best round.
        spread: Whether each thread had a processor of its own in that round, or all that the process may use were in
            use, or the system does not tell.
    """

    gflops: float
    spread: bool


Sampler = Callable[[str, int], PeakSample]


def measure_peak(dtype: str = "float32", threads: int = 1, sample: Sampler | None = None) -> float:
    """GFLOP/s of that many threads that only multiply and add, in the vectors of the target in force.

    The best of some samples counts: other processes and low frequencies only ever lower a rate. Samples in which
    threads share a processor while another is free do not count, if there are others within a bounded number.

    Raises:
        RuntimeError: If another call has the threads.
    """
    sample = sample_peak if sample is None else sample
    samples: list[PeakSample] = []
    while len(samples) < _SAMPLES or (len(samples) < _TRIES and not any(each.spread for each in samples)):
        samples.append(sample(dtype, threads))
    return max([each.gflops for each in samples if each.spread] or [each.gflops for each in samples])


def sample_peak(dtype: str, threads: int) -> PeakSample:
    """A short measurement, of a millisecond or two.

    Raises:
        RuntimeError: If another call has the threads.
    """
    target = current_target()
    job = _peak_job(dtype, target)
    results = aligned_empty(((threads + 1) * RESULT_BYTES,), np.uint8)
    results[:] = 0
    timed = _Timed(PEAK, threads, results=results.ctypes.data)
    operations = 2 * CHAINS * target.lanes(dtype) * TURNS * threads
    samples = []
    for _ in range(_ROUNDS):
        seconds = timed.run(job)
        samples.append(PeakSample(operations / seconds / 1e9, is_spread(_processors(results, threads), threads)))
    return max(samples, key=lambda each: (each.spread, each.gflops))


@load_once(8)
def _peak_job(dtype: str, target: Target) -> Job:
    code = load(f"peak_{dtype}", target, build_peak, dtype, target)
    return function(code, "peak", 2)


def _processors(results: NDArray[np.uint8], threads: int) -> NDArray[np.int64]:
    """Numbers of the processors that each thread was on at its beginning and its end, (threads, 2)."""
    of_members = results.reshape(threads + 1, RESULT_BYTES)[1:, PROCESSORS_AT : PROCESSORS_AT + 16]
    return np.ascontiguousarray(of_members).view(np.int64)


def is_spread(processors: NDArray[np.int64], threads: int) -> bool:
    """Whether threads that ran on these processors, (threads, 2), had each its own, as far as there are so many.

    Numbers are -1 where the system does not tell.
    """
    if (processors < 0).any():
        return True
    available = min(threads, env.processors())
    return all(len(np.unique(column)) >= available for column in processors.T)


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
    target = current_target()
    group = reading_group(target)
    size = max(1, size // group) * group
    code = load("reading", target, build_reading, target)
    arrays, results = aligned_empty((threads * size,), np.uint8), aligned_empty((threads * group,), np.uint8)
    arrays[:] = 0
    turns = -(-read // size)
    job = function(code, "read", 2)
    timed = _Timed(
        READING, threads, arrays=arrays.ctypes.data, size=size, turns=turns, results=results.ctypes.data
    )
    seconds = [timed.run(job) for _ in range(rounds)]
    return threads * size * turns / min(seconds) / 1e9


class _Timed:
    """A job on some threads that meet before they begin; ``fields`` are what its record tells it besides."""

    def __init__(self, record: Struct, threads: int, **fields: int) -> None:
        self._threads, self._team = threads, ThreadTeam(threads)
        self._barrier = aligned_empty((BARRIER_BYTES,), np.uint8)
        self._barrier[:] = 0
        fields |= {"barrier": self._barrier.ctypes.data, "members": threads, "spins": self._team.spins}
        self._call = np.array([fields[name] for name in record.names], np.int64)

    def run(self, job: Callable[..., None]) -> float:
        """Seconds of a round."""
        began = time.perf_counter()
        if self._threads == 1:
            job(self._call.ctypes.data, 0)
        elif not self._team.run(job, self._call.ctypes.data, self._threads):
            raise RuntimeError(f"{self._threads} threads cannot be measured while another call uses them")
        return time.perf_counter() - began
