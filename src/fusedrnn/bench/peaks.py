"""The peaks of a run: the best of short samples that are taken between the turns of the contenders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from fusedrnn.bench.rows import MEASUREMENTS, AnyRow
from fusedrnn.bench.timing import Timing
from fusedrnn.jit.host import current_target
from fusedrnn.runtime.peak import measure_peak, sample_peak
from fusedrnn.runtime.peak_instructions import Instruction, instruction_of

Turns = tuple[dict[str, Timing], dict[str, Any]]
"""What :func:`fusedrnn.bench.timing.alternate` returns: timings and results, by contender."""


class RunPeak:
    """The best rates of multiply-adds that a run has measured so far, on one number of threads.

    Args:
        dtype: The dtype of the workloads.
        threads: The number of threads.
        formats: Other formats of GEMM operands that contenders use.
    """

    def __init__(self, dtype: str, threads: int, formats: Iterable[str] = ()) -> None:
        self._dtype, self._threads = dtype, threads
        target, instructions = current_target(), dict[Instruction, str]()
        # Formats with the same instruction have one peak, which has the name of the first of them.
        self._first = {
            number_format: instructions.setdefault(instruction_of(number_format, target), number_format)
            for number_format in (dtype, *formats)
        }
        self._rates = dict.fromkeys(instructions.values(), 0.0)
        self.measure()

    @property
    def gflops(self) -> float:
        """The rate of fused multiply-adds of the dtype, in GFLOP/s."""
        return self._rates[self._dtype]

    @property
    def by_format(self) -> dict[str, float]:
        """The rates of the other formats, in GFLOP/s."""
        others = {number_format: first for number_format, first in self._first.items() if number_format != self._dtype}
        return {number_format: self._rates[first] for number_format, first in others.items()}

    def sample(self) -> float:
        """Take a short sample, of one or two milliseconds, of each format.

        Returns:
            The rate now as a share of the best rate, of the format for which it is lowest.
        """
        shares = [1.0]
        for number_format, best in self._rates.items():
            rate = sample_peak(number_format, self._threads).gflops
            self._rates[number_format] = best = max(best, rate)
            shares.append(rate / best)
        return min(shares)

    def measure(self) -> None:
        """Measure the peaks thoroughly, with :func:`fusedrnn.runtime.peak.measure_peak`."""
        for number_format, rate in self._rates.items():
            self._rates[number_format] = max(rate, measure_peak(number_format, self._threads))


def measure(row: AnyRow, peak: RunPeak, take_turns: Callable[[], Turns]) -> tuple[AnyRow, dict[str, Any]]:
    """The row with its timings and the peak, and the results of the contenders.

    A rate above the peak means that the rate or the peak is wrong. Then the peak and the turns are measured again, at
    most :data:`MEASUREMENTS` times. A rate that stays above the peak has no share of it.
    """
    for _ in range(MEASUREMENTS):
        timings, results = take_turns()
        row = _with_peak(replace(row, timings=timings), peak)
        if row.rejected_shares:
            peak.measure()
            row = _with_peak(row, peak)
        if not row.rejected_shares:
            break
    return row, results


def _with_peak(row: AnyRow, peak: RunPeak) -> AnyRow:
    return replace(row, peak=peak.gflops, peaks=peak.by_format)


def at_best_peak(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """The same rows, with the best peak of the whole run instead of the best peak until each row.

    All rows must have the same dtype and number of threads.
    """
    best = max((row.peak for row in rows if row.peak), default=None)
    best_of = {name: max(row.peaks.get(name, 0.0) for row in rows) for row in rows for name in row.peaks}
    return [replace(row, peak=best, peaks=best_of if row.peaks else {}) if row.peak else row for row in rows]
