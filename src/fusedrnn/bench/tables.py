"""Rows as text: MXNet's two tables in their published form, and a general table for all other rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fusedrnn.bench.data import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED
from fusedrnn.bench.rows import AnyRow, Row
from fusedrnn.bench.variants import PLAIN
from fusedrnn.testing.cases import CASES, Case

MODE_NAMES: Mapping[str, str] = {"lstm": "LSTM", "gru": "GRU", "rnn_relu": "vRNN(Relu)", "rnn_tanh": "vRNN(Tanh)"}
"""The names of the modes on MXNet's page, in the order of the page."""

_MXNET_PERCENT: Mapping[tuple[str, str], tuple[float, ...]] = {
    ("ds2", "inference"): (210.98, 305.87, 296.92, 193.33),
    ("ds2", "training"): (209.65, 214.03, 176.79, 161.08),
    ("ds2-5bi", "inference"): (287.67, 333.33, 329.53, 267.71),
    ("ds2-5bi", "training"): (249.73, 260.64, 159.17, 149.66),
}
"""Fused over non-fused samples per second, as published for MXNet's fused operator on two sockets of Xeon 8180.

The keys are case and phase, then mode; T, N, I, H = 300, 20, 800, 800 in float32.
"""

Column = tuple[str, Callable[[AnyRow], str]]
"""A heading, and the function that makes the text for a row."""

WRONG = "[bold red]wrong[/]"
SHORT_CALL = 1e-3
"""Calls that take fewer seconds than this get a column in microseconds."""


def tables(rows: Sequence[Row], contenders: Collection[str]) -> list[Table]:
    """The tables of MXNet that have rows, a table for the other rows, and a table for PyTorch modules."""
    all_tables = []
    if FUSED in contenders:
        all_tables += _operator_tables(rows, torch=TORCH in contenders)
    if IN_TORCH in contenders and rows:
        packed = UNPACKED in contenders
        columns = [
            _rate_column(f"{_torch_name(rows)}\nsamples/sec", TORCH),
            _rate_column("fused\nin torch\nsamples/sec", IN_TORCH),
            (f"fused\nin torch/\n{_torch_name(rows)}", lambda row: percent(row.ratio(TORCH, IN_TORCH))),
            *_work_columns(IN_TORCH),
        ]
        if packed:
            columns.append(("of\nunpacked\nGFLOP/s", lambda row: percent(row.packed_over_unpacked(), digits=1)))
        columns += _microsecond_columns((TORCH, IN_TORCH), rows)
        title = f"Modules of PyTorch, T, N, I, H in {rows[0].dtype}{', lengths in [T/2, T]' if packed else ''}"
        all_tables.append(make_table(title, label, columns, rows))
    return all_tables


def _torch_name(rows: Sequence[Row]) -> str:
    """The name of the contender in PyTorch: its module, or a loop of its operations for cells that it lacks."""
    return "torch loop" if rows and rows[0].cell else "torch.nn"


def _operator_tables(rows: Sequence[Row], torch: bool) -> list[Table]:
    in_torch = _torch_name(rows)
    against_torch: list[Column[Row]] = [
        _rate_column(f"{in_torch}\nsamples/sec", TORCH),
        (f"FusedRNN/\n{in_torch}", lambda row: percent(row.ratio(TORCH))),
    ]
    on_page: Column[Row] = "on\nMXNet's\npage", lambda row: percent(published_percent(row), of=100.0)
    groups: dict[Case | None, list[Row]] = {}
    for row in sorted(rows, key=lambda row: published_percent(row) is None):
        groups.setdefault(None if published_percent(row) is None else row.case, []).append(row)
    all_tables = []
    for case, members in groups.items():
        title = f"T, N, I, H in {members[0].dtype}"
        if case:
            sizes = f"{case.T}, {case.N}, {case.I}, {case.H}"
            title = f"T, N, I, H = {sizes} layer={case.layers} bidirection={case.bidirectional}"
        columns = [*_rate_columns(members), *([on_page] if case else ()), *_work_columns(FUSED)]
        columns += [*(against_torch if torch else ()), *_microsecond_columns((FUSED,), members)]
        all_tables.append(make_table(title, mxnet_label if case else label, columns, members))
    return all_tables


def _rate_columns(rows: Sequence[Row]) -> list[Column[Row]]:
    """Samples per second of both networks; if some row has fewer steps of the non-fused network, also these steps."""

    def non_fused(row: Row) -> str:
        deviation = row.timings[NON_FUSED].deviation
        return number(row.rate(NON_FUSED)) + ("" if deviation is None else f" ±{100 * deviation:.0f}%")

    columns: list[Column[Row]] = [
        ("Non-\nFusedRNN\nsamples/sec", non_fused),
        _rate_column("FusedRNN\nsamples/\nsec", FUSED),
        ("FusedRNN/\nNon-\nFusedRNN", lambda row: percent(row.ratio(NON_FUSED))),
    ]
    if any(row.steps_run for row in rows):
        columns.insert(1, ("steps\nrun", lambda row: str(row.steps_run.get(NON_FUSED, row.case.T))))
    return columns


def _rate_column(heading: str, contender: str) -> Column[Row]:
    return heading, lambda row: number(row.rate(contender))


def _work_columns(contender: str) -> list[Column[Row]]:
    return [
        ("GFLOP/s", lambda row: f"{row.gflops(contender):.1f}"),
        ("of\nFMA\npeak", lambda row: percent(row.share(contender), digits=1)),
    ]


def _microsecond_columns(contenders: Sequence[str], rows: Sequence[Row]) -> list[Column[Row]]:
    """A column for each contender that has short calls."""
    headings = {FUSED: "FusedRNN", TORCH: _torch_name(rows), IN_TORCH: "fused\nin torch"}
    return [
        (f"{headings[name]}\nµs/call", partial(_microseconds, name))
        for name in contenders
        if any(_microseconds(name, row) for row in rows)
    ]


def _microseconds(contender: str, row: Row) -> str:
    """Microseconds of a call; empty if it is not short."""
    seconds = row.timings[contender].median if contender in row.timings else math.inf
    return number(1e6 * seconds) if seconds < SHORT_CALL else ""


def engines_table(rows: Sequence[Row]) -> Table:
    """For each row and engine: time of a call, useful work per second, and speed relative to the first engine."""

    def over_first(row: Row, engine: str) -> str:
        return "" if engine == row.ours else f"{row.ratio(row.ours, engine):.3f}"

    return _contenders_table(f"Engines, T, N, I, H in {rows[0].dtype}", "engine", "times\nthe first", over_first, rows)


def formats_table(rows: Sequence[Row]) -> Table:
    """For each row and format of operands: time of a call, useful work per second, and speed relative to float32."""

    def over_float32(row: Row, name: str) -> str:
        ratio = row.over_float32(name)
        return "" if ratio is None or name == FUSED else f"{ratio:.3f}"

    title = f"Formats of GEMM operands, T, N, I, H in {rows[0].dtype}"
    return _contenders_table(title, "operator", "times\nfloat32", over_float32, rows, "of the\nformat's\npeak")


def variants_table(rows: Sequence[Row]) -> Table:
    """For each row and variant: time of a call, useful work per second, and its share relative to the plain cell."""

    def of_plain(row: Row, variant: str) -> str:
        return percent(row.gflops(variant) / row.gflops(PLAIN), digits=1) if PLAIN in row.timings else ""

    return _contenders_table("Variants", "variant", "of plain\nshare", of_plain, rows)


def _contenders_table(
    title: str,
    kind: str,
    heading: str,
    relative: Callable[[Row, str], str],
    rows: Sequence[Row],
    peak_heading: str = "of\nFMA\npeak",
) -> Table:
    """A line for each contender of each row."""
    table = new_table(title, ("", kind, "a call", "GFLOP/s", peak_heading, heading), left=2)
    for row in rows:
        for line, name in zip_longest(label(row).split("\n"), row.backends or row.flops_of, fillvalue=""):
            cells: tuple[str, ...] = ()
            if row.wrong or row.failures.get(name, "").startswith("wrong"):
                cells = (WRONG,) if name else ()
            elif name in row.timings:
                gflops, share = f"{row.gflops(name):.1f}", percent(row.share(name), digits=1)
                cells = duration(row.timings[name].median), gflops, share, relative(row, name)
            elif name:
                cells = ("declines",)
            table.add_row(line, name, *cells)
    return table


def published_percent(row: Row) -> float | None:
    """MXNet's published ratio in percent for this workload, or None."""
    by_mode = _MXNET_PERCENT.get((row.case.name, row.phase))
    if by_mode is None or row.case != CASES[row.case.name] or row.dtype != "float32":
        return None
    return dict(zip(MODE_NAMES, by_mode, strict=True)).get(row.mode)


def mxnet_label(row: Row) -> str:
    """The row's name in MXNet's tables, such as ``LSTM-Inference``."""
    return f"{MODE_NAMES.get(row.mode, row.mode)}-{row.phase.capitalize()}"


def label(row: Row) -> str:
    """The row's name, and its sizes on a second line."""
    case = row.case
    sizes = f"{case.T},{case.N},{case.I},{case.H}"
    depth = f" layers {case.layers}" if case.layers > 1 else ""
    return f"{case.name} {mxnet_label(row)}\n  {sizes}{depth}{' both ways' if case.bidirectional else ''}"


def make_table(
    title: str, name: Callable[[AnyRow], str], columns: Sequence[Column[AnyRow]], rows: Sequence[AnyRow]
) -> Table:
    """A table with a line for each row: its ``name``, and its texts or that it is wrong."""
    table = new_table(title, ("", *(heading for heading, _ in columns)))
    for row in rows:
        table.add_row(name(row), *([WRONG] if row.wrong else [cell(row) for _, cell in columns]))
    return table


def new_table(title: str, headings: Iterable[str], left: int = 1) -> Table:
    """An empty table whose first ``left`` columns are flush left. It is as narrow as possible."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=0)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", no_wrap=True)
    return table


def duration(seconds: float) -> str:
    """A duration with three digits and a unit."""
    scale, unit = (1e-6, "µs") if seconds < 1e-3 else (1e-3, "ms") if seconds < 1.0 else (1.0, "s")
    value = seconds / scale
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f} {unit}"


def number(value: float) -> str:
    """A number with two decimals; with none if it is large."""
    return f"{value:.2f}" if value < 1e4 else f"{value:,.0f}"


def percent(value: float | None, *, of: float = 1.0, digits: int = 2) -> str:
    """``value`` as a percentage of ``of``, without decimals if it is large; empty for None."""
    if value is None:
        return ""
    percentage = 100.0 * value / of
    return f"{percentage:.{digits}f}%" if percentage < 1e4 else f"{percentage:,.0f}%"
