"""A benchmark as a picture: bars of useful work a second, the speed-up written on the fused ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fusedrnn.bench.computed import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED
from fusedrnn.bench.runner import Row

_COLOURS = {NON_FUSED: "#b0b7c3", FUSED: "#1f6feb", TORCH: "#e8833a", IN_TORCH: "#54aeff", UNPACKED: "#b6e3ff"}
_OVER = {FUSED: NON_FUSED, IN_TORCH: TORCH}
"""On whose bars a ratio is written, and over whom."""


def formats() -> tuple[str, ...]:
    """File name endings that a plot can be saved under, without the dot."""
    return tuple(sorted(Figure().canvas.get_supported_filetypes()))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Save horizontal bars for every row, GFLOP/s to the right, the FMA peak as a black mark; wrong rows say so.

    Each phase has a panel, side by side on one scale.
    """
    contenders = list(dict.fromkeys(who for row in rows for who in row.timings))
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(row.phase, []).append(row)
    longest = max(len(members) for members in panels.values())
    size = (2 + 7 * len(panels), 1.7 + 0.32 * longest * max(1, len(contenders)))
    figure = Figure(figsize=size, layout="constrained")
    for axes, (phase, members) in zip(
        figure.subplots(1, len(panels), sharex=True, squeeze=False)[0], panels.items(), strict=True
    ):
        _panel(axes, members, contenders)
        axes.set_title(phase, loc="left")
    ratios = ", ".join(f"{who} over {_OVER[who]}" for who in contenders if who in _OVER)
    figure.supxlabel(f"GFLOP/s (black: FMA peak{ratios and '; percent: '}{ratios})", fontsize="medium")
    if contenders:
        patches = [Patch(color=_COLOURS[who], label=who) for who in contenders]
        figure.legend(handles=patches, loc="outside upper right", ncols=len(contenders), frameon=False)
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, rows: Sequence[Row], contenders: Sequence[str]) -> None:
    height = 0.8 / max(1, len(contenders))
    for position, row in enumerate(rows):
        if row.wrong:
            axes.text(0, position, " wrong", color="red", va="center")
            continue
        for turn, who in enumerate(contenders):
            place = position + (turn + 0.5) * height - 0.4
            axes.barh(place, row.gflops(who), height, color=_COLOURS[who])
            if who in _OVER:
                axes.text(row.gflops(who), place, f" {100 * row.ratio(_OVER[who], who):.0f}%", va="center")
        if row.peak:
            axes.plot([row.peak, row.peak], [position - 0.4, position + 0.4], color="black", linewidth=1.5)
    axes.set_yticks(range(len(rows)), [f"{row.case.name} {row.mode}{' packed' if row.lengths else ''}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
