"""The summary: how many times as fast as the best of the other libraries the operator is, in every case."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import geometric_mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.figures.style import INK, MODE_NAMES, STYLE
from benchmarks.records import Record
from fusedrnn.bench.data import FUSED, OURS
from fusedrnn.testing.cases import CASES

_MARKERS = {
    "lstm": ("o", "#1f6feb"),
    "gru": ("^", "#e8833a"),
    "rnn_relu": ("s", "#2f9e6e"),
    "rnn_tanh": ("D", "#a04fc4"),
}
"""The marker and the colour of each mode."""
_MEAN_COLOUR = "#8b949e"
_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20)
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def speedup_figure(records: Sequence[Record], subtitle: str = "") -> Figure:
    """A figure with a panel for each phase and a row for each case. Each mode is a point, and their mean is a bar.

    Args:
        records: The records. Those without a time of another library or of the operator are left out.
        subtitle: The subtitle of the figure, for example the machine.

    Raises:
        ValueError: If no record can be shown.
    """
    shown = [record for record in records if record.over_best(FUSED)]
    if not shown:
        raise ValueError("no row has a time of the operator and of another library")
    cases = list(dict.fromkeys(record.case for record in shown))
    phases = list(dict.fromkeys(record.phase for record in shown))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 1.6 + 0.36 * len(cases)), layout="constrained")
        panels = figure.subplots(1, len(phases), sharex=True, sharey=True, squeeze=False)[0]
        for axes, phase in zip(panels, phases, strict=True):
            _draw_phase(axes, [record for record in shown if record.phase == phase], cases)
            axes.set_title(phase.capitalize(), loc="left", fontsize="medium", weight="bold")
        _set_up_axes(panels[0], shown, cases)
        figure.suptitle(f"{_title(shown)}\n", x=0.01, ha="left", weight="bold", fontsize=11)
        figure.text(0.01, 0.955, subtitle, ha="left", va="top", fontsize=8, color=INK)
        figure.legend(handles=_legend_handles(shown), loc="outside lower left", ncols=6, frameon=False, fontsize=8)
    return figure


def _draw_phase(axes: Axes, records: Sequence[Record], cases: Sequence[str]) -> None:
    for y, case in enumerate(cases):
        ratios = {record.mode: record.over_best(FUSED) or 0.0 for record in records if record.case == case}
        if not ratios:
            continue
        mean = geometric_mean(ratios.values())
        axes.barh(y, mean - 1.0, left=1.0, height=0.62, color=_MEAN_COLOUR, alpha=0.35, zorder=1)
        for mode, ratio in ratios.items():
            marker, colour = _MARKERS[mode]
            axes.plot([ratio], [y], marker, color=colour, markersize=5.5, zorder=3)
        right = max(*ratios.values(), mean)
        axes.annotate(f"{mean:.2f}", (right, y), (7, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.axvline(1.0, color=INK, linewidth=1.0, zorder=2)
    axes.grid(axis="x", color=_MEAN_COLOUR, alpha=0.3, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("times as fast (log scale)")


def _set_up_axes(axes: Axes, records: Sequence[Record], cases: Sequence[str]) -> None:
    """Set the scales, which all panels share."""
    ratios = [record.over_best(FUSED) or 1.0 for record in records]
    axes.set_xscale("log")
    axes.set_xlim(min(0.93, 0.93 * min(ratios)), 1.35 * max(1.5, *ratios))
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}\u00d7")
    axes.set_yticks(range(len(cases)), [_case_label(case) for case in cases])
    axes.set_ylim(len(cases) - 0.4, -0.6)


def _case_label(name: str) -> str:
    """The name and the sizes of a case."""
    case = CASES.get(name)
    if case is None:
        return name
    depth = f", {case.layers} layers" if case.layers > 1 else ""
    ways = ", bidirectional" if case.bidirectional else ""
    steps = "1 step" if case.T == 1 else f"{case.T} steps"
    return f"{name}: {steps} of {case.N}, {case.H} units{depth}{ways}"


def _title(records: Sequence[Record]) -> str:
    others = {name for record in records for name in record.seconds if name not in OURS}
    others -= {name for record in records for name in record.revisions}
    count = len({re.split(r"[- ]", name)[0].lower() for name in others})  # MXNet's two ways count as one library
    number = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
    return f"Times as fast as the best of {number} libraries" if count > 1 else f"Times as fast as {', '.join(others)}"


def _legend_handles(records: Sequence[Record]) -> list[Line2D]:
    modes = dict.fromkeys(record.mode for record in records)
    handles = [
        Line2D([], [], marker=_MARKERS[mode][0], linestyle="", color=_MARKERS[mode][1], label=MODE_NAMES[mode])
        for mode in modes
    ]
    mean = Line2D([], [], color=_MEAN_COLOUR, alpha=0.35, linewidth=6, label="geometric mean")
    return [*handles, mean]
