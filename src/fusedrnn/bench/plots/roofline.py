"""Every row as a point under the roofs of its machine: the FMA peak, and the speed of caches and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from fusedrnn.bench.plots.bars import SHORT_NAMES
from fusedrnn.bench.plots.colours import INK
from fusedrnn.bench.plots.labels import Label, place
from fusedrnn.bench.rows import Row
from fusedrnn.bench.traffic import INTENSITY, intensity

_COLOURS = (
    "#1f6feb",
    "#d9622b",
    "#2f9e6e",
    "#a04fc4",
    "#c93a4f",
    "#9a7b16",
    "#1b96b5",
    "#c2559b",
    "#6b7a2c",
    "#7a6250",
)
"""A case each, in turn."""

_MARKERS = {"lstm": "o", "gru": "^", "rnn_relu": "s", "rnn_tanh": "D"}
_CROWD = 24
"""Rows up to which there is room for full names."""


def draw(figure: Figure, axes: Axes, rows: Sequence[Row], bandwidth: Mapping[str, float]) -> None:
    """Draw what is ours of every row that was measured into ``axes`` of ``figure``, whose other parts are finished.

    ``bandwidth`` is in GB/s, by the level that is read.
    """
    shown = [row for row in rows if row.ours in row.timings]
    points = [(intensity(row), row.gflops(row.ours)) for row in shown]
    peaks = [row.peak for row in shown if row.peak]
    peak = statistics.median(peaks) if peaks else math.inf
    _frame(axes, points, peak, max(bandwidth.values(), default=0.0))
    cases = list(dict.fromkeys(row.case.name for row in rows))
    labels = []
    for row, (x, y) in zip(shown, points, strict=True):
        colour = _COLOURS[cases.index(row.case.name) % len(_COLOURS)]
        inside = "none" if row.phase == "training" else colour
        axes.plot([x], [y], _MARKERS[row.mode], markersize=5, color=colour, markerfacecolor=inside, zorder=4)
        name = f"{row.case.name} {SHORT_NAMES[row.mode]}"
        labels.append(Label(name if crowded(rows) else f"{name} {row.phase}", x, y, colour))
    legend = _legend(axes, shown)
    figure.draw_without_rendering()  # Only then is it known where everything lies.
    lines, names = _roofs(axes, peak, bandwidth)
    place(figure, axes, labels, 6.5 if crowded(rows) else 8.0, lines, [legend, *names])


def crowded(rows: Sequence[Row]) -> bool:
    """Whether there are so many points that names have to be short and the picture large."""
    return len(rows) > _CROWD


def _frame(axes: Axes, points: Sequence[tuple[float, float]], peak: float, fastest: float) -> None:
    """Scales, titles, and limits within which every point and some of the steepest roof lie."""
    xs, ys = [x for x, _ in points] or [1.0], [y for _, y in points] or [1.0]
    axes.set_xscale("log")
    axes.set_yscale("log")
    ridge = peak / fastest if fastest and math.isfinite(peak) else math.inf
    axes.set_xlim(min(min(xs) / 3, ridge / 3), max(xs) * 6)
    axes.set_ylim(min(ys) / 3, 1.6 * (peak if math.isfinite(peak) else max(ys)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel(INTENSITY)
    axes.set_ylabel("GFLOP/s of useful work")
    axes.set_title("Roofline: ours in every case", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, rows: Sequence[Row]) -> Legend:
    """What the shapes mean, and whether they are filled."""

    def sign(marker: str, face: str, text: str) -> Line2D:
        return Line2D([], [], marker=marker, linestyle="", color=INK, markerfacecolor=face, markersize=5, label=text)

    shapes = [sign(_MARKERS[mode], INK, SHORT_NAMES[mode]) for mode in dict.fromkeys(row.mode for row in rows)]
    phases = [sign("o", INK, "inference: filled"), sign("o", "none", "training: hollow")]
    return axes.legend(handles=[*shapes, *phases], loc="lower right", frameon=False, fontsize=8)


def _roofs(axes: Axes, peak: float, bandwidth: Mapping[str, float]) -> tuple[list[tuple[float, float]], list[Artist]]:
    """Draw the roofs with their names on them; returns points along them, and the names."""
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    along = np.geomspace(low, high, 300)
    points: list[tuple[float, float]] = []
    names: list[Artist] = []
    if math.isfinite(peak):
        axes.axhline(peak, color=INK, linewidth=1.4)
        text = f"FMA peak {peak:.0f} GFLOP/s "
        names.append(axes.text(high, peak, text, ha="right", va="bottom", fontsize=8, color=INK))
        points += [(float(x), peak) for x in along]
    for turn, (level, speed) in enumerate(sorted(bandwidth.items(), key=lambda item: -item[1])):
        slant = along[(speed * along >= bottom) & (speed * along <= min(top, peak))]
        if not slant.size:
            continue
        axes.plot(slant, speed * slant, color=INK, linewidth=0.9, linestyle="--")
        points += [(float(x), float(speed * x)) for x in slant]
        at = slant[slant.size // 2]
        (x0, y0), (x1, y1) = axes.transData.transform(
            [(slant[0], speed * slant[0]), (2 * slant[0], 2 * speed * slant[0])]
        )
        name = axes.annotate(
            f"{level}: {speed:.0f} GB/s",
            (at, speed * at),
            (3, -3) if turn else (-3, 3),
            textcoords="offset points",
            ha="center",
            va="top" if turn else "bottom",
            rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
            rotation_mode="anchor",
            fontsize=7,
            color=INK,
        )
        names.append(name)
    return points, names
