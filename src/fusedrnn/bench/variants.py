"""Compares variants of a cell with the plain cell: each one's share of the peak."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import fusedrnn
from fusedrnn.bench import torch_contenders
from fusedrnn.bench.checks import check
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import Workload, parameters, workload
from fusedrnn.bench.peaks import RunPeak, rejection, share_of, until_plausible
from fusedrnn.bench.results import FUSED, TORCH
from fusedrnn.bench.rows import BenchConfig
from fusedrnn.bench.tables import MODE_NAMES, duration, percent
from fusedrnn.bench.timing import PAUSE, Timing, alternate
from fusedrnn.cell.activations import Activation
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.cases import Case

PLAIN, REVERSE = "plain", "reverse"
PROJECTION = "projection H/2"
IN_TORCH_NN = f"{PROJECTION}, torch.nn"

Change = Callable[[RNNSpec], RNNSpec]


def _with(**fields: Any) -> Change:
    return lambda spec: replace(spec, **fields)


VARIANTS: Mapping[str, Mapping[str, Change]] = {
    "lstm": {
        PROJECTION: lambda spec: replace(spec, projection_size=spec.hidden_size // 2),
        "state clip": _with(state_clip_min=-0.5, state_clip_max=0.5),
        "peepholes": _with(peepholes=True),
        "coupled gates": _with(coupled_gates=True),
        "gate clip": _with(gate_clip=1.0),
        "hard sigmoid": _with(activations=(Activation("hard_sigmoid"), Activation("tanh"), Activation("tanh"))),
        "single bias": _with(bias="single"),
        REVERSE: _with(reverse=True),
    },
    "gru": {
        "reset before": _with(reset_after=False),
        "gate clip": _with(gate_clip=1.0),
        "hard sigmoid": _with(activations=(Activation("hard_sigmoid"), Activation("tanh"))),
        "no bias": _with(bias="none"),
    },
    "rnn_tanh": {
        "gate clip": _with(gate_clip=1.0),
        "softplus": _with(activations=(Activation("softplus"),)),
        "elu": _with(activations=(Activation("elu"),)),
    },
    "rnn_relu": {"leaky relu": _with(activations=(Activation("leaky_relu", 0.1),))},
}
"""The variants of each cell, by name."""


@dataclass(frozen=True)
class VariantRow:
    """The measurement of one variant.

    Attributes:
        case, mode, phase: The workload.
        name: The variant.
        flops: Useful floating-point operations of a call.
        timing: Seconds per call; None if the result was wrong.
        peak: GFLOP/s of fused multiply-adds on these threads, the best that the run has measured so far.
        wrong: What is wrong with the result.
    """

    case: Case
    mode: str
    phase: str
    name: str
    flops: int
    timing: Timing | None
    peak: float
    wrong: str | None = None

    @property
    def gflops(self) -> float:
        """Useful work per second."""
        return 0.0 if self.timing is None else self.flops / self.timing.median * 1e-9

    @property
    def share(self) -> float | None:
        """The share of the peak; None if there is no timing, or if it is above 1."""
        return None if self.timing is None else share_of(self.gflops, self.peak)

    @property
    def rejected_share(self) -> str | None:
        """Why there is a rate but no share of the peak, or None."""
        return rejection(self.gflops, self.peak)


def run(config: BenchConfig, progress: Callable[[str], None]) -> Iterator[list[VariantRow]]:
    """The rows of each case, cell and phase, the plain cell first; ``progress`` is called with what is being done.

    All variants of a cell take turns in one process, on the same threads and text. Each is checked against the
    reference before it is timed.
    """
    with ExitStack() as stack:
        if find_spec("torch"):  # its projected LSTM is compared with ours
            stack.enter_context(torch_contenders.threads(config.threads))
        stack.enter_context(fusedrnn.thread_limits(config.threads))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        peak = RunPeak(config.dtype, config.threads)
        for case, mode, phase in config.rows():
            progress(f"{case.name} {MODE_NAMES[mode]}-{phase.name.capitalize()}")
            yield _run_variants(config, case, mode, phase, peak)


def _run_variants(config: BenchConfig, case: Case, mode: str, phase: Phase, peak: RunPeak) -> list[VariantRow]:
    plain = workload(case, mode, config.dtype)
    works = {PLAIN: plain}
    for name, change in VARIANTS[mode].items():
        if name == REVERSE and case.bidirectional:
            continue
        spec = change(plain.spec)
        works[name] = replace(plain, spec=spec, params=parameters(spec))
    makers = {name: phase.makers[FUSED] for name in works}
    if PROJECTION in works and find_spec("torch"):
        works[IN_TORCH_NN], makers[IN_TORCH_NN] = works[PROJECTION], phase.makers[TORCH]
    calls, wrong = {}, {}
    for name, work in works.items():
        contender = makers[name](work)
        wrong[name] = check(work, phase, {name: contender}, _flops(work, phase))
        if not wrong[name]:
            calls[name] = partial(contender, work.batch(case.T))

    def take_turns() -> dict[str, Timing]:
        return alternate(calls, config.budget * len(calls), pause=PAUSE, before_turn=peak.sample)[0]

    def make_rows(timings: Mapping[str, Timing]) -> list[VariantRow]:
        return [
            VariantRow(case, mode, phase.name, name, _flops(work, phase), timings.get(name), peak.gflops, wrong[name])
            for name, work in works.items()
        ]

    def fastest(timings: Mapping[str, Timing]) -> float:
        return max(row.gflops for row in make_rows(timings))

    return make_rows(until_plausible(peak, take_turns, fastest))


def _flops(work: Workload, phase: Phase) -> int:
    return work.flops(training=phase.training)


def table(groups: Sequence[Sequence[VariantRow]]) -> Table:
    """Every row: time of a call, useful work, share of the peak, and that share relative to the plain cell."""
    all_rows = Table(title="Variants", title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    for heading in ("", "variant", "a call", "GFLOP/s", "of FMA\npeak", "of plain\nshare"):
        all_rows.add_column(heading, justify="left" if heading in ("", "variant") else "right", no_wrap=True)
    for group in groups:
        plain = group[0]
        for row in group:
            name = f"{row.case.name} {MODE_NAMES[row.mode]}-{row.phase.capitalize()}" if row is plain else ""
            if row.timing is None:
                all_rows.add_row(name, row.name, "[bold red]wrong[/]")
                continue
            of_plain = percent(row.gflops / plain.gflops, digits=1) if plain.gflops else ""
            cells = duration(row.timing.median), f"{row.gflops:.1f}", percent(row.share, digits=1), of_plain
            all_rows.add_row(name, row.name, *cells)
    return all_rows


def report(groups: Sequence[Sequence[VariantRow]]) -> list[dict[str, Any]]:
    """Every row as data for JSON."""
    return [
        {
            "case": row.case.name, "mode": row.mode, "phase": row.phase, "variant": row.name,
            "seconds": None if row.timing is None else list(row.timing.seconds), "flops": row.flops,
            "gflops": row.gflops, "peak_gflops": row.peak, "wrong": row.wrong,
        }
        for group in groups
        for row in group
    ]  # fmt: skip
