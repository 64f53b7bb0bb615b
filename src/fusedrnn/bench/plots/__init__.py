"""A benchmark as pictures: bars of useful work a second for each case, and a roofline with every case on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fusedrnn.bench.plots import bars, roofline
from fusedrnn.bench.plots.colours import INK
from fusedrnn.bench.rows import Row

_BARS_HEIGHT = 3.1
_DPI = 150
_WIDEST_PAIR = 7.0
"""Inches of a case's bars up to which two cases stand side by side."""

_EXPLANATION = "On bars of ours: how many times as fast as the best of the others."

STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9.0,
}
"""Settings of Matplotlib under which figures are made."""


def formats() -> tuple[str, ...]:
    """File name endings that a plot can be saved under, without the dot."""
    return tuple(sorted(Figure().canvas.get_supported_filetypes()))


def plot(rows: Sequence[Row], path: Path, bandwidth: Mapping[str, float] | None = None) -> None:
    """Save one figure: a bar chart for each case, and below them the roofline.

    ``bandwidth`` is in GB/s, by what is read, as :func:`fusedrnn.bench.bandwidth.measure_bandwidth` gives it; without
    it the FMA peak is the only roof.
    """
    cases = by_case(rows)
    wide = max(bars.width(members) for members in cases)
    columns = 2 if wide <= _WIDEST_PAIR and len(cases) > 1 else 1
    lines = math.ceil(len(cases) / columns)
    inches, below = _roofline_size(rows)
    size = (max(columns * wide, inches), lines * _BARS_HEIGHT + below + 0.6)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained", dpi=_DPI)
        grid = figure.add_gridspec(lines + 1, columns, height_ratios=[*[_BARS_HEIGHT] * lines, below])
        for turn, members in enumerate(cases):
            bars.draw(figure.add_subplot(grid[turn // columns, turn % columns]), members, size[0] / columns)
        _legend(figure, rows, size[0])
        roofline.draw(figure, figure.add_subplot(grid[lines, :]), rows, bandwidth or {})
        figure.savefig(path, dpi=_DPI)


def case_figure(rows: Sequence[Row]) -> Figure:
    """The bars of one case, in a figure for itself."""
    width = max(bars.width(rows), 6.5)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, _BARS_HEIGHT + 0.5), layout="constrained", dpi=_DPI)
        bars.draw(figure.add_subplot(), rows, width)
        _legend(figure, rows, width)
    return figure


def roofline_figure(rows: Sequence[Row], bandwidth: Mapping[str, float]) -> Figure:
    """The roofline, in a figure for itself."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_roofline_size(rows), layout="constrained", dpi=_DPI)
        roofline.draw(figure, figure.add_subplot(), rows, bandwidth)
    return figure


def by_case(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each case, in their order."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case.name, []).append(row)
    return list(cases.values())


def _roofline_size(rows: Sequence[Row]) -> tuple[float, float]:
    return (12.0, 8.5) if roofline.crowded(rows) else (10.0, 6.0)


def _legend(figure: Figure, rows: Sequence[Row], inches: float) -> None:
    handles = bars.legend(rows)
    columns = min(len(handles), max(2, int(inches / 1.25)))
    options = {"ncols": columns, "frameon": False, "fontsize": 8, "title": _EXPLANATION, "title_fontsize": 8}
    figure.legend(handles=handles, loc="outside upper center", **options)
