"""A benchmark as a picture: bars of useful work a second, the speed-up written on the fused ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fusedrnn.bench.contenders import FUSED, NON_FUSED, TORCH
from fusedrnn.bench.runner import Row

_COLOURS = {NON_FUSED: "#b0b7c3", FUSED: "#1f6feb", TORCH: "#e8833a"}


def formats() -> tuple[str, ...]:
    """File name endings that a plot can be saved under, without the dot."""
    return tuple(sorted(Figure().canvas.get_supported_filetypes()))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Save horizontal bars for every row, GFLOP/s to the right, the FMA peak as a black mark; wrong rows say so."""
    contenders = list(dict.fromkeys(who for row in rows for who in row.timings))
    figure = Figure(figsize=(9, 1.5 + 0.32 * len(rows) * max(1, len(contenders))), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / max(1, len(contenders))
    for position, row in enumerate(rows):
        if row.wrong:
            axes.text(0, position, " wrong", color="red", va="center")
            continue
        for turn, who in enumerate(contenders):
            place = position + (turn + 0.5) * height - 0.4
            axes.barh(place, row.gflops(who), height, color=_COLOURS[who])
            if who == FUSED:
                axes.text(row.gflops(who), place, f" {100 * row.ratio(NON_FUSED):.0f}%", va="center")
        if row.peak:
            axes.plot([row.peak, row.peak], [position - 0.4, position + 0.4], color="black", linewidth=1.5)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("GFLOP/s (black: FMA peak; percent: fused over non-fused)")
    axes.spines[["top", "right"]].set_visible(False)
    if contenders:
        patches = [Patch(color=_COLOURS[who], label=who) for who in contenders]
        figure.legend(handles=patches, loc="outside upper right", ncols=len(contenders), frameon=False)
    figure.savefig(path, dpi=150)
