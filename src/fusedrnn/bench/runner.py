"""Runs the rows of a benchmark: each is checked against the reference, then timed, with the peak measured around it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import fusedrnn
from fusedrnn.bench.cases import Case
from fusedrnn.bench.checks import check, check_timed, compare
from fusedrnn.bench.computed import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED, Computed, Contender, Results
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import Batch, Workload, workload
from fusedrnn.bench.peers.revision import Revision
from fusedrnn.bench.peers.team import Team
from fusedrnn.bench.timing import NO_PAUSE, PAUSE, Call, Elsewhere, LostError, Timing, alternate
from fusedrnn.bench.torch_modules import threads as torch_threads
from fusedrnn.engine.peak import measure_peak

Array = NDArray[Any]
Progress = Callable[[str], None]

_PEAK_SAMPLES = 3

_SHORT_BESIDE_RIVALS = 0.05
"""Seconds that a sample lasts at least where rests before turns are long: more single calls for their percentiles."""


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
    peers: Sequence[str] = ()
    """Other libraries, each in a process of its own, that the operator alone is compared with."""
    revisions: Sequence[Revision] = ()
    """Of ourselves, in the same way."""
    backends: Sequence[str] = ()
    """Engines of the operator, which are compared with each other alone."""
    budget: float = 5.0
    """Seconds to spend on timing a row, if its calls are short enough."""
    data: Array | None = None
    """The user's input (T, N, I), whose shape the cases have; None for text."""

    def rows(self) -> list[tuple[Case, str, Phase]]:
        """What every row is of, in their order."""
        return list(itertools.product(self.cases, self.modes, self.phases))

    def contenders(self) -> tuple[str, ...]:
        """Names of those compared, in the order of their turns."""
        if self.backends:
            return tuple(self.backends)
        if self.peers or self.revisions:
            return FUSED, *self.peers, *(revision.name for revision in self.revisions)
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
    peers: tuple[str, ...] = ()
    """Other libraries that were asked for; those in ``timings`` were right."""
    revisions: tuple[str, ...] = ()
    """The same of ourselves."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why the others of them, or of the engines, have no timing."""
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What each of them ran on."""
    backends: tuple[str, ...] = ()
    """Engines that were asked for; those in ``timings`` were right."""

    @property
    def name(self) -> str:
        """Case, mode and phase."""
        return f"{self.case.name} {self.mode} {self.phase}{' packed' if self.lengths else ''}"

    @property
    def ours(self) -> str:
        """Whose figures stand for ours: the operator's, on the first engine that ran; or the modules' alone."""
        if self.backends:
            return next((name for name in self.backends if name in self.timings), FUSED)
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

    @property
    def best_peer(self) -> str | None:
        """The fastest of the other libraries, None if none was timed."""
        timed = [who for who in self.peers if who in self.timings]
        return min(timed, key=lambda who: self.timings[who].median, default=None)

    def over_best_peer(self) -> float | None:
        """How many times ours is as fast as the fastest of the other libraries."""
        best = self.best_peer
        return None if best is None or FUSED not in self.timings else self.ratio(best)

    def of_unpacked(self) -> float:
        """Useful work a second on packed sequences, as a part of that on unpacked ones."""
        return self.gflops(IN_TORCH) / self.gflops(UNPACKED)


def run(plan: Plan, progress: Progress = lambda stage: None) -> Iterator[Row]:
    """Run ``plan``, yielding each row as it is done; ``progress`` is told what is being done."""
    with ExitStack() as stack:
        if TORCH in plan.contenders():
            stack.enter_context(torch_threads(plan.threads))
        stack.enter_context(fusedrnn.thread_limits(plan.threads))
        stack.enter_context(threadpool_limits(limits=plan.threads, user_api="blas"))
        team = stack.enter_context(Team(plan.peers, plan.revisions, plan.threads))
        for case, mode, phase in plan.rows():
            yield _run_row(plan, team, case, mode, phase, progress)


def _run_row(plan: Plan, team: Team, case: Case, mode: str, phase: Phase, progress: Progress) -> Row:
    work = workload(case, mode, plan.dtype, plan.data, packed=plan.packed)
    lengths = None if work.lengths is None else tuple(map(int, work.lengths))
    flops = work.flops(training=phase.training)
    peers, revisions = tuple(plan.peers), tuple(revision.name for revision in plan.revisions)
    row = Row(case, mode, phase.name, plan.dtype, plan.threads, flops, None, {}, None, lengths, peers, revisions)
    row = replace(row, backends=tuple(plan.backends))
    progress(f"{row.name}: preparing")
    groups, declined = _groups(plan, phase, work)
    row = replace(row, failures=declined)
    if not any(contenders for _, contenders in groups):
        return row
    progress(f"{row.name}: checking")
    for each, contenders in groups:
        if wrong := check(each, phase, contenders, each.flops(training=phase.training)):
            return replace(row, wrong=wrong)
    if peers or revisions:
        return _beside_rivals(plan, team, row, work, phase, groups[0][1][FUSED], progress)
    progress(f"{row.name}: timing")
    calls: dict[str, Callable[[], Computed]] = {}
    for each, contenders in groups:
        batch = each.batch(case.T)
        calls |= {who: _bound(call, batch) for who, call in contenders.items()}
    pause = PAUSE if NON_FUSED in calls or plan.backends else NO_PAUSE
    before = _peaks(plan)
    timings, results = alternate(calls, plan.budget, once=(NON_FUSED, "reference"), pause=pause)
    time.sleep(pause)  # threads of other engines are awake for a while
    peak = statistics.median(before + _peaks(plan))
    for each, contenders in groups:
        base = next(iter(contenders)) if plan.backends else None
        if wrong := check_timed(each, phase, {who: results[who] for who in contenders}, base):
            return replace(row, wrong=wrong)
    return replace(row, peak=peak, timings=timings)


def _beside_rivals(
    plan: Plan, team: Team, row: Row, work: Workload, phase: Phase, op: Contender, progress: Progress
) -> Row:
    """The rest of a row in which the operator, checked on its first steps, meets rivals in other processes.

    Theirs and ours are compared at all steps, and one that differs is not timed. If no library agrees, the non-fused
    network decides whether it is we who are wrong.
    """
    batch = work.batch(work.case.T)
    ours = {name: array.copy() for name, array in op(batch)().items()}  # the next call reuses arrays

    def wrong_in(found: Results) -> str | None:
        return compare(work, found, ours)

    calls, failures = team.load(
        work, batch, phase.training, wrong_in, lambda who: progress(f"{row.name}: preparing {who}")
    )
    if calls.keys().isdisjoint(row.peers):
        progress(f"{row.name}: checking")
        if wrong := check_timed(work, phase, {FUSED: lambda: ours}, NON_FUSED):
            return replace(row, wrong=wrong, failures=failures)
    progress(f"{row.name}: timing")

    def lost(who: str, error: LostError) -> None:
        failures[who] = str(error)

    before = _peaks(plan)
    contenders: dict[str, Call | Elsewhere] = {FUSED: _bound(op, batch), **calls}
    timings, results = alternate(contenders, plan.budget, once=list(calls), short=_SHORT_BESIDE_RIVALS, lost=lost)
    peak = statistics.median(before + _peaks(plan))
    team.unload()
    row = replace(row, failures=failures, versions=dict(team.versions))
    if wrong := wrong_in(results[FUSED]()):
        return replace(row, wrong=f"{FUSED}: {wrong} (as timed, against itself before)")
    return replace(row, peak=peak, timings=timings)


def _peaks(plan: Plan) -> list[float]:
    return [measure_peak(plan.dtype, plan.threads) for _ in range(_PEAK_SAMPLES)]


def _groups(
    plan: Plan, phase: Phase, work: Workload
) -> tuple[list[tuple[Workload, dict[str, Contender]]], dict[str, str]]:
    """The contenders, with those together that are given the same; and why engines decline."""
    if plan.backends:
        made, declined = _on_engines(plan, phase, work)
        return [(work, made)], declined
    here = [who for who in plan.contenders() if who in phase.makers and who != UNPACKED]
    groups = [(work, {who: phase.makers[who](work) for who in here})]
    if UNPACKED in plan.contenders():
        whole = work.unpacked()
        groups.append((whole, {UNPACKED: phase.makers[UNPACKED](whole)}))
    return groups, {}


def _on_engines(plan: Plan, phase: Phase, work: Workload) -> tuple[dict[str, Contender], dict[str, str]]:
    made, declined = {}, {}
    for name in plan.backends:
        try:
            made[name] = phase.on_engine(name)(work)
        except NotImplementedError as error:
            declined[name] = str(error)
    return made, declined


def _bound(call: Contender, batch: Batch) -> Callable[[], Computed]:
    return lambda: call(batch)
