"""Runs the rows of a benchmark: each is checked against the reference, then timed, with the peak measured around it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import fusedrnn
from fusedrnn.bench.cases import Case
from fusedrnn.bench.checks import check, check_timed
from fusedrnn.bench.contenders import FUSED, NON_FUSED, TORCH, Computed, Contender, Phase
from fusedrnn.bench.data import Batch, workload
from fusedrnn.bench.timing import Timing, alternate
from fusedrnn.engine.peak import measure_peak

Array = NDArray[Any]
Progress = Callable[[str], None]

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
    budget: float = 5.0
    """Seconds to spend on timing a row, if its calls are short enough."""
    data: Array | None = None
    """The user's input (T, N, I), whose shape the cases have; None for text."""

    def rows(self) -> list[tuple[Case, str, Phase]]:
        """What every row is of, in their order."""
        return list(itertools.product(self.cases, self.modes, self.phases))

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
        for case, mode, phase in plan.rows():
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
    batch = work.batch(case.T)
    calls = {who: _bound(call, batch) for who, call in contenders.items()}
    timings, results = alternate(calls, plan.budget, once=(NON_FUSED,))
    peaks += [measure_peak(plan.dtype, plan.threads) for _ in range(_PEAK_SAMPLES)]
    if wrong := check_timed(work, results):
        return Row(*about, wrong=wrong)
    return Row(*about, peak=statistics.median(peaks), timings=timings)


def _bound(call: Contender, batch: Batch) -> Callable[[], Computed]:
    return lambda: call(batch)
