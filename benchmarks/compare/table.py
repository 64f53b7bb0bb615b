"""The table of a comparison: every contender, the speed relative to the best library, and the share of the peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest

from rich.table import Table

from benchmarks.compare.runner import ComparedRow
from fusedrnn.bench.data import FUSED, IN_FORMAT, OURS
from fusedrnn.bench.lines import share_text
from fusedrnn.bench.tables import WRONG, Column, duration, label, make_table, new_table, percent

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
    """The time of a call of every contender. The fastest library is bold; a contender that was not timed has a dash."""
    first = rows[0]
    columns = [_time_column(name) for name in (FUSED, *first.peers, *first.revisions)]
    if first.peers:
        columns.append(("times\nthe\nbest", _over_best))
    columns += [(f"times\n{revision}", partial(_over, revision)) for revision in first.revisions]
    columns.append(("of\nFMA\npeak", lambda row: percent(row.share(), digits=1)))
    if any(_percentile(row, 50) for row in rows):
        columns += [(f"p{rank}\nµs", partial(_percentile, rank=rank)) for rank in (50, 99)]
    return make_table(f"Seconds a call; T, N, I, H in {first.dtype}", label, columns, rows)


def formats_table(rows: Sequence[ComparedRow]) -> Table:
    """A line for each contender of each row, the formats one after another.

    A line has the time of a call and the share of the format's peak. For the operator it has the speed relative to the
    operator in float32; for a library it has the operator's speed in the same format, relative to the library. The
    fastest library of a format is bold.
    """
    headings = "", "contender", "a call", "GFLOP/s", "of the\nformat's\npeak", "times\nfloat32", "ours over\nit"
    table = new_table(f"Formats of GEMM operands; T, N, I, H in {rows[0].dtype}", headings, left=2)
    for row in rows:
        ours = {number_format: name for name, number_format in row.formats.items() if name in OURS}
        by_format = sorted(row.formats, key=lambda name: (list(ours).index(row.formats[name]), name not in OURS))
        names = [name for name in by_format if name in row.timings]
        for line, name in zip_longest(label(row).split("\n"), names, fillvalue=""):
            table.add_row(line, *([WRONG] if row.wrong else _format_cells(row, name, ours) if name else []))
    return table


def _format_cells(row: ComparedRow, name: str, ours: Mapping[str, str]) -> list[str]:
    own = ours[row.formats[name]]
    over_float32 = row.over_float32(name) if name in OURS and name != FUSED else None
    ours_over_it = row.ratio(name, own) if name not in OURS and own in row.timings else None
    cells = [name, duration(row.timings[name].median), f"{row.gflops(name):.1f}", percent(row.share(name), digits=1)]
    if name == row.best_peer_of(own):
        cells[:2] = [f"[bold]{text}[/]" for text in cells[:2]]
    return cells + ["" if ratio is None else f"{ratio:.2f}" for ratio in (over_float32, ours_over_it)]


def summary(row: ComparedRow) -> str:
    """A finished row in one line."""
    if row.wrong:
        return f"{row.name}: wrong: {row.wrong}"
    texts = [_summary(row, name) for name in IN_FORMAT.values() if name in row.timings]
    return f"{row.name}: {'; '.join(texts) or 'nothing to time'}"


def _summary(row: ComparedRow, name: str) -> str:
    over_best = row.over_best_peer(name)
    ratio = "" if over_best is None else f", {over_best:.2f} times as fast as {row.best_peer_of(name)}"
    return f"{f'{name} ' if row.formats else ''}{duration(row.timings[name].median)}{ratio}; {share_text(row, name)}"


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
