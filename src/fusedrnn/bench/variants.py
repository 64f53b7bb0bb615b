"""Variants of a cell beside the plain one: each one's share of the peak, and that as a part of the plain one's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import fusedrnn
from fusedrnn.bench import torch_modules
from fusedrnn.bench.checks import check
from fusedrnn.bench.computed import FUSED, TORCH, Contender
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import Workload, parameters, workload
from fusedrnn.bench.mxnet_page import NAMES
from fusedrnn.bench.peaks import RunPeak, refusal, share_of, until_plausible
from fusedrnn.bench.tables import duration, percent
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
"""What is compared with each cell, by name."""


@dataclass(frozen=True)
class Line:
    """One variant as measured.

    Attributes:
        case, mode, phase: What ran.
        name: The variant.
        flops: Useful floating-point operations of a call.
        timing: Seconds of a call; None if it was wrong.
        peak: GFLOP/s that the threads did nothing but multiply-adds at, the best that the run has measured by then.
        wrong: What was wrong.
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
        """Useful work a second."""
        return 0.0 if self.timing is None else self.flops / self.timing.median * 1e-9

    @property
    def share(self) -> float | None:
        """That as a part of the peak; None if there is no timing, or if it comes out above 1."""
        return None if self.timing is None else share_of(self.gflops, self.peak)

    @property
    def refused(self) -> str | None:
        """Why there is a rate but no share of the peak, or None."""
        return refusal(self.gflops, self.peak)


def run(
    cases: Sequence[Case], modes: Sequence[str], phases: Sequence[Phase], dtype: str, threads: int, budget: float,
    say: Callable[[str], None],
) -> Iterator[list[Line]]:  # fmt: skip
    """The lines of each case, cell and phase, the plain cell's first; ``say`` is told what is being done.

    All variants of a cell take turns, in one process, on the same threads and text. Each is checked against the
    reference before it is timed.
    """
    try:
        import torch  # noqa: F401 -- its projection is compared with ours, if it is there
    except ModuleNotFoundError:
        with_torch: Any = nullcontext()
    else:
        with_torch = torch_modules.threads(threads)
    with fusedrnn.thread_limits(threads), with_torch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        peak = RunPeak(dtype, threads)
        for case in cases:
            for mode in modes:
                for phase in phases:
                    say(f"{case.name} {NAMES[mode]}-{phase.name.capitalize()}")
                    yield _lines(case, mode, phase, dtype, peak, budget)


def _lines(case: Case, mode: str, phase: Phase, dtype: str, peak: RunPeak, budget: float) -> list[Line]:
    plain = workload(case, mode, dtype)
    works = {PLAIN: plain}
    for name, change in VARIANTS[mode].items():
        if name == REVERSE and case.bidirectional:
            continue
        spec = change(plain.spec)
        works[name] = replace(plain, spec=spec, params=parameters(spec))
    makers = {name: phase.makers[FUSED] for name in works}
    if PROJECTION in works and _torch_is_there():
        works[IN_TORCH_NN], makers[IN_TORCH_NN] = works[PROJECTION], phase.makers[TORCH]
    calls, wrong = {}, {}
    for name, work in works.items():
        contender: Contender = makers[name](work)
        wrong[name] = check(work, phase, {name: contender}, _flops(work, phase))
        if not wrong[name]:
            calls[name] = partial(contender, work.batch(case.T))

    def take_turns() -> dict[str, Timing]:
        return alternate(calls, budget * len(calls), pause=PAUSE, before_turn=peak.sample)[0]

    def lines(timings: Mapping[str, Timing]) -> list[Line]:
        return [
            Line(case, mode, phase.name, name, _flops(work, phase), timings.get(name), peak.gflops, wrong[name])
            for name, work in works.items()
        ]

    def fastest(timings: Mapping[str, Timing]) -> float:
        return max(line.gflops for line in lines(timings))

    return lines(until_plausible(peak, take_turns, fastest))


def _flops(work: Workload, phase: Phase) -> int:
    return work.flops(training=phase.training)


def _torch_is_there() -> bool:
    from importlib.util import find_spec

    return find_spec("torch") is not None


def table(groups: Sequence[Sequence[Line]]) -> Table:
    """Every line: a call's time, useful work, share of the peak, and that as a part of the plain cell's."""
    made = Table(title="Variants", title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    for heading in ("", "variant", "a call", "GFLOP/s", "of FMA\npeak", "of plain\nshare"):
        made.add_column(heading, justify="left" if heading in ("", "variant") else "right", no_wrap=True)
    for group in groups:
        first = group[0]
        for line in group:
            name = f"{line.case.name} {NAMES[line.mode]}-{line.phase.capitalize()}" if line is first else ""
            if line.timing is None:
                made.add_row(name, line.name, "[bold red]wrong[/]")
                continue
            of_plain = percent(line.gflops / first.gflops, digits=1) if first.gflops else ""
            figures = duration(line.timing.median), f"{line.gflops:.1f}", percent(line.share, digits=1), of_plain
            made.add_row(name, line.name, *figures)
    return made


def figures(groups: Sequence[Sequence[Line]]) -> list[dict[str, Any]]:
    """The same for a file."""
    return [
        {
            "case": line.case.name, "mode": line.mode, "phase": line.phase, "variant": line.name,
            "seconds": None if line.timing is None else list(line.timing.seconds), "flops": line.flops,
            "gflops": line.gflops, "peak_gflops": line.peak, "wrong": line.wrong,
        }
        for group in groups
        for line in group
    ]  # fmt: skip
