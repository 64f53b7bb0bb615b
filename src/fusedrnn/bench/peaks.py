"""The FMA peak of a run: the best of short samples that are taken between the turns of the contenders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fusedrnn.runtime.peak import measure_peak, sample_peak

MEASUREMENTS = 3
"""How often a row is measured at most whose share of the peak comes out above 100 %."""

Measured = TypeVar("Measured", bound=Any)
"""A dataclass with a field ``peak``, in GFLOP/s or None."""
Turns = TypeVar("Turns")
"""What was measured in turns."""


class RunPeak:
    """The best rate of multiply-adds that a run has seen so far, for one dtype and number of threads.

    Attributes:
        gflops: That rate, in GFLOP/s.
    """

    def __init__(self, dtype: str, threads: int) -> None:
        self._dtype, self._threads = dtype, threads
        self.gflops = 0.0
        self.measure()

    def sample(self) -> None:
        """Take a short sample, a millisecond or two."""
        self.gflops = max(self.gflops, sample_peak(self._dtype, self._threads).gflops)

    def measure(self) -> None:
        """Measure it for itself, as :func:`fusedrnn.runtime.peak.measure_peak` does."""
        self.gflops = max(self.gflops, measure_peak(self._dtype, self._threads))


def until_plausible(peak: RunPeak, take_turns: Callable[[], Turns], fastest: Callable[[Turns], float]) -> Turns:
    """What ``take_turns`` measures, a rate of which in GFLOP/s, the ``fastest``, is not above the peak.

    Where it is, the peak is measured again, and if that is not enough the rest too, so often that there are
    :data:`MEASUREMENTS` of it at most. Then the last stands, and :func:`share_of` refuses the share.
    """
    for _ in range(MEASUREMENTS):
        measured = take_turns()
        if fastest(measured) > peak.gflops:
            peak.measure()
        if fastest(measured) <= peak.gflops:
            break
    return measured


def share_of(gflops: float, peak: float | None) -> float | None:
    """A rate as a part of the peak; None if there is no peak, or if the part is above 1: then one of them is wrong."""
    return gflops / peak if peak and gflops <= peak else None


def refusal(gflops: float, peak: float | None) -> str | None:
    """Why a rate has no share of a peak that was measured, or None."""
    if not peak or gflops <= peak:
        return None
    return (
        f"no share of the FMA peak: {gflops:.1f} GFLOP/s are above the {peak:.1f} GFLOP/s measured as the peak, "
        f"in {MEASUREMENTS} measurements"
    )


def at_best_peak(measured: Sequence[Measured]) -> list[Measured]:
    """The same with the best of their peaks in the place of each one's own, which was the best by then.

    All are of one run: of one dtype and number of threads.
    """
    best = max((each.peak for each in measured if each.peak), default=None)
    return [replace(each, peak=best) if each.peak else each for each in measured]
