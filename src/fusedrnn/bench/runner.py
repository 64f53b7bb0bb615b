"""Runs the rows of a benchmark: each is checked against the reference, then timed, with the peak measured around it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import fusedrnn
from fusedrnn.bench.cases import Case
from fusedrnn.bench.contenders import FUSED, NON_FUSED, TORCH, Contender, Phase
from fusedrnn.bench.data import Workload, workload
from fusedrnn.bench.timing import Timing, alternate
from fusedrnn.bench.tolerance import difference, longest_sum, tolerance
from fusedrnn.engine.peak import measure_peak

Array = NDArray[Any]
Results = Mapping[str, Array]
Progress = Callable[[str], None]

CHECKED_FLOPS = 2e10
"""Work up to which the check by the float64 reference covers every step: about a second of it."""

_PEAK_SAMPLES = 3


@dataclass(frozen=True)
class Plan:
    """What to run: every case with every mode in every phase, in that order."""

    cases: Sequence[Case]
    modes: Sequence[str]
    phases: Sequence[Phase]
    dtype: str = "float32"
    threads: int = 1
    torch: bool = False
    budget: float = 8.0
    """Seconds to spend on timing a row, if its calls are short enough."""
    data: Array | None = None
    """The user's input (T, N, I), whose shape the cases have; None for text."""

    def __len__(self) -> int:
        return len(self.cases) * len(self.modes) * len(self.phases)

    def contenders(self) -> tuple[str, ...]:
        """Names of those compared, in the order of their turns."""
        return (NON_FUSED, FUSED, TORCH) if self.torch else (NON_FUSED, FUSED)


@dataclass(frozen=True)
class Row:
    """One line of a benchmark: what was run, and either what it took or what was wrong with it."""

    case: Case
    mode: str
    phase: str
    dtype: str
    threads: int
    flops: int
    peak: float | None = None
    """GFLOP/s of fused multiply-adds on these threads, measured right before and after."""
    timings: Mapping[str, Timing] = field(default_factory=dict)
    wrong: str | None = None

    @property
    def name(self) -> str:
        """Case, mode and phase."""
        return f"{self.case.name} {self.mode} {self.phase}"

    def rate(self, who: str) -> float:
        """Samples, which are sequences, a second."""
        return self.case.N / self.timings[who].median

    def ratio(self, over: str) -> float:
        """How many times the fused operator is as fast as another contender."""
        return self.timings[over].median / self.timings[FUSED].median

    def gflops(self, who: str = FUSED) -> float:
        """Useful work done a second."""
        return self.flops / self.timings[who].median / 1e9

    def share(self) -> float | None:
        """The fused operator's part of the peak."""
        return self.gflops() / self.peak if self.peak else None


def run(plan: Plan, progress: Progress = lambda stage: None) -> Iterator[Row]:
    """Run ``plan``, yielding each row as it is done; ``progress`` is told what is being done."""
    with fusedrnn.thread_limits(plan.threads), threadpool_limits(limits=plan.threads, user_api="blas"):
        for case, mode, phase in itertools.product(plan.cases, plan.modes, plan.phases):
            yield _run_row(plan, case, mode, phase, progress)


def _run_row(plan: Plan, case: Case, mode: str, phase: Phase, progress: Progress) -> Row:
    name = f"{case.name} {mode} {phase.name}"
    progress(f"{name}: preparing")
    work = workload(case, mode, plan.dtype, plan.data)
    flops = work.spec.flops(case.T, case.N, training=phase.training)
    about = (case, mode, phase.name, plan.dtype, plan.threads, flops)
    contenders = {who: phase.makers[who](work) for who in plan.contenders()}
    progress(f"{name}: checking")
    if wrong := check(work, phase, contenders, flops):
        return Row(*about, wrong=wrong)
    progress(f"{name}: timing")
    peaks = [measure_peak(plan.dtype, plan.threads) for _ in range(_PEAK_SAMPLES)]
    timings, results = alternate({who: _bound(call, work.x) for who, call in contenders.items()}, plan.budget)
    peaks += [measure_peak(plan.dtype, plan.threads) for _ in range(_PEAK_SAMPLES)]
    if wrong := check_timed(work, results):
        return Row(*about, wrong=wrong)
    return Row(*about, peak=statistics.median(peaks), timings=timings)


def _bound(call: Contender, x: Array) -> Callable[[], Results]:
    return lambda: call(x)


def check(work: Workload, phase: Phase, contenders: Mapping[str, Contender], flops: int) -> str | None:
    """What is wrong with any contender against the reference in float64, or None.

    As many steps are run as the reference can do in about a second; the contenders are warm then.
    """
    steps = min(work.case.T, max(1, round(work.case.T * CHECKED_FLOPS / flops)))
    x = work.x[:steps]
    exact = work.exact()
    expected = phase.makers[NON_FUSED](exact)(x.astype(np.float64))
    for who, call in contenders.items():
        if wrong := _compare(work, who, call(x), expected, sides=1):
            return f"{wrong} ({steps} of {work.case.T} steps, float64 reference)"
    return None


def check_timed(work: Workload, results: Mapping[str, Results]) -> str | None:
    """What is wrong with the results that were timed, all steps, against the non-fused ones, or None."""
    for who, actual in results.items():
        if wrong := _compare(work, who, actual, results[NON_FUSED], sides=2):
            return f"{wrong} (as timed, non-fused reference)"
    return None


def _compare(work: Workload, who: str, actual: Results, expected: Results, sides: int) -> str | None:
    """``sides`` is how many of the two were rounded to the workload's dtype."""
    scale = float(np.max(np.abs(work.x)))
    rtol, atol = tolerance(work.spec.dtype, longest_sum(work.spec), scale)
    for name, array in expected.items():
        if wrong := difference(actual[name], array, sides * rtol, sides * atol):
            return f"{who}: {name}{wrong}"
    return None
