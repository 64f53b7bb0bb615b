"""Runs a benchmark. Each row is checked against the reference, then timed, with samples of the peak between turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from threadpoolctl import threadpool_limits

import fusedrnn
from fusedrnn.bench import variants
from fusedrnn.bench.checks import check, check_first_steps, check_timed
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import FUSED, NON_FUSED, TORCH, UNPACKED, Workload, workload
from fusedrnn.bench.extrapolate import extrapolate
from fusedrnn.bench.formats import Group, make_contenders
from fusedrnn.bench.peaks import RunPeak, Turns, measure
from fusedrnn.bench.rows import BenchConfig, Row
from fusedrnn.bench.timing import LONG_SAMPLE_SECONDS, SPIN_PAUSE, Timed, alternate
from fusedrnn.bench.torch_contenders import threads as torch_threads

Progress = Callable[[str], None]


def run(config: BenchConfig, progress: Progress = lambda stage: None) -> Iterator[Row]:
    """Run ``config`` and yield each finished row; ``progress`` is called with a text on the current stage.

    The peak of a row is the best so far; :func:`fusedrnn.bench.peaks.at_best_peak` sets the best of the run.
    """
    with ExitStack() as stack:
        if find_spec("torch") if config.variants else TORCH in config.contenders:
            stack.enter_context(torch_threads(config.threads))
        stack.enter_context(fusedrnn.thread_limits(config.threads))
        stack.enter_context(threadpool_limits(limits=config.threads, user_api="blas"))
        peak = RunPeak(config.dtype, config.threads, config.formats.values())
        for case, mode, phase in config.rows():
            work = workload(case, mode, config.dtype, config.data, packed=UNPACKED in config.contenders)
            if config.variants:
                progress(f"{case.name} {mode} {phase.name}")
                yield variants.run_row(config, peak, work, phase)
            else:
                yield _run_row(config, peak, work, phase, progress)


def _run_row(config: BenchConfig, peak: RunPeak, work: Workload, phase: Phase, progress: Progress) -> Row:
    row = Row.of(config, work, phase)
    progress(f"{row.name}: preparing")
    groups, declined = _make_contenders(config, phase, work)
    row = replace(row, failures=declined)
    if not any(contenders for _, contenders in groups):
        return row
    progress(f"{row.name}: checking")
    for group_work, contenders in groups:
        if wrong := check(group_work, phase, contenders):
            return replace(row, wrong=wrong)
        flops = group_work.flops(training=phase.training)
        row = replace(row, flops_of={**row.flops_of, **dict.fromkeys(contenders, flops)})
    progress(f"{row.name}: timing")
    return _time_row(config, peak, row, phase, groups)


def _time_row(config: BenchConfig, peak: RunPeak, row: Row, phase: Phase, groups: Sequence[Group]) -> Row:
    """Time the contenders of a row: check them on the first steps, time them, and check the timed results."""
    calls: dict[str, Timed] = {}
    for work, contenders in groups:
        batch = work.batch(row.case.T)
        calls |= {name: partial(contender, batch) for name, contender in contenders.items()}
    extrapolated = None
    if NON_FUSED in calls and not config.full:
        work, contenders = groups[0]
        non_fused = contenders[NON_FUSED]
        extrapolated = extrapolate(lambda steps: partial(non_fused, work.batch(steps)), row.case.T)
    if extrapolated:
        calls[NON_FUSED] = extrapolated
        row = replace(row, steps_run={NON_FUSED: extrapolated.steps})
    options: dict[str, Any] = {"single_sample": (NON_FUSED, "reference"), "pause": config.pause}
    if not (NON_FUSED in calls or config.engines or config.formats):  # PyTorch modules, which share their threads
        options |= {"pause": min(config.pause, SPIN_PAUSE), "sample_seconds": LONG_SAMPLE_SECONDS}

    def take_turns() -> Turns:
        return alternate(calls, config.budget, before_turn=peak.sample, **options)

    row, results = measure(row, peak, take_turns)
    for work, contenders in groups:
        timed = {name: results[name] for name in contenders}
        if extrapolated and NON_FUSED in contenders:
            wrong = check_first_steps(work, phase, contenders, timed, extrapolated.steps)
        elif config.formats:
            in_float32 = {name: results[name] for name in (FUSED,) if name in results}
            wrong = check_timed(work, phase, in_float32 | timed, FUSED)
        else:
            wrong = check_timed(work, phase, timed, next(iter(contenders)) if config.engines else None)
        if wrong:
            return replace(row, peak=None, timings={}, wrong=wrong)
    return row


def _make_contenders(config: BenchConfig, phase: Phase, work: Workload) -> tuple[list[Group], dict[str, str]]:
    """The contenders, and the reasons why some engines or formats are left out."""
    if config.engines:
        contenders, declined = {}, {}
        for name in config.contenders:
            try:
                contenders[name] = phase.on_engine(name)(work)
            except NotImplementedError as error:
                declined[name] = str(error)
        return [(work, contenders)], declined
    if config.formats:
        return make_contenders(config, phase, work)
    names = [name for name in config.contenders if name != UNPACKED]
    groups = [(work, {name: phase.makers[name](work) for name in names})]
    if UNPACKED in config.contenders:
        unpacked = work.unpacked()
        groups.append((unpacked, {UNPACKED: phase.makers[UNPACKED](unpacked)}))
    return groups, {}
