"""Latencies: their distribution as text, as numbers for a file, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

Latencies = Sequence[float]
"""In seconds."""
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}


def distribution(latencies: Latencies) -> dict[str, float]:
    """The number of latencies, and their percentiles in milliseconds; without latencies, no percentiles."""
    values = np.asarray(latencies, np.float64) * 1e3
    percentiles = {name: float(np.percentile(values, share)) for name, share in PERCENTILES.items() if len(values)}
    return {"count": len(values), **percentiles}


def table(distributions: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row of percentiles for each name."""
    result = Table(box=None, pad_edge=False)
    result.add_column("latency in ms")
    for name in ("count", *PERCENTILES):
        result.add_column(name, justify="right")
    for name, row in distributions.items():
        cells = (f"{row[column]:.2f}" if column in row else "" for column in PERCENTILES)
        result.add_row(name, f"{row['count']:,}", *cells)
    return result


def plot(latencies: Mapping[str, Latencies], path: Path) -> None:
    """Draw a histogram of each distribution into a file, in any format of Matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    values = {name: np.asarray(seconds, np.float64) * 1e3 for name, seconds in latencies.items() if len(seconds)}
    largest = max((float(np.percentile(each, 99.9)) for each in values.values()), default=1.0)
    bins = np.linspace(0, largest, 100).tolist()
    for (name, each), color in zip(values.items(), ("#1f6feb", "#e8833a"), strict=False):
        p99 = float(np.percentile(each, PERCENTILES["p99"]))
        axes.hist(each, bins=bins, alpha=0.6, color=color, label=f"{name}, p99 {p99:.2f} ms")
        axes.axvline(p99, color=color, linewidth=1.0, linestyle="--")
    axes.set(xlabel="latency, ms", ylabel="frames", yscale="log")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    if values:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def formats() -> tuple[str, ...]:
    """File name endings that a picture can have, without the dot."""
    from matplotlib.figure import Figure

    return tuple(sorted(Figure().canvas.get_supported_filetypes()))
