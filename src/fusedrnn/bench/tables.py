"""Rows as tables: MXNet's two in their own form, everything else in a general one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fusedrnn.bench.cases import Case
from fusedrnn.bench.contenders import FUSED, NON_FUSED, TORCH
from fusedrnn.bench.mxnet_page import NAMES, published_percent
from fusedrnn.bench.runner import Row


@dataclass(frozen=True)
class Column:
    """A heading, and what a measured row has under it."""

    heading: str
    figure: Callable[[Row], str]


RATES = (
    Column("Non-\nFusedRNN\nsamples/sec", lambda row: number(row.rate(NON_FUSED))),
    Column("FusedRNN\nsamples/sec", lambda row: number(row.rate(FUSED))),
    Column("FusedRNN/\nNon-\nFusedRNN", lambda row: percent(row.ratio(NON_FUSED))),
)
PUBLISHED = Column("on\nMXNet's\npage", lambda row: percent(published(row), of=100.0))
USE = (
    Column("GFLOP/s", lambda row: f"{row.gflops():.1f}"),
    Column("of\nFMA\npeak", lambda row: percent(row.share(), digits=1)),
)
AGAINST_TORCH = (
    Column("torch.nn\nsamples/sec", lambda row: number(row.rate(TORCH))),
    Column("FusedRNN/\ntorch.nn", lambda row: percent(row.ratio(TORCH))),
)


def tables(rows: Sequence[Row], *, with_torch: bool) -> list[Table]:
    """One table for each of MXNet's that has rows, and one for all the rest."""
    extra = AGAINST_TORCH if with_torch else ()
    grouped: dict[Case, list[Row]] = {}
    rest = []
    for row in rows:
        if published(row) is None:
            rest.append(row)
        else:
            grouped.setdefault(row.case, []).append(row)
    in_their_form = (*RATES, PUBLISHED, *USE, *extra)
    made = [_table(_sizes(case), mxnet_label, in_their_form, members) for case, members in grouped.items()]
    if rest:
        made.append(_table(f"T, N, I, H in {rest[0].dtype}", _label, (*RATES, *USE, *extra), rest))
    return made


def summary(row: Row) -> str:
    """A finished row in a line."""
    if row.wrong:
        return f"{row.name}: wrong: {row.wrong}"
    rates = ", ".join(f"{who} {number(row.rate(who))}" for who in row.timings)
    return f"{row.name}: samples/sec {rates}; {percent(row.share(), digits=1)} of the FMA peak"


def published(row: Row) -> float | None:
    """MXNet's ratio for this row, if it published one."""
    return published_percent(row.case, row.mode, row.phase, row.dtype)


def mxnet_label(row: Row) -> str:
    """The row's name in MXNet's tables, such as ``LSTM-Inference``."""
    return f"{NAMES[row.mode]}-{row.phase.capitalize()}"


def _label(row: Row) -> str:
    case = row.case
    sizes = f"{case.T},{case.N},{case.I},{case.H}"
    depth = f" layers {case.layers}" if case.layers > 1 else ""
    return f"{case.name} {mxnet_label(row)}\n  {sizes}{depth}{' both ways' if case.bidirectional else ''}"


def _sizes(case: Case) -> str:
    sizes = f"{case.T}, {case.N}, {case.I}, {case.H}"
    return f"T, N, I, H = {sizes} layer={case.layers} bidirection={case.bidirectional}"


def _table(title: str, label: Callable[[Row], str], columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    # Narrow enough for a terminal of 80 columns.
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for row in rows:
        figures = ["[bold red]wrong[/]"] if row.wrong else [column.figure(row) for column in columns]
        table.add_row(label(row), *figures)
    return table


def number(value: float) -> str:
    """Two decimals while they say something."""
    return f"{value:.2f}" if value < 1e4 else f"{value:,.0f}"


def percent(value: float | None, *, of: float = 1.0, digits: int = 2) -> str:
    """``value`` as a part of ``of`` in percent, empty if there is none."""
    return "" if value is None else f"{100.0 * value / of:.{digits}f}%"
