"""The common parts of benchmarks whose contenders take turns: a row of timings, and the check before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedrnn.bench.extrapolate import Call
from fusedrnn.bench.peaks import RunPeak
from fusedrnn.bench.timing import LONG_SAMPLE_SECONDS, SPIN_PAUSE, Timing, alternate
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.cases import Case
from fusedrnn.testing.tolerance import difference, gradient_tolerance, longest_sum, tolerance


@dataclass(frozen=True)
class TimedRow:
    """The timings of a workload, by contender.

    Attributes:
        case: The sizes.
        mode: The cell.
        phase: ``"inference"`` or ``"training"``.
        timings: The timings by contender.
    """

    case: Case
    mode: str
    phase: str
    timings: Mapping[str, Timing]

    @property
    def name(self) -> str:
        """The name of the row."""
        return f"{self.case.name}, {self.mode}, {self.phase}"

    def ratio(self, slower: str, faster: str) -> float:
        """How many times as long as ``faster`` the contender ``slower`` takes, by medians."""
        return self.timings[slower].median / self.timings[faster].median

    def seconds_report(self) -> dict[str, Any]:
        """The timings as data for JSON."""
        return {
            "seconds": {name: list(timing.seconds) for name, timing in self.timings.items()},
            "median": {name: timing.median for name, timing in self.timings.items()},
        }


def take_turns(calls: Mapping[str, Call], seconds: float, peak: RunPeak) -> dict[str, Timing]:
    """The timings of calls whose threads all stop spinning soon, without the turns in which the machine is disturbed.

    See :func:`fusedrnn.bench.timing.alternate`.
    """
    options: dict[str, Any] = {"pause": SPIN_PAUSE, "sample_seconds": LONG_SAMPLE_SECONDS}
    return alternate(calls, seconds, before_turn=peak.sample, **options)[0]


def result_difference(spec: RNNSpec, case: Case, actual: Any, expected: Any, is_gradient: bool) -> str | None:
    """A text on where two arrays of results differ by more than rounding; None if they do not."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    limits = tolerance(spec.dtype, longest_sum(spec))
    if is_gradient:
        limits = gradient_tolerance(spec.dtype, spec, case.T, case.N, float(np.abs(expected).max()))
    return difference(actual, expected, *limits)
