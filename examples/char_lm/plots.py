"""Draws the loss curves over steps, where they coincide, and over seconds, where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from examples.char_lm.results import Run

# The first curve is wide and pale, so that the second curve is visible on top of it.
_LINE_STYLES = (
    {"color": "#e8833a", "linewidth": 4.0, "alpha": 0.6},
    {"color": "#1f6feb", "linewidth": 1.2},
)


def formats() -> tuple[str, ...]:
    """File name endings that a plot can have, without the dot."""
    return tuple(sorted(Figure().canvas.get_supported_filetypes()))


def plot(runs: Sequence[Run], path: Path) -> None:
    """Save the curves of at most two runs, each with at least one step."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    for run, style in zip(runs, _LINE_STYLES, strict=False):
        bits = [step.bits for step in run.steps]
        over_steps.plot(range(1, len(bits) + 1), bits, label=run.name, **style)
        over_seconds.plot([step.elapsed for step in run.steps], bits, label=run.name, **style)
    over_steps.set(xlabel="step", ylabel="loss, bits per character")
    over_seconds.set(xlabel="seconds")
    for axes in (over_steps, over_seconds):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    if runs:
        over_steps.legend(frameon=False)
    figure.savefig(path, dpi=150)
