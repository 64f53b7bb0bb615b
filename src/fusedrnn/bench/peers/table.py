"""The table of rows with rivals: every one, us, how we stand to the best, how much of the peak we reach."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rich.table import Table

from fusedrnn.bench.computed import FUSED
from fusedrnn.bench.rows import Row
from fusedrnn.bench.tables import Column, duration, label, make_table, percent

_HEADINGS = {
    "onnxruntime": "ONNX\nRuntime",
    "openvino": "Open-\nVINO",
    "pytorch": "PyTorch",
    "jax": "JAX",
    "keras": "Keras",
    "mxnet-fused": "MXNet\nfused",
    "mxnet-cells": "MXNet\ncells",
    FUSED: "Fused-\nRNN",
}


def rivals_table(rows: Sequence[Row]) -> Table:
    """Seconds a call of everybody, the fastest library marked, and what stands for one that was not timed: a dash."""
    first = rows[0]
    columns = [_seconds(who) for who in (FUSED, *first.peers, *first.revisions)]
    if first.peers:
        columns.append(Column("times\nthe\nbest", _over_best))
    columns += [
        Column(f"times\n{revision}", partial(_over, revision)) for revision in first.revisions
    ]
    columns.append(Column("of\nFMA\npeak", lambda row: percent(row.share(), digits=1)))
    if any(_latency(row, 50) for row in rows):
        columns += [Column(f"p{rank}\nµs", partial(_latency, rank=rank)) for rank in (50, 99)]
    return make_table(f"Seconds a call; T, N, I, H in {first.dtype}", label, columns, rows)


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for each rival and reason for which it was not timed, with the rows that this concerns."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for who, reason in row.failures.items():
            found.setdefault((who, reason), []).append(row.name)
    return [f"{who}: {reason} ({_places(names, len(rows))})" for (who, reason), names in found.items()]


def _places(names: Sequence[str], total: int) -> str:
    return "every row" if len(names) == total > 1 else ", ".join(names)


def _seconds(who: str) -> Column:
    def figure(row: Row) -> str:
        if who not in row.timings:
            return "wrong" if row.failures.get(who, "").startswith("wrong") else "-"
        text = duration(row.timings[who].median)
        return f"[bold]{text}[/]" if who == row.best_peer else text

    return Column(_HEADINGS.get(who, who), figure)


def _over_best(row: Row) -> str:
    ratio = row.over_best_peer()
    return "" if ratio is None else f"{ratio:.2f}"


def _over(who: str, row: Row) -> str:
    return f"{row.ratio(who):.3f}" if who in row.timings else ""


def _latency(row: Row, rank: int) -> str:
    timing = row.timings.get(FUSED)
    value = None if timing is None else timing.p50 if rank == 50 else timing.p99
    return "" if value is None else f"{1e6 * value:.1f}"
