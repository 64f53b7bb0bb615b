"""A benchmark as data: every figure, for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fusedrnn.bench.contenders import FUSED
from fusedrnn.bench.facts import machine
from fusedrnn.bench.mxnet_page import published_percent
from fusedrnn.bench.runner import Plan, Row


def report(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """The machine, what was asked for, and a dictionary for each row. Seconds are for a call, peak in GFLOP/s."""
    return {
        "machine": machine(),
        "plan": {
            "cases": [case.name for case in plan.cases],
            "modes": list(plan.modes),
            "phases": [phase.name for phase in plan.phases],
            "dtype": plan.dtype,
            "threads": plan.threads,
            "input": "text" if plan.data is None else "user",
        },
        "rows": [row_figures(row) for row in rows],
    }


def row_figures(row: Row) -> dict[str, Any]:
    """Every figure of a row; one that was not measured, in a wrong row, is None or missing from its table."""
    measured = FUSED in row.timings
    return {
        "case": asdict(row.case),
        "mode": row.mode,
        "phase": row.phase,
        "dtype": row.dtype,
        "threads": row.threads,
        "wrong": row.wrong,
        "flops": row.flops,
        "seconds": {
            who: {"median": timing.median, "spread": timing.spread, "samples": list(timing.seconds)}
            for who, timing in row.timings.items()
        },
        "samples_per_second": {who: row.rate(who) for who in row.timings},
        "gflops": {who: row.gflops(who) for who in row.timings},
        "fused_over": {who: row.ratio(who) for who in row.timings if who != FUSED},
        "mxnet_percent": published_percent(row.case, row.mode, row.phase, row.dtype),
        "peak": row.peak,
        "share_of_peak": row.share() if measured else None,
    }
