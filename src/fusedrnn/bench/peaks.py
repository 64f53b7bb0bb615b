"""The FMA peak of a run: the best of short samples that are taken between the turns of the contenders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fusedrnn.bench.rows import MEASUREMENTS, AnyRow
from fusedrnn.bench.timing import Timing
from fusedrnn.runtime.peak import measure_peak, sample_peak

Turns = tuple[dict[str, Timing], dict[str, Any]]
"""What :func:`fusedrnn.bench.timing.alternate` returns: timings and results, by contender."""


class RunPeak:
    """The best rate of fused multiply-adds that a run has measured so far, for one dtype and number of threads.

    Attributes:
        gflops: That rate, in GFLOP/s.
    """

    def __init__(self, dtype: str, threads: int) -> None:
        self._dtype, self._threads = dtype, threads
        self.gflops = 0.0
        self.measure()

    def sample(self) -> None:
        """Take a short sample, of one or two milliseconds."""
        self.gflops = max(self.gflops, sample_peak(self._dtype, self._threads).gflops)

    def measure(self) -> None:
        """Measure the peak thoroughly, with :func:`fusedrnn.runtime.peak.measure_peak`."""
        self.gflops = max(self.gflops, measure_peak(self._dtype, self._threads))


def measure(row: AnyRow, peak: RunPeak, take_turns: Callable[[], Turns]) -> tuple[AnyRow, dict[str, Any]]:
    """The row with its timings and the peak, and the results of the contenders.

    A rate above the peak means that one of the two is wrong, so the peak is measured again, and then the turns, at most
    :data:`MEASUREMENTS` times. A rate that stays above the peak has no share of it.
    """
    for _ in range(MEASUREMENTS):
        timings, results = take_turns()
        row = replace(row, timings=timings)
        fastest = max(map(row.gflops, timings), default=0.0)
        if fastest > peak.gflops:
            peak.measure()
        if fastest <= peak.gflops:
            break
    return replace(row, peak=peak.gflops), results


def at_best_peak(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """The same rows with the best peak of the run instead of the best at the time of each row.

    All rows must have the same dtype and number of threads.
    """
    best = max((row.peak for row in rows if row.peak), default=None)
    return [replace(row, peak=best) if row.peak else row for row in rows]
