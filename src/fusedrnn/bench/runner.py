"""Runs the rows of a benchmark: each is checked against the reference, then timed, with the peak measured around it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import fusedrnn
from fusedrnn.bench.cases import Case
from fusedrnn.bench.checks import check, check_timed
from fusedrnn.bench.computed import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED, Computed, Contender
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import Batch, Workload, workload
from fusedrnn.bench.timing import NO_PAUSE, PAUSE, Timing, alternate
from fusedrnn.bench.torch_modules import threads as torch_threads
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
    """Whether torch.nn's modules take part, as they are and accelerated."""
    only_torch: bool = False
    """Whether they alone do."""
    packed: bool = False
    """The same on packed sequences, with the accelerated module on unpacked ones beside them."""
    budget: float = 5.0
    """Seconds to spend on timing a row, if its calls are short enough."""
    data: Array | None = None
    """The user's input (T, N, I), whose shape the cases have; None for text."""

    def rows(self) -> list[tuple[Case, str, Phase]]:
        """What every row is of, in their order."""
        return list(itertools.product(self.cases, self.modes, self.phases))

    def contenders(self) -> tuple[str, ...]:
        """Names of those compared, in the order of their turns."""
        if self.packed:
            return TORCH, IN_TORCH, UNPACKED
        if self.only_torch:
            return TORCH, IN_TORCH
        return (NON_FUSED, FUSED, TORCH, IN_TORCH) if self.torch else (NON_FUSED, FUSED)


@dataclass(frozen=True)
class Row:
    """One line of a benchmark: what was run, and either what it took or what was wrong with it."""

    case: Case
    mode: str
    phase: str
    dtype: str
    threads: int
    flops: int
    """Useful operations of a call: of the steps that count, if sequences are packed."""
    peak: float | None = None
    """GFLOP/s of fused multiply-adds on these threads, measured right before and after."""
    timings: Mapping[str, Timing] = field(default_factory=dict)
    wrong: str | None = None
    lengths: tuple[int, ...] | None = None
    """Of packed sequences."""

    @property
    def name(self) -> str:
        """Case, mode and phase."""
        return f"{self.case.name} {self.mode} {self.phase}{' packed' if self.lengths else ''}"

    @property
    def ours(self) -> str:
        """Whose figures stand for ours: the operator's, or the modules' where only those ran."""
        return IN_TORCH if IN_TORCH in self.timings and FUSED not in self.timings else FUSED

    def rate(self, who: str) -> float:
        """Samples, which are sequences, a second."""
        return self.case.N / self.timings[who].median

    def ratio(self, over: str, who: str | None = None) -> float:
        """How many times one of ours is as fast as another contender."""
        return self.timings[over].median / self.timings[who or self.ours].median

    def gflops(self, who: str | None = None) -> float:
        """Useful work done a second."""
        flops = self.flops
        if who == UNPACKED and self.lengths:
            flops = flops * self.case.T * self.case.N // sum(self.lengths)
        return flops / self.timings[who or self.ours].median / 1e9

    def share(self, who: str | None = None) -> float | None:
        """The part of the peak that one of ours reaches."""
        return self.gflops(who) / self.peak if self.peak else None

    def of_unpacked(self) -> float:
        """Useful work a second on packed sequences, as a part of that on unpacked ones."""
        return self.gflops(IN_TORCH) / self.gflops(UNPACKED)


def run(plan: Plan, progress: Progress = lambda stage: None) -> Iterator[Row]:
    """Run ``plan``, yielding each row as it is done; ``progress`` is told what is being done."""
    theirs = torch_threads(plan.threads) if TORCH in plan.contenders() else nullcontext()
    with theirs, fusedrnn.thread_limits(plan.threads), threadpool_limits(limits=plan.threads, user_api="blas"):
        for case, mode, phase in plan.rows():
            yield _run_row(plan, case, mode, phase, progress)


def _run_row(plan: Plan, case: Case, mode: str, phase: Phase, progress: Progress) -> Row:
    work = workload(case, mode, plan.dtype, plan.data, packed=plan.packed)
    lengths = None if work.lengths is None else tuple(map(int, work.lengths))
    flops = work.flops(training=phase.training)
    row = Row(case, mode, phase.name, plan.dtype, plan.threads, flops, lengths=lengths)
    progress(f"{row.name}: preparing")
    groups = _groups(plan, phase, work)
    progress(f"{row.name}: checking")
    for each, contenders in groups:
        if wrong := check(each, phase, contenders, each.flops(training=phase.training)):
            return replace(row, wrong=wrong)
    progress(f"{row.name}: timing")
    peaks = [measure_peak(plan.dtype, plan.threads) for _ in range(_PEAK_SAMPLES)]
    calls: dict[str, Callable[[], Computed]] = {}
    for each, contenders in groups:
        batch = each.batch(case.T)
        calls |= {who: _bound(call, batch) for who, call in contenders.items()}
    pause = PAUSE if NON_FUSED in calls else NO_PAUSE
    timings, results = alternate(calls, plan.budget, once=(NON_FUSED,), pause=pause)
    peaks += [measure_peak(plan.dtype, plan.threads) for _ in range(_PEAK_SAMPLES)]
    for each, contenders in groups:
        if wrong := check_timed(each, phase, {who: results[who] for who in contenders}):
            return replace(row, wrong=wrong)
    return replace(row, peak=statistics.median(peaks), timings=timings)


def _groups(plan: Plan, phase: Phase, work: Workload) -> list[tuple[Workload, dict[str, Contender]]]:
    """The contenders, with those together that are given the same."""
    groups = [(work, {who: phase.makers[who](work) for who in plan.contenders() if who != UNPACKED})]
    if UNPACKED in plan.contenders():
        whole = work.unpacked()
        groups.append((whole, {UNPACKED: phase.makers[UNPACKED](whole)}))
    return groups


def _bound(call: Contender, batch: Batch) -> Callable[[], Computed]:
    return lambda: call(batch)
