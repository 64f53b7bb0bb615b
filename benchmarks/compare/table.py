"""The table of a comparison: every contender, the speed relative to the best library, the share of the peak."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rich.table import Table

from benchmarks.compare.runner import ComparedRow
from fusedrnn.bench.data import FUSED
from fusedrnn.bench.tables import Column, duration, label, make_table, percent, share_text

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


def compared_table(rows: Sequence[ComparedRow]) -> Table:
    """Time of a call of every contender. The fastest library is bold, and one that was not timed is a dash."""
    first = rows[0]
    columns = [_time_column(name) for name in (FUSED, *first.peers, *first.revisions)]
    if first.peers:
        columns.append(("times\nthe\nbest", _over_best))
    columns += [(f"times\n{revision}", partial(_over, revision)) for revision in first.revisions]
    columns.append(("of\nFMA\npeak", lambda row: percent(row.share(), digits=1)))
    if any(_percentile(row, 50) for row in rows):
        columns += [(f"p{rank}\nµs", partial(_percentile, rank=rank)) for rank in (50, 99)]
    return make_table(f"Seconds a call; T, N, I, H in {first.dtype}", label, columns, rows)


def summary(row: ComparedRow) -> str:
    """A finished row in one line."""
    if row.wrong:
        return f"{row.name}: wrong: {row.wrong}"
    over_best = row.over_best_peer()
    ratio = "" if over_best is None else f", {over_best:.2f} times as fast as {row.best_peer}"
    return f"{row.name}: {duration(row.timings[FUSED].median)}{ratio}; {share_text(row)}"


def _time_column(name: str) -> Column[ComparedRow]:
    def cell(row: ComparedRow) -> str:
        if name not in row.timings:
            return "wrong" if row.failures.get(name, "").startswith("wrong") else "-"
        text = duration(row.timings[name].median)
        return f"[bold]{text}[/]" if name == row.best_peer else text

    return _HEADINGS.get(name, name), cell


def _over_best(row: ComparedRow) -> str:
    ratio = row.over_best_peer()
    return "" if ratio is None else f"{ratio:.2f}"


def _over(name: str, row: ComparedRow) -> str:
    return f"{row.ratio(name):.3f}" if name in row.timings else ""


def _percentile(row: ComparedRow, rank: int) -> str:
    timing = row.timings.get(FUSED)
    value = None if timing is None else timing.p50 if rank == 50 else timing.p99
    return "" if value is None else f"{1e6 * value:.1f}"
