"""One case as bars: useful work a second of every contender, by mode and phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from fusedrnn.bench.computed import FUSED, IN_TORCH
from fusedrnn.bench.plots.colours import INK, PAPER, colours
from fusedrnn.bench.ranking import OURS, over_best
from fusedrnn.bench.rows import Row
from fusedrnn.testing.cases import Case

SHORT_NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn_relu": "ReLU", "rnn_tanh": "tanh"}
"""Of cells, where there is little room."""

_GAP = 0.8
"""Between two groups, in bars."""

_IN_SIGHT = 4.0
"""How many times as high as the tallest bar the peak may be to be drawn as a line."""

_BAR_INCHES = 0.17
_LEGIBLE = 0.34
"""Inches from which on a bar is wide enough for text that lies."""

_NARROWEST = 3.4
"""Bars that a group is at least as wide as, for the name under it."""

_TALL = 0.45
"""The part of the picture's height from which on a bar has room for what is written on it."""

_ON = {FUSED: "#ffffff", IN_TORCH: "#06264d"}
"""Colours of text that stands within bars."""


def width(rows: Sequence[Row]) -> float:
    """Inches that the bars of a case want."""
    return max(4.5, 1.0 + _BAR_INCHES * _bars(rows))


def _bars(rows: Sequence[Row]) -> float:
    return sum(max(_NARROWEST, len(row.timings)) + _GAP for row in rows)


def draw(axes: Axes, rows: Sequence[Row], inches: float) -> None:
    """Draw the rows of one case into ``axes``, about ``inches`` wide.

    On bars of ours stands how many times they are as fast as the best of the others. The FMA peak is a line, or said
    in words if it is far above every bar. A wrong row says so.
    """
    palette = colours(who for row in rows for who in row.timings)
    tallest = max((row.gflops(who) for row in rows for who in row.timings), default=1.0)
    peaks = [row.peak for row in rows if row.peak]
    in_sight = bool(peaks) and max(peaks) <= _IN_SIGHT * tallest
    lying = (inches - 1.0) / _bars(rows) >= _LEGIBLE
    axes.set_ylim(0, 1.2 * max(tallest, *(peaks if in_sight else [0.0])))
    middles, left = [], 0.0
    for row in rows:
        right = left + max(_NARROWEST, len(row.timings))
        middles.append((left + right) / 2)
        _group(axes, row, palette, middles[-1] - len(row.timings) / 2, lying)
        if row.wrong:
            axes.text(middles[-1], 0, "wrong\n", color="#d1242f", ha="center", va="bottom", weight="bold")
        elif row.peak and in_sight:
            axes.plot([left - 0.2, right + 0.2], [row.peak, row.peak], color=INK, linewidth=1.4)
        left = right + _GAP
    if peaks and not in_sight:
        above = f"FMA peak {sum(peaks) / len(peaks):.0f} GFLOP/s, above the picture"
        axes.text(0.995, 0.97, above, transform=axes.transAxes, ha="right", va="top", color=INK, fontsize=7)
    axes.set_xticks(
        middles, [f"{SHORT_NAMES[row.mode]}\n{row.phase}{' packed' if row.lengths else ''}" for row in rows]
    )
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-_GAP, left)
    axes.set_ylabel("GFLOP/s")
    axes.set_title(title(rows[0].case, rows[0].dtype), loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)


def _group(axes: Axes, row: Row, palette: Mapping[str, str], left: float, lying: bool) -> None:
    for turn, who in enumerate(each for each in palette if each in row.timings):
        place, height, ours = left + turn + 0.5, row.gflops(who), who in OURS
        axes.bar(place, height, 0.94, color=palette[who], edgecolor=INK, linewidth=0.6 if ours else 0.0, zorder=2)
        ratio = over_best(row, who)
        if ratio is not None:
            within = height > _TALL * axes.get_ylim()[1]
            axes.annotate(
                f"{ratio:.2f}\u00d7",
                (place, height),
                (0, -4 if within else 3),
                textcoords="offset points",
                ha="center",
                va="top" if within else "bottom",
                rotation=0 if lying else 90,
                fontsize=7,
                weight="bold",
                color=_ON[who] if within else INK,
                path_effects=[] if within else [withStroke(linewidth=2.0, foreground=PAPER)],
                zorder=4,
            )


def title(case: Case, dtype: str) -> str:
    """Name and sizes of a case, in a line."""
    depth = f", {case.layers} layers" if case.layers > 1 else ""
    ways = ", both directions" if case.bidirectional else ""
    return f"{case.name}: T, N, I, H = {case.T}, {case.N}, {case.I}, {case.H}{depth}{ways}, {dtype}"


def legend(rows: Sequence[Row]) -> list[Patch | Line2D]:
    """What colours and the line mean, for a figure's legend."""
    palette = colours(who for row in rows for who in row.timings)
    patches: list[Patch | Line2D] = [Patch(color=colour, label=who) for who, colour in palette.items()]
    return [*patches, Line2D([], [], color=INK, linewidth=1.4, label="FMA peak")]
