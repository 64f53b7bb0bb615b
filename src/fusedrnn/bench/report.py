"""A benchmark as data: every figure, for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fusedrnn.bench.computed import FUSED, IN_TORCH, TORCH, UNPACKED
from fusedrnn.bench.facts import machine
from fusedrnn.bench.mxnet_page import published_percent
from fusedrnn.bench.rows import Plan, Row
from fusedrnn.bench.traffic import least_bytes


def report(plan: Plan, rows: Sequence[Row], bandwidth: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The machine, what was asked for, and a dictionary for each row.

    Seconds are for a call, peak in GFLOP/s, bandwidth, as :func:`fusedrnn.bench.bandwidth.measure_bandwidth` gives it,
    in GB/s, least_bytes as :func:`fusedrnn.bench.traffic.least_bytes` has it.
    """
    return {
        "machine": machine(),
        "plan": {
            "cases": [case.name for case in plan.cases],
            "modes": list(plan.modes),
            "phases": [phase.name for phase in plan.phases],
            "dtype": plan.dtype,
            "threads": plan.threads,
            "seconds_a_row": plan.budget,
            "full": plan.full,
            "contenders": list(plan.contenders()),
            "peers": list(plan.peers),
            "backends": list(plan.backends),
            "revisions": {revision.name: revision.commit for revision in plan.revisions},
            "packed": plan.packed,
            "input": "text" if plan.data is None else "user",
        },
        "bandwidth": dict(bandwidth or {}),
        "rows": [row_figures(row) for row in rows],
    }


def row_figures(row: Row) -> dict[str, Any]:
    """Every figure of a row; one that was not measured, in a wrong row, is None or missing from its table."""
    others = [who for who in row.timings if who not in (FUSED, IN_TORCH, UNPACKED)]
    return {
        "case": asdict(row.case),
        "mode": row.mode,
        "phase": row.phase,
        "dtype": row.dtype,
        "threads": row.threads,
        "wrong": row.wrong,
        "flops": row.flops,
        "least_bytes": least_bytes(row),
        "lengths": None if row.lengths is None else list(row.lengths),
        "seconds": {
            who: {
                "median": timing.median,
                "spread": timing.spread,
                "deviation": timing.deviation,
                "steps": row.parts.get(who, row.case.T),
                "p50": timing.p50,
                "p99": timing.p99,
                "samples": list(timing.seconds),
            }
            for who, timing in row.timings.items()
        },
        "samples_per_second": {who: row.rate(who) for who in row.timings},
        "gflops": {who: row.gflops(who) for who in row.timings},
        "fused_over": {who: row.ratio(who, FUSED) for who in others if FUSED in row.timings},
        "fused_in_torch_over": {TORCH: row.ratio(TORCH, IN_TORCH)} if {TORCH, IN_TORCH} <= row.timings.keys() else {},
        "best_peer": row.best_peer,
        "fused_over_best_peer": row.over_best_peer(),
        "failures": dict(row.failures),
        "versions": {who: dict(versions) for who, versions in row.versions.items()},
        "packed_over_unpacked": row.of_unpacked() if UNPACKED in row.timings else None,
        "mxnet_percent": published_percent(row.case, row.mode, row.phase, row.dtype),
        "peak": row.peak,
        "share_of_peak": row.share() if row.timings else None,
        "shares_of_peak": {who: row.share(who) for who in row.timings},
        "shares_refused": row.refused,
    }
