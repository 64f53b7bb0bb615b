"""Rows as tables: MXNet's two in their own form, everything else in a general one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fusedrnn.bench.computed import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED
from fusedrnn.bench.mxnet_page import NAMES, published_percent
from fusedrnn.bench.rows import Row
from fusedrnn.testing.cases import Case


@dataclass(frozen=True)
class Column:
    """A heading, and what a measured row has under it."""

    heading: str
    figure: Callable[[Row], str]


STEPS = Column("steps\nrun", lambda row: str(row.parts.get(NON_FUSED, row.case.T)))
"""On how many of the steps the non-fused network was measured; only where that was not on all, in some row."""
RATES = (
    Column("Non-\nFusedRNN\nsamples/sec", lambda row: f"{number(row.rate(NON_FUSED))}{_deviation(row, NON_FUSED)}"),
    Column("FusedRNN\nsamples/\nsec", lambda row: number(row.rate(FUSED))),
    Column("FusedRNN/\nNon-\nFusedRNN", lambda row: percent(row.ratio(NON_FUSED))),
)
PUBLISHED = Column("on\nMXNet's\npage", lambda row: percent(published(row), of=100.0))
AGAINST_TORCH = (
    Column("torch.nn\nsamples/sec", lambda row: number(row.rate(TORCH))),
    Column("FusedRNN/\ntorch.nn", lambda row: percent(row.ratio(TORCH))),
)
MODULES = (
    Column("torch.nn\nsamples/sec", lambda row: number(row.rate(TORCH))),
    Column("fused\nin torch\nsamples/sec", lambda row: number(row.rate(IN_TORCH))),
    Column("fused\nin torch/\ntorch.nn", lambda row: percent(row.ratio(TORCH, IN_TORCH))),
)
OF_UNPACKED = Column("of\nunpacked\nGFLOP/s", lambda row: percent(row.of_unpacked(), digits=1))

_UNITS = ((1e-6, "µs"), (1e-3, "ms"))

SHORT_CALL = 1e-3
"""Seconds below which a call is worth showing in microseconds."""


def tables(rows: Sequence[Row], contenders: Collection[str]) -> list[Table]:
    """One table for each of MXNet's that has rows, one for all the rest, and one for modules of PyTorch."""
    made = _operator_tables(rows, AGAINST_TORCH if TORCH in contenders else ()) if FUSED in contenders else []
    if IN_TORCH in contenders and rows:
        packed = (OF_UNPACKED,) if UNPACKED in contenders else ()
        columns = (*MODULES, *_use(IN_TORCH), *packed, *_short((TORCH, IN_TORCH), rows))
        title = f"Modules of PyTorch, T, N, I, H in {rows[0].dtype}"
        made.append(make_table(f"{title}, lengths in [T/2, T]" if packed else title, label, columns, rows))
    return made


def engines_table(rows: Sequence[Row]) -> Table:
    """For each row and engine the time of a call, useful work a second, and how it stands to the first engine."""
    table = _new_table(f"Engines, T, N, I, H in {rows[0].dtype}")
    for heading in ("engine", "a call", "GFLOP/s", "of\nFMA\npeak", "times\nthe first"):
        table.add_column(heading, justify="left" if heading == "engine" else "right", no_wrap=True)
    for row in rows:
        name, sizes = label(row).split("\n")
        lines = [(who, *_on_engine(row, who)) for who in row.backends]
        for index, line in enumerate(lines if len(lines) > 1 else [*lines, ("",)]):
            table.add_row((name, sizes, *[""] * len(lines))[index], *line)
    return table


def _on_engine(row: Row, who: str) -> tuple[str, ...]:
    if row.wrong:
        return ("[bold red]wrong[/]",)
    if who not in row.timings:
        return ("declines",)
    share = percent(row.share(who), digits=1)
    over = "" if who == row.ours else f"{row.ratio(row.ours, who):.3f}"
    return duration(row.timings[who].median), f"{row.gflops(who):.1f}", share, over


def _operator_tables(rows: Sequence[Row], extra: Sequence[Column]) -> list[Table]:
    grouped: dict[Case, list[Row]] = {}
    rest = []
    for row in rows:
        if published(row) is None:
            rest.append(row)
        else:
            grouped.setdefault(row.case, []).append(row)
    use = _use(FUSED)
    made = [
        make_table(_sizes(case), mxnet_label, (*_rates(members), PUBLISHED, *use, *extra), members)
        for case, members in grouped.items()
    ]
    if rest:
        columns = (*_rates(rest), *use, *extra, *_short((FUSED,), rest))
        made.append(make_table(f"T, N, I, H in {rest[0].dtype}", label, columns, rest))
    return made


def _rates(rows: Sequence[Row]) -> tuple[Column, ...]:
    slow, *others = RATES
    return (slow, STEPS, *others) if any(row.parts for row in rows) else RATES


def _deviation(row: Row, who: str) -> str:
    """How far the fastest and the slowest sample are from their middle, as a part of the median."""
    deviation = row.timings[who].deviation
    return "" if deviation is None else f" ±{100 * deviation:.0f}%"


def parts_said(rows: Sequence[Row]) -> list[str]:
    """A line for each contender that was measured on a part of its steps: in how many rows, and on how many steps."""
    measured: dict[str, list[Row]] = {}
    for row in rows:
        for who in row.parts:
            measured.setdefault(who, []).append(row)
    return [_part_said(who, members, len(rows)) for who, members in measured.items()]


def _part_said(who: str, members: Sequence[Row], total: int) -> str:
    run, whole = [row.parts[who] for row in members], [row.case.T for row in members]
    return (
        f"{who} measured on {_range(run)} of {_range(whole)} steps in {len(members)} of {total} rows, "
        "the time of all told from it; --full runs all"
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def refusals(rows: Sequence[Row]) -> list[str]:
    """A line for each share of the peak that came out above 1, so that it is not shown."""
    return [f"{row.name}, {who}: {reason}" for row in rows for who, reason in row.refused.items()]


def _use(who: str) -> tuple[Column, ...]:
    return (
        Column("GFLOP/s", lambda row: f"{row.gflops(who):.1f}"),
        Column("of\nFMA\npeak", lambda row: percent(row.share(who), digits=1)),
    )


def _short(contenders: Sequence[str], rows: Sequence[Row]) -> list[Column]:
    """Microseconds a call of those contenders that have short ones."""
    headings = {FUSED: "FusedRNN", TORCH: "torch.nn", IN_TORCH: "fused\nin torch"}
    return [
        Column(f"{headings[who]}\nµs/call", partial(_microseconds, who))
        for who in contenders
        if any(_microseconds(who, row) for row in rows)
    ]


def _microseconds(who: str, row: Row) -> str:
    """Of a call, empty if it is not short."""
    seconds = row.timings[who].median if who in row.timings else math.inf
    return number(1e6 * seconds) if seconds < SHORT_CALL else ""


def summary(row: Row) -> str:
    """A finished row in a line."""
    if row.wrong:
        return f"{row.name}: wrong: {row.wrong}"
    if not row.timings:
        return f"{row.name}: every engine declines"
    rates = ", ".join(f"{who} {number(row.rate(who))}" for who in row.timings)
    if row.peers or row.revisions:
        best = row.over_best_peer()
        ratio = "" if best is None else f", {best:.2f} times as fast as {row.best_peer}"
        ours = duration(row.timings[FUSED].median)
        return f"{row.name}: {ours}{ratio}; {_said_share(row)}"
    unpacked = f"; {percent(row.of_unpacked(), digits=1)} of unpacked GFLOP/s" if UNPACKED in row.timings else ""
    part = "".join(f" (measured on {steps} of {row.case.T} steps)" for steps in [row.parts.get(NON_FUSED)] if steps)
    return f"{row.name}: samples/sec {rates}{part}; {_said_share(row)}{unpacked}"


def _said_share(row: Row) -> str:
    share = row.share()
    return "above the FMA peak as measured" if share is None else f"{percent(share, digits=1)} of the FMA peak"


def published(row: Row) -> float | None:
    """MXNet's ratio for this row, if it published one."""
    return published_percent(row.case, row.mode, row.phase, row.dtype)


def mxnet_label(row: Row) -> str:
    """The row's name in MXNet's tables, such as ``LSTM-Inference``."""
    return f"{NAMES[row.mode]}-{row.phase.capitalize()}"


def label(row: Row) -> str:
    """The row's name and, in a second line, its sizes."""
    case = row.case
    sizes = f"{case.T},{case.N},{case.I},{case.H}"
    depth = f" layers {case.layers}" if case.layers > 1 else ""
    return f"{case.name} {mxnet_label(row)}\n  {sizes}{depth}{' both ways' if case.bidirectional else ''}"


def _sizes(case: Case) -> str:
    sizes = f"{case.T}, {case.N}, {case.I}, {case.H}"
    return f"T, N, I, H = {sizes} layer={case.layers} bidirection={case.bidirectional}"


def make_table(title: str, name: Callable[[Row], str], columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A line for each row: what ``name`` calls it, and its figures, or that it is wrong."""
    table = _new_table(title)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for row in rows:
        figures = ["[bold red]wrong[/]"] if row.wrong else [column.figure(row) for column in columns]
        table.add_row(name(row), *figures)
    return table


def _new_table(title: str) -> Table:
    # Narrow enough for a terminal of 80 columns.
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
    """Two decimals while they say something."""
    return f"{value:.2f}" if value < 1e4 else f"{value:,.0f}"


def percent(value: float | None, *, of: float = 1.0, digits: int = 2) -> str:
    """``value`` as a part of ``of`` in percent, empty if there is none."""
    return "" if value is None else f"{100.0 * value / of:.{digits}f}%"
