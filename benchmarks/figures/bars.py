"""Bar charts: useful work per second of every contender in one case, by mode and phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from benchmarks.figures.style import INK, MODE_NAMES, PAPER, STYLE, colours
from benchmarks.records import Record
from fusedrnn.bench.data import IN_FORMAT, IN_TORCH, OURS

_HEIGHT = 3.6
_GAP = 0.8
"""The space between two groups, in widths of a bar."""

_PEAK_FACTOR = 4.0
"""The peak is drawn as a line if it is at most this many times as high as the tallest bar."""

_BAR_INCHES = 0.17
_HORIZONTAL_TEXT_INCHES = 0.34
"""A bar of this width has room for horizontal text."""

_MIN_GROUP = 3.4
"""The least width of a group, in widths of a bar, for the name under it."""

_TEXT_INSIDE = 0.45
"""A bar that reaches this share of the axes' height has its text inside."""

_TEXT_COLOURS = {**dict.fromkeys(IN_FORMAT.values(), "#ffffff"), IN_TORCH: "#06264d"}
"""The colours of text inside bars."""

_LEGEND_TITLE = "On bars of ours: how many times as fast as the best of the others."


def case_figure(records: Sequence[Record]) -> Figure:
    """The bars of one case with a legend."""
    width = max(6.5, 1.0 + _BAR_INCHES * _num_bars(records))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, _HEIGHT), layout="constrained")
        draw(figure.add_subplot(), records, width)
        handles = _legend_handles(records)
        columns = min(len(handles), max(2, int(width / 1.25)))
        options: dict[str, Any] = {"frameon": False, "fontsize": 8, "title": _LEGEND_TITLE, "title_fontsize": 8}
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, **options)
    return figure


def draw(axes: Axes, records: Sequence[Record], inches: float) -> None:
    """Draw the bars of one case into ``axes``, which are about ``inches`` wide.

    The bars of our contenders have a text: how many times as fast as the best other contender they are. The FMA peak is
    a line, or a text if it is far above every bar. A wrong row has a text that says so.
    """
    palette = colours(name for record in records for name in record.seconds)
    tallest = max((speed for record in records for speed in record.gflops.values()), default=1.0)
    peaks = [record.peak for record in records if record.peak]
    peak_drawn = bool(peaks) and max(peaks) <= _PEAK_FACTOR * tallest
    horizontal = (inches - 1.0) / _num_bars(records) >= _HORIZONTAL_TEXT_INCHES
    axes.set_ylim(0, 1.2 * max(tallest, *(peaks if peak_drawn else [0.0])))
    centres, left = [], 0.0
    for record in records:
        right = left + max(_MIN_GROUP, len(record.seconds))
        centres.append((left + right) / 2)
        _draw_group(axes, record, palette, centres[-1] - len(record.seconds) / 2, horizontal)
        if record.wrong:
            axes.text(centres[-1], 0, "wrong\n", color="#d1242f", ha="center", va="bottom", weight="bold")
        elif record.peak and peak_drawn:
            axes.plot([left - 0.2, right + 0.2], [record.peak, record.peak], color=INK, linewidth=1.4)
        left = right + _GAP
    if peaks and not peak_drawn:
        text = f"FMA peak {sum(peaks) / len(peaks):.0f} GFLOP/s, above the axes"
        axes.text(0.995, 0.97, text, transform=axes.transAxes, ha="right", va="top", color=INK, fontsize=7)
    axes.set_xticks(centres, [_group_name(record) for record in records])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-_GAP, left)
    axes.set_ylabel("GFLOP/s")
    axes.set_title(case_title(records[0]), loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)


def case_title(record: Record) -> str:
    """The name and the sizes of the case."""
    case = record.data["case"]
    depth = f", {case['layers']} layers" if case["layers"] > 1 else ""
    directions = ", both directions" if case["bidirectional"] else ""
    sizes = f"{case['T']}, {case['N']}, {case['I']}, {case['H']}"
    return f"{case['name']}: T, N, I, H = {sizes}{depth}{directions}, {record.data['dtype']}"


def _num_bars(records: Sequence[Record]) -> float:
    return sum(max(_MIN_GROUP, len(record.seconds)) + _GAP for record in records)


def _group_name(record: Record) -> str:
    return f"{MODE_NAMES[record.mode]}\n{record.phase}{' packed' if record.packed else ''}"


def _draw_group(axes: Axes, record: Record, palette: Mapping[str, str], left: float, horizontal: bool) -> None:
    for index, name in enumerate(each for each in palette if each in record.seconds):
        x, height = left + index + 0.5, record.gflops[name]
        outline = 0.6 if name in OURS else 0.0
        axes.bar(x, height, 0.94, color=palette[name], edgecolor=INK, linewidth=outline, zorder=2)
        ratio = record.over_best(name)
        if ratio is None:
            continue
        inside = height > _TEXT_INSIDE * axes.get_ylim()[1]
        axes.annotate(
            f"{ratio:.2f}\u00d7",
            (x, height),
            (0, -4 if inside else 3),
            textcoords="offset points",
            ha="center",
            va="top" if inside else "bottom",
            rotation=0 if horizontal else 90,
            fontsize=7,
            weight="bold",
            color=_TEXT_COLOURS[name] if inside else INK,
            path_effects=[] if inside else [withStroke(linewidth=2.0, foreground=PAPER)],
            zorder=4,
        )


def _legend_handles(records: Sequence[Record]) -> list[Patch | Line2D]:
    palette = colours(name for record in records for name in record.seconds)
    patches: list[Patch | Line2D] = [Patch(color=colour, label=name) for name, colour in palette.items()]
    return [*patches, Line2D([], [], color=INK, linewidth=1.4, label="FMA peak")]
