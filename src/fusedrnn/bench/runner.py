"""Runs the rows of a benchmark: each is checked against the reference, then timed, the peak sampled between turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from threadpoolctl import threadpool_limits

import fusedrnn
from fusedrnn.bench.checks import check, check_part, check_timed, compare
from fusedrnn.bench.computed import FUSED, NON_FUSED, TORCH, UNPACKED, Computed, Contender, Results
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import Batch, Workload, workload
from fusedrnn.bench.parts import Part, part_of
from fusedrnn.bench.peaks import RunPeak, until_plausible
from fusedrnn.bench.peers.team import Team
from fusedrnn.bench.rows import Plan, Row
from fusedrnn.bench.timing import NO_PAUSE, PAUSE, LostError, Timed, Timing, alternate
from fusedrnn.bench.torch_modules import threads as torch_threads
from fusedrnn.testing.cases import Case

Progress = Callable[[str], None]

_SHORT_BESIDE_RIVALS = 0.05
"""Seconds that a sample lasts at least where rests before turns are long: more single calls for their percentiles."""


def run(plan: Plan, progress: Progress = lambda stage: None) -> Iterator[Row]:
    """Run ``plan``, yielding each row as it is done; ``progress`` is told what is being done.

    The peak of a row is the best by then: :func:`fusedrnn.bench.peaks.at_best_peak` gives all of them that of the run.
    """
    with ExitStack() as stack:
        if TORCH in plan.contenders():
            stack.enter_context(torch_threads(plan.threads))
        stack.enter_context(fusedrnn.thread_limits(plan.threads))
        stack.enter_context(threadpool_limits(limits=plan.threads, user_api="blas"))
        team = stack.enter_context(Team(plan.peers, plan.revisions, plan.threads))
        peak = RunPeak(plan.dtype, plan.threads)
        for case, mode, phase in plan.rows():
            yield _run_row(plan, team, peak, case, mode, phase, progress)


def _run_row(
    plan: Plan, team: Team, peak: RunPeak, case: Case, mode: str, phase: Phase, progress: Progress
) -> Row:
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
        return _beside_rivals(plan, team, peak, row, work, phase, groups[0][1][FUSED], progress)
    progress(f"{row.name}: timing")
    return _in_turns(plan, peak, row, phase, groups)


def _in_turns(
    plan: Plan, peak: RunPeak, row: Row, phase: Phase, groups: Sequence[tuple[Workload, dict[str, Contender]]]
) -> Row:
    """The rest of a row whose contenders, checked on the first steps, take turns in this process."""
    calls: dict[str, Timed] = {}
    for each, contenders in groups:
        batch = each.batch(row.case.T)
        calls |= {who: _bound(call, batch) for who, call in contenders.items()}
    part = None
    if NON_FUSED in calls and not plan.full:
        part = _part(groups[0][0], groups[0][1][NON_FUSED])
    if part:
        calls[NON_FUSED] = part
        row = replace(row, parts={NON_FUSED: part.steps})
    pause = PAUSE if NON_FUSED in calls or plan.backends else NO_PAUSE

    def take_turns() -> tuple[dict[str, Timing], dict[str, Any]]:
        return alternate(calls, plan.budget, once=(NON_FUSED, "reference"), pause=pause, before_turn=peak.sample)

    row, results = _plausible(row, peak, take_turns)
    for each, contenders in groups:
        base = next(iter(contenders)) if plan.backends else None
        computed = {who: results[who] for who in contenders}
        if part and NON_FUSED in contenders:
            wrong = check_part(each, phase, contenders, computed, part.steps)
        else:
            wrong = check_timed(each, phase, computed, base)
        if wrong:
            return replace(row, peak=None, timings={}, wrong=wrong)
    return row


def _part(work: Workload, contender: Contender) -> Part | None:
    """The part of the steps on which a slow contender is measured, None if it is not slow."""
    return part_of(lambda steps: _bound(contender, work.batch(steps)), work.case.T)


def _plausible(
    row: Row, peak: RunPeak, take_turns: Callable[[], tuple[dict[str, Timing], dict[str, Any]]]
) -> tuple[Row, dict[str, Any]]:
    """The row with its timings and the peak, and what was computed."""

    def fastest(measured: tuple[dict[str, Timing], dict[str, Any]]) -> float:
        timed = replace(row, timings=measured[0])
        return max((timed.gflops(who) for who in timed.timings), default=0.0)

    timings, results = until_plausible(peak, take_turns, fastest)
    return replace(row, timings=timings, peak=peak.gflops), results


def _beside_rivals(
    plan: Plan, team: Team, peak: RunPeak, row: Row, work: Workload, phase: Phase, op: Contender, progress: Progress
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

    contenders: dict[str, Timed] = {FUSED: _bound(op, batch), **calls}

    def take_turns() -> tuple[dict[str, Timing], dict[str, Any]]:
        return alternate(
            contenders,
            plan.budget,
            once=list(calls),
            short=_SHORT_BESIDE_RIVALS,
            lost=lost,
            before_turn=peak.sample,
        )

    row, results = _plausible(row, peak, take_turns)
    team.unload()
    row = replace(row, failures=failures, versions=dict(team.versions))
    if wrong := wrong_in(results[FUSED]()):
        return replace(row, peak=None, timings={}, wrong=f"{FUSED}: {wrong} (as timed, against itself before)")
    return row


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
