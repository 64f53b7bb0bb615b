"""The options of ``python -m benchmarks.published_cells``, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.peers.environments import Environment
from benchmarks.peers.figures import printed_figures
from fusedrnn.bench.report import environment_report
from fusedrnn.bench.tables import duration, new_table, percent
from fusedrnn.cli import options
from fusedrnn.cli.console import check_writable, fail, finite, output, write_json
from fusedrnn.cli.program import Program

app = Program()

ENVIRONMENT = Environment(
    "published-cells", ("torch==2.13.0", "numpy", "llvmlite>=0.45", "einops", "ninja", "packaging", "setuptools"),
    ("sru==2.6.0", "flashrnn==1.0.8", "minGRU-pytorch==0.2.1"),
)  # fmt: skip
"""PyTorch, and packages whose kernels for GPUs are not used. It is built at the first use."""
PACKAGES = {"sru": "sru", "slstm": "flashrnn", "min_gru_log": "minGRU-pytorch"}
"""The package of each cell."""
RECURRENCES = "recurrences"


@app.command()
def main(
    parts: Annotated[
        str,
        typer.Option(help=f"Parts, separated by commas: {', '.join(PACKAGES)} beside their packages; {RECURRENCES}: "
                     "cells without recurrent weights beside a copy of memory."),
    ] = ",".join((*PACKAGES, RECURRENCES)),
    threads: Annotated[int, typer.Option(min=1, help="Number of threads.")] = 2,
    seconds: Annotated[float, typer.Option(min=0, callback=finite, help="Time for each figure.")] = 2.0,
    json: options.Json = None,
) -> None:  # fmt: skip
    """Compare cells of the catalogue with the packages that published them, in turns, in one process."""
    try:
        check_writable("--json", json)
        chosen = options.parse_names(parts, "part", (*PACKAGES, RECURRENCES))
    except ValueError as error:
        fail(str(error))
    rows, chosen_options = [], {"parts": chosen, "threads": threads, "seconds": seconds}
    try:
        for figure in printed_figures(ENVIRONMENT, "benchmarks.published_cells.contenders", chosen_options):
            rows.append(figure)
            print(f"{figure['cell']}: {duration(figure['fused'])}", flush=True)
    except RuntimeError as error:
        fail(str(error))
    for part in (packages_table(rows), recurrences_table(rows)):
        if part.row_count:
            output().print(part)
    if json:
        report = {"environment": environment_report(), "threads": threads, "rows": rows}
        write_json(json, report)


def packages_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The medians of the packages and of the fused layers, and their ratios."""
    result = new_table("Cells and their packages", ("cell", "T, N, I, H", "", "package", "fused", "ratio"), left=3)
    for row in rows:
        if "package" in row:
            sizes = ", ".join(str(row[name]) for name in ("steps", "batch", "features", "hidden"))
            times = duration(row["package"]), duration(row["fused"])
            label = f"{row['cell']} ({PACKAGES[row['cell']]})"
            result.add_row(label, sizes, row["phase"], *times, f"{row['package'] / row['fused']:.2f}")
    return result


def recurrences_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The medians of the layers, and the bandwidth that a loop over memory would need, as a share of a copy's."""
    result = new_table("Recurrences of single elements", ("cell", "fused", "GB/s", "of a copy"))
    for row in rows:
        if "copied_bytes" in row:
            needed, measured = row["bytes"] / row["fused"], row["copied_bytes"] / row["copy"]
            share = percent(needed, of=measured, digits=0)
            result.add_row(row["cell"], duration(row["fused"]), f"{needed / 1e9:.1f}", share)
    return result


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.published_cells")
