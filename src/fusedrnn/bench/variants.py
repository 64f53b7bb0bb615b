"""Compares variants of a cell with the plain cell by their shares of the peak."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from fusedrnn.bench.checks import check
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import FUSED, TORCH, Workload, parameters
from fusedrnn.bench.peaks import RunPeak, measure
from fusedrnn.bench.rows import BenchConfig, Row
from fusedrnn.bench.timing import alternate
from fusedrnn.cell.activations import Activation
from fusedrnn.spec import RNNSpec

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


def run_row(config: BenchConfig, peak: RunPeak, plain: Workload, phase: Phase) -> Row:
    """The plain cell and its variants as contenders of one row, on the same threads and input.

    Each is checked against the reference before it is timed. For variants that fail, the reason is in ``failures``.
    """
    works = {PLAIN: plain}
    for name, change in VARIANTS[plain.spec.mode_name].items():
        if name == REVERSE and plain.spec.bidirectional:
            continue
        spec = change(plain.spec)
        works[name] = replace(plain, spec=spec, params=parameters(spec))
    makers = {name: phase.makers[FUSED] for name in works}
    if PROJECTION in works and find_spec("torch"):
        works[IN_TORCH_NN], makers[IN_TORCH_NN] = works[PROJECTION], phase.makers[TORCH]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        contenders = {name: makers[name](work) for name, work in works.items()}
        wrong = {name: check(work, phase, {name: contenders[name]}) for name, work in works.items()}
        calls = {
            name: partial(contenders[name], work.batch(work.case.T)) for name, work in works.items() if not wrong[name]
        }
        row = Row.of(
            config, plain, phase,
            flops_of={name: work.flops(training=phase.training) for name, work in works.items()},
            failures={name: f"wrong: {difference}" for name, difference in wrong.items() if difference},
        )  # fmt: skip
        budget = config.budget * len(calls)
        row, _ = measure(row, peak, lambda: alternate(calls, budget, pause=config.pause, before_turn=peak.sample))
    return row


def report(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every variant of every row as data for JSON."""
    return [
        {
            "case": row.case.name, "mode": row.mode, "phase": row.phase, "variant": name,
            "seconds": list(row.timings[name].seconds) if name in row.timings else None, "flops": flops,
            "gflops": row.gflops(name) if name in row.timings else 0.0, "peak_gflops": row.peak,
            "wrong": row.failures[name].removeprefix("wrong: ") if name in row.failures else None,
        }
        for row in rows
        for name, flops in row.flops_of.items()
    ]  # fmt: skip
