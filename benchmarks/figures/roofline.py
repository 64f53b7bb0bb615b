"""The roofline plot: every row is a point under the FMA peak and the bandwidths of caches and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from adjustText import adjust_text
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.figures.style import INK, MODE_NAMES, STYLE
from benchmarks.records import Record

INTENSITY = "useful flops per byte that must reach the cores (recurrent weights at every step, all else once)"

_COLOURS = (
    *("#1f6feb", "#d9622b", "#2f9e6e", "#a04fc4", "#c93a4f"),
    *("#9a7b16", "#1b96b5", "#c2559b", "#6b7a2c", "#7a6250"),
)
"""The colours of the cases, in turn."""

_MARKERS = {"lstm": "o", "gru": "^", "rnn_relu": "s", "rnn_tanh": "D"}

_LABEL_SECONDS = 4.0
"""The time limit for the placement of labels."""


def roofline_figure(records: Sequence[Record], bandwidth: Mapping[str, float]) -> Figure:
    """A point for our contender in every row, and the name of each case. ``bandwidth`` is in GB/s, by level."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 6.5), layout="constrained")
        axes = figure.add_subplot()
        _draw(figure, axes, records, bandwidth)
    return figure


def _draw(figure: Figure, axes: Axes, records: Sequence[Record], bandwidth: Mapping[str, float]) -> None:
    shown = [(record, record.gflops[record.ours]) for record in records if record.ours]
    points = [(record.intensity, speed) for record, speed in shown]
    peaks = [record.peak for record, _ in shown if record.peak]
    peak = statistics.median(peaks) if peaks else math.inf
    _set_up_axes(axes, points, peak, max(bandwidth.values(), default=0.0))
    cases = list(dict.fromkeys(record.case for record in records))
    labels: dict[str, Text] = {}
    for (record, _), (x, y) in zip(shown, points, strict=True):
        colour = _COLOURS[cases.index(record.case) % len(_COLOURS)]
        face = "none" if record.phase == "training" else colour
        axes.plot([x], [y], _MARKERS[record.mode], markersize=5, color=colour, markerfacecolor=face, zorder=4)
        if record.case not in labels:
            labels[record.case] = axes.text(x, y, record.case, color=colour, fontsize=9, weight="bold", zorder=5)
    legend = _add_legend(axes, [record for record, _ in shown])
    figure.draw_without_rendering()  # computes the layout, on which the roofs' names depend
    names = _draw_roofs(axes, peak, bandwidth)
    _place_labels(axes, list(labels.values()), points, [legend, *names])


def _place_labels(
    axes: Axes, labels: list[Text], points: Sequence[tuple[float, float]], obstacles: list[Artist]
) -> None:
    if not labels:
        return
    figure = axes.get_figure(root=True)
    assert figure
    figure.set_layout_engine("none")  # keeps the layout in which the labels are placed
    adjust_text(
        labels,
        x=[x for x, _ in points],
        y=[y for _, y in points],
        ax=axes,
        objects=obstacles,
        expand=(1.08, 1.3),
        time_lim=_LABEL_SECONDS,
        arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.4, "alpha": 0.5},
    )


def _set_up_axes(axes: Axes, points: Sequence[tuple[float, float]], peak: float, bandwidth: float) -> None:
    """Set scales, titles, and limits that include every point and a part of the steepest roof."""
    xs, ys = [x for x, _ in points] or [1.0], [y for _, y in points] or [1.0]
    axes.set_xscale("log")
    axes.set_yscale("log")
    ridge = peak / bandwidth if bandwidth and math.isfinite(peak) else math.inf
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


def _add_legend(axes: Axes, records: Sequence[Record]) -> Legend:
    """Add a legend of the shapes of markers, which are hollow for training."""

    def handle(marker: str, face: str, text: str) -> Line2D:
        return Line2D([], [], marker=marker, linestyle="", color=INK, markerfacecolor=face, markersize=5, label=text)

    modes = dict.fromkeys(record.mode for record in records)
    handles = [handle(_MARKERS[mode], INK, MODE_NAMES[mode]) for mode in modes]
    handles += [handle("o", INK, "inference: filled"), handle("o", "none", "training: hollow")]
    return axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=8)


def _draw_roofs(axes: Axes, peak: float, bandwidth: Mapping[str, float]) -> list[Artist]:
    """Draw the roofs and their names. Returns the names."""
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    xs = np.geomspace(low, high, 300)
    names: list[Artist] = []
    if math.isfinite(peak):
        axes.axhline(peak, color=INK, linewidth=1.4)
        text = f"FMA peak {peak:.0f} GFLOP/s "
        names.append(axes.text(high, peak, text, ha="right", va="bottom", fontsize=8, color=INK))
    for index, (level, speed) in enumerate(sorted(bandwidth.items(), key=lambda item: -item[1])):
        roof = xs[(speed * xs >= bottom) & (speed * xs <= min(top, peak))]
        if not roof.size:
            continue
        axes.plot(roof, speed * roof, color=INK, linewidth=0.9, linestyle="--")
        middle = roof[roof.size // 2]
        (x0, y0), (x1, y1) = axes.transData.transform([(middle, speed * middle), (2 * middle, 2 * speed * middle)])
        name = axes.annotate(
            f"{level}: {speed:.0f} GB/s",
            (middle, speed * middle),
            (3, -3) if index else (-3, 3),
            textcoords="offset points",
            ha="center",
            va="top" if index else "bottom",
            rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
            rotation_mode="anchor",
            fontsize=7,
            color=INK,
        )
        names.append(name)
    return names
