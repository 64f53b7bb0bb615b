"""The FMA peak of a run: the best of short samples that are taken between the turns of the contenders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fusedrnn.runtime.peak import measure_peak, sample_peak

MEASUREMENTS = 3
"""Number of times that a row is measured at most if its share of the peak is above 100 %."""

Measured = TypeVar("Measured", bound=Any)
"""A dataclass with a field ``peak``, in GFLOP/s or None."""
Turns = TypeVar("Turns")
"""The measurements of one call of ``take_turns``."""


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


def until_plausible(peak: RunPeak, take_turns: Callable[[], Turns], fastest: Callable[[Turns], float]) -> Turns:
    """Call ``take_turns`` until the ``fastest`` rate in GFLOP/s of its result is not above the peak.

    A rate above the peak means that one of the two is wrong, so the peak is measured again, and then the turns, at
    most :data:`MEASUREMENTS` times. If the rate stays above the peak, :func:`share_of` gives no share.
    """
    for _ in range(MEASUREMENTS):
        turns = take_turns()
        if fastest(turns) > peak.gflops:
            peak.measure()
        if fastest(turns) <= peak.gflops:
            break
    return turns


def share_of(gflops: float, peak: float | None) -> float | None:
    """A rate as a share of the peak; None without a peak, or if the rate is above it."""
    return gflops / peak if peak and gflops <= peak else None


def rejection(gflops: float, peak: float | None) -> str | None:
    """Why a rate has no share of a measured peak, or None."""
    if not peak or gflops <= peak:
        return None
    return (
        f"no share of the FMA peak: {gflops:.1f} GFLOP/s are above the {peak:.1f} GFLOP/s measured as the peak, "
        f"in {MEASUREMENTS} measurements"
    )


def at_best_peak(measured: Sequence[Measured]) -> list[Measured]:
    """The same rows with the best peak of the run instead of the best at the time of each row.

    All rows must have the same dtype and number of threads.
    """
    best = max((row.peak for row in measured if row.peak), default=None)
    return [replace(row, peak=best) if row.peak else row for row in measured]
