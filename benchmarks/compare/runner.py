"""Runs the rows of a comparison. The peers' results are compared with the operator's before peers are timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from threadpoolctl import threadpool_limits

import fusedrnn
from benchmarks.peers.environments import format_of
from benchmarks.peers.processes import PeerProcesses
from benchmarks.peers.revision import Revision
from fusedrnn.bench.checks import check, check_timed, compare
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import FUSED, NON_FUSED, OURS, Results, Workload, workload
from fusedrnn.bench.formats import make_contenders
from fusedrnn.bench.peaks import RunPeak, Turns, measure
from fusedrnn.bench.report import report, row_report
from fusedrnn.bench.rows import BenchConfig, Row
from fusedrnn.bench.runner import Progress
from fusedrnn.bench.timing import LONG_SAMPLE_SECONDS, PAUSE, Timed, alternate


@dataclass(frozen=True)
class Comparison:
    """What to run: the workloads of ``bench``, the libraries, and the revisions of fusedrnn.

    :func:`benchmarks.peers.environments.in_formats` gives the names of libraries in formats other than the dtype.
    """

    bench: BenchConfig
    peers: Sequence[str] = ()
    revisions: Sequence[Revision] = ()

    def contenders(self) -> tuple[str, ...]:
        """Names of the contenders, in the order of their turns."""
        return *self.ours(), *self.peers, *(revision.name for revision in self.revisions)

    def ours(self) -> tuple[str, ...]:
        """The names of the operator, one for each format of operands if there are several."""
        return tuple(self.bench.formats) or (FUSED,)

    def formats(self) -> dict[str, str]:
        """The format of operands of every contender, if formats differ."""
        return {**self.bench.formats, **{name: format_of(name) for name in self.peers}} if self.bench.formats else {}


@dataclass(frozen=True)
class ComparedRow(Row):
    """A row with libraries and revisions to compare with the operator. Those with right results have timings."""

    peers: tuple[str, ...] = ()
    revisions: tuple[str, ...] = ()

    @property
    def best_peer(self) -> str | None:
        """The fastest library in the format of :attr:`ours`, None if none was timed."""
        return self.best_peer_of(self.ours)

    def best_peer_of(self, contender: str) -> str | None:
        """The fastest library in a contender's format, None if none was timed."""
        number_format = self.formats.get(contender)
        timed = [name for name in self.peers if name in self.timings and self.formats.get(name) == number_format]
        return min(timed, key=lambda name: self.timings[name].median, default=None)

    def over_best_peer(self, contender: str | None = None) -> float | None:
        """How many times as fast as the fastest library in its format our contender is, by default :attr:`ours`."""
        name = contender or self.ours
        best = self.best_peer_of(name)
        return None if best is None or name not in self.timings else self.ratio(best, name)


def run(config: Comparison, progress: Progress = lambda stage: None) -> Iterator[ComparedRow]:
    """Run ``config`` and yield each finished row; ``progress`` is called with a text on the current stage."""
    bench = config.bench
    with ExitStack() as stack:
        stack.enter_context(fusedrnn.thread_limits(bench.threads))
        stack.enter_context(threadpool_limits(limits=bench.threads, user_api="blas"))
        processes = stack.enter_context(PeerProcesses(config.peers, config.revisions, bench.threads))
        peak = RunPeak(bench.dtype, bench.threads, bench.formats.values())
        for case, mode, phase in bench.rows():
            work = workload(case, mode, bench.dtype, bench.data)
            revisions = tuple(revision.name for revision in config.revisions)
            fields = {"peers": tuple(config.peers), "revisions": revisions, "formats": config.formats()}
            row = ComparedRow.of(bench, work, phase, **fields)
            yield _run_row(config, processes, peak, row, work, phase, progress)


def _run_row(
    config: Comparison,
    processes: PeerProcesses,
    peak: RunPeak,
    row: ComparedRow,
    work: Workload,
    phase: Phase,
    progress: Progress,
) -> ComparedRow:
    """Check the operator on the first steps, compare the others with it on all steps, and time those that agree.

    If no library agrees, the non-fused network decides whether the operator is wrong.
    """
    progress(f"{row.name}: checking")
    operator = phase.makers[FUSED](work)
    if wrong := check(work, phase, {FUSED: operator}):
        return replace(row, wrong=wrong)
    groups, left_out = make_contenders(config.bench, phase, work)
    for in_format, contenders in groups:
        if wrong := check(in_format, phase, contenders):
            return replace(row, wrong=wrong)
    batch = work.batch(work.case.T)
    expected = {name: array.copy() for name, array in operator(batch)().items()}  # the next call reuses the arrays

    def difference(name: str, results: Results) -> str | None:
        in_format = work.in_format(row.formats.get(name, work.spec.dtype))
        return compare(in_format, work.case.T, results, expected, num_rounded=2)

    calls, failures = processes.load(
        work, batch, phase.training, difference, lambda name: progress(f"{row.name}: preparing {name}")
    )
    if calls.keys().isdisjoint(row.peers):
        progress(f"{row.name}: checking")
        if wrong := check_timed(work, phase, {FUSED: lambda: expected}, NON_FUSED):
            return replace(row, wrong=wrong, failures=failures)
    progress(f"{row.name}: timing")
    ours = {name: maker for _, contenders in groups for name, maker in contenders.items()} or {FUSED: operator}
    own_calls = {name: partial(contender, batch) for name, contender in ours.items()}
    row, results = _time_row(config.bench.budget, peak, row, {**own_calls, **calls}, failures)
    processes.unload()
    row = replace(row, failures=left_out | failures, versions=dict(processes.versions))
    for name in ours:
        if wrong := difference(name, results[name]()):
            return replace(row, peak=None, timings={}, wrong=f"{name}: {wrong} (as timed, against itself before)")
    return row


def _time_row(
    budget: float, peak: RunPeak, row: ComparedRow, calls: Mapping[str, Timed], failures: dict[str, str]
) -> tuple[ComparedRow, dict[str, Any]]:
    """The row with its timings, and the results. Contenders that fail meanwhile are added to ``failures``."""
    # Only libraries have idle threads that spin. Revisions need no pause, and get ten times as many samples without it.
    pause = PAUSE if row.peers else 0.0

    def take_turns() -> Turns:
        single_sample = [name for name in calls if name not in OURS]
        options: dict[str, Any] = {"single_sample": single_sample, "pause": pause, "before_turn": peak.sample}
        return alternate(calls, budget, failures=failures, sample_seconds=LONG_SAMPLE_SECONDS, **options)

    return measure(row, peak, take_turns)


def comparison_report(
    config: Comparison, rows: Sequence[ComparedRow], bandwidth: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The comparison as data for JSON: the report of the benchmark, with the peers and revisions."""
    figures = report(config.bench, rows, bandwidth)
    figures["plan"] |= {
        "contenders": list(config.contenders()),
        "peers": list(config.peers),
        "revisions": {revision.name: revision.commit for revision in config.revisions},
    }
    figures["rows"] = [
        row_report(row)
        | {
            "best_peer": row.best_peer,
            "fused_over_best_peer": row.over_best_peer(),
            "over_best_peer": {name: row.over_best_peer(name) for name in config.ours() if name in row.timings},
        }
        for row in rows
    ]
    return figures
