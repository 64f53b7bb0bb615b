"""Rows as text: MXNet's two tables in their published form, every other row in a general one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fusedrnn.bench.results import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED
from fusedrnn.bench.rows import AnyRow, Row
from fusedrnn.testing.cases import CASES, Case

MODE_NAMES: Mapping[str, str] = {"lstm": "LSTM", "gru": "GRU", "rnn_relu": "vRNN(Relu)", "rnn_tanh": "vRNN(Tanh)"}
"""Names of the modes on MXNet's page, in its order."""

_MXNET_PHASES = ("inference", "training")
_MXNET_PERCENT: Mapping[str, tuple[tuple[float, float], ...]] = {
    "ds2": ((210.98, 209.65), (305.87, 214.03), (296.92, 176.79), (193.33, 161.08)),
    "ds2-5bi": ((287.67, 249.73), (333.33, 260.64), (329.53, 159.17), (267.71, 149.66)),
}
"""Fused over non-fused samples per second, as published for MXNet's fused RNN operator on two Xeon 8180 sockets.

By mode and phase; T, N, I, H = 300, 20, 800, 800 in float32.
"""


@dataclass(frozen=True)
class Column(Generic[AnyRow]):
    """A heading, and the cell of a measured row."""

    heading: str
    cell: Callable[[AnyRow], str]


_STEPS_RUN = Column[Row]("steps\nrun", lambda row: str(row.steps_run.get(NON_FUSED, row.case.T)))
"""How many steps the non-fused network ran; only if it did not run all of them in some row."""
_RATES = (
    Column[Row](
        "Non-\nFusedRNN\nsamples/sec", lambda row: f"{number(row.rate(NON_FUSED))}{_deviation(row, NON_FUSED)}"
    ),
    Column[Row]("FusedRNN\nsamples/\nsec", lambda row: number(row.rate(FUSED))),
    Column[Row]("FusedRNN/\nNon-\nFusedRNN", lambda row: percent(row.ratio(NON_FUSED))),
)
_PUBLISHED = Column[Row]("on\nMXNet's\npage", lambda row: percent(published_percent(row), of=100.0))
_AGAINST_TORCH = (
    Column[Row]("torch.nn\nsamples/sec", lambda row: number(row.rate(TORCH))),
    Column[Row]("FusedRNN/\ntorch.nn", lambda row: percent(row.ratio(TORCH))),
)
_MODULES = (
    Column[Row]("torch.nn\nsamples/sec", lambda row: number(row.rate(TORCH))),
    Column[Row]("fused\nin torch\nsamples/sec", lambda row: number(row.rate(IN_TORCH))),
    Column[Row]("fused\nin torch/\ntorch.nn", lambda row: percent(row.ratio(TORCH, IN_TORCH))),
)
_OF_UNPACKED = Column[Row]("of\nunpacked\nGFLOP/s", lambda row: percent(row.packed_over_unpacked(), digits=1))

_UNITS = ((1e-6, "µs"), (1e-3, "ms"))

SHORT_CALL = 1e-3
"""Calls of fewer seconds than this get a column in microseconds."""


def tables(rows: Sequence[Row], contenders: Collection[str]) -> list[Table]:
    """A table for each of MXNet's that has rows, one for the other rows, and one for PyTorch modules."""
    all_tables = _operator_tables(rows, _AGAINST_TORCH if TORCH in contenders else ()) if FUSED in contenders else []
    if IN_TORCH in contenders and rows:
        packed = (_OF_UNPACKED,) if UNPACKED in contenders else ()
        columns = (*_MODULES, *_work(IN_TORCH), *packed, *_microsecond_columns((TORCH, IN_TORCH), rows))
        title = f"Modules of PyTorch, T, N, I, H in {rows[0].dtype}"
        all_tables.append(make_table(f"{title}, lengths in [T/2, T]" if packed else title, label, columns, rows))
    return all_tables


def engines_table(rows: Sequence[Row]) -> Table:
    """For each row and engine: time of a call, useful work per second, and speed relative to the first engine."""
    table = _new_table(f"Engines, T, N, I, H in {rows[0].dtype}")
    for heading in ("engine", "a call", "GFLOP/s", "of\nFMA\npeak", "times\nthe first"):
        table.add_column(heading, justify="left" if heading == "engine" else "right", no_wrap=True)
    for row in rows:
        name, sizes = label(row).split("\n")
        lines = [(engine, *_engine_cells(row, engine)) for engine in row.backends]
        for index, line in enumerate(lines if len(lines) > 1 else [*lines, ("",)]):
            table.add_row((name, sizes, *[""] * len(lines))[index], *line)
    return table


def _engine_cells(row: Row, engine: str) -> tuple[str, ...]:
    if row.wrong:
        return ("[bold red]wrong[/]",)
    if engine not in row.timings:
        return ("declines",)
    share = percent(row.share(engine), digits=1)
    over_first = "" if engine == row.ours else f"{row.ratio(row.ours, engine):.3f}"
    return duration(row.timings[engine].median), f"{row.gflops(engine):.1f}", share, over_first


def _operator_tables(rows: Sequence[Row], extra: Sequence[Column[Row]]) -> list[Table]:
    by_case: dict[Case, list[Row]] = {}
    others = []
    for row in rows:
        if published_percent(row) is None:
            others.append(row)
        else:
            by_case.setdefault(row.case, []).append(row)
    work = _work(FUSED)
    all_tables = [
        make_table(_sizes(case), mxnet_label, (*_rates(case_rows), _PUBLISHED, *work, *extra), case_rows)
        for case, case_rows in by_case.items()
    ]
    if others:
        columns = (*_rates(others), *work, *extra, *_microsecond_columns((FUSED,), others))
        all_tables.append(make_table(f"T, N, I, H in {others[0].dtype}", label, columns, others))
    return all_tables


def _rates(rows: Sequence[Row]) -> tuple[Column[Row], ...]:
    non_fused, *others = _RATES
    return (non_fused, _STEPS_RUN, *others) if any(row.steps_run for row in rows) else _RATES


def _deviation(row: Row, contender: str) -> str:
    deviation = row.timings[contender].deviation
    return "" if deviation is None else f" ±{100 * deviation:.0f}%"


def extrapolated_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each contender whose time is extrapolated: in how many rows, and from how many steps."""
    by_contender: dict[str, list[Row]] = {}
    for row in rows:
        for name in row.steps_run:
            by_contender.setdefault(name, []).append(row)
    return [
        f"{name} measured on {_range([row.steps_run[name] for row in members])} of "
        f"{_range([row.case.T for row in members])} steps in {len(members)} of {len(rows)} rows, the time of all steps "
        "extrapolated; --full runs all steps"
        for name, members in by_contender.items()
    ]


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def rejected_share_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each share of the peak that is not shown because it is above 1."""
    return [f"{row.name}, {name}: {reason}" for row in rows for name, reason in row.rejected_shares.items()]


def failure_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each contender and reason for which it has no timing, with the rows that this concerns."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for contender, reason in row.failures.items():
            names.setdefault((contender, reason), []).append(row.name)
    return [
        f"{contender}: {reason} ({'every row' if len(where) == len(rows) > 1 else ', '.join(where)})"
        for (contender, reason), where in names.items()
    ]


def _work(contender: str) -> tuple[Column[Row], ...]:
    return (
        Column[Row]("GFLOP/s", lambda row: f"{row.gflops(contender):.1f}"),
        Column[Row]("of\nFMA\npeak", lambda row: percent(row.share(contender), digits=1)),
    )


def _microsecond_columns(contenders: Sequence[str], rows: Sequence[Row]) -> list[Column[Row]]:
    """A column for each contender that has short calls."""
    headings = {FUSED: "FusedRNN", TORCH: "torch.nn", IN_TORCH: "fused\nin torch"}
    return [
        Column(f"{headings[name]}\nµs/call", partial(_microseconds, name))
        for name in contenders
        if any(_microseconds(name, row) for row in rows)
    ]


def _microseconds(contender: str, row: Row) -> str:
    """Microseconds of a call; empty if it is not short."""
    seconds = row.timings[contender].median if contender in row.timings else math.inf
    return number(1e6 * seconds) if seconds < SHORT_CALL else ""


def summary(row: Row) -> str:
    """A finished row in one line."""
    if row.wrong:
        return f"{row.name}: wrong: {row.wrong}"
    if not row.timings:
        return f"{row.name}: every engine declines"
    rates = ", ".join(f"{name} {number(row.rate(name))}" for name in row.timings)
    packed = f"; {percent(row.packed_over_unpacked(), digits=1)} of unpacked GFLOP/s" if UNPACKED in row.timings else ""
    steps = row.steps_run.get(NON_FUSED)
    extrapolated = f" (measured on {steps} of {row.case.T} steps)" if steps else ""
    return f"{row.name}: samples/sec {rates}{extrapolated}; {share_text(row)}{packed}"


def share_text(row: Row) -> str:
    """The share of the peak of ours in words."""
    share = row.share()
    return "above the FMA peak as measured" if share is None else f"{percent(share, digits=1)} of the FMA peak"


def published_percent(row: Row) -> float | None:
    """MXNet's published ratio in percent for this workload, or None."""
    case = row.case
    if case.name not in _MXNET_PERCENT or case != CASES[case.name] or row.dtype != "float32":
        return None
    if row.phase not in _MXNET_PHASES:
        return None
    return _MXNET_PERCENT[case.name][list(MODE_NAMES).index(row.mode)][_MXNET_PHASES.index(row.phase)]


def mxnet_label(row: Row) -> str:
    """The row's name in MXNet's tables, such as ``LSTM-Inference``."""
    return f"{MODE_NAMES[row.mode]}-{row.phase.capitalize()}"


def label(row: Row) -> str:
    """The row's name, and its sizes on a second line."""
    case = row.case
    sizes = f"{case.T},{case.N},{case.I},{case.H}"
    depth = f" layers {case.layers}" if case.layers > 1 else ""
    return f"{case.name} {mxnet_label(row)}\n  {sizes}{depth}{' both ways' if case.bidirectional else ''}"


def _sizes(case: Case) -> str:
    sizes = f"{case.T}, {case.N}, {case.I}, {case.H}"
    return f"T, N, I, H = {sizes} layer={case.layers} bidirection={case.bidirectional}"


def make_table(
    title: str, name: Callable[[AnyRow], str], columns: Sequence[Column[AnyRow]], rows: Sequence[AnyRow]
) -> Table:
    """A line for each row: its ``name``, and its cells or that it is wrong."""
    table = _new_table(title)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for row in rows:
        cells = ["[bold red]wrong[/]"] if row.wrong else [column.cell(row) for column in columns]
        table.add_row(name(row), *cells)
    return table


def _new_table(title: str) -> Table:
    # Fits a terminal of 80 columns.
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("", no_wrap=True)
    return table


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if seconds < scale * 1e3), (1.0, "s"))
    value = seconds / scale
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f} {unit}"


def number(value: float) -> str:
    """Two decimals, or none for a large number."""
    return f"{value:.2f}" if value < 1e4 else f"{value:,.0f}"


def percent(value: float | None, *, of: float = 1.0, digits: int = 2) -> str:
    """``value`` as a percentage of ``of``; empty for None."""
    return "" if value is None else f"{100.0 * value / of:.{digits}f}%"
