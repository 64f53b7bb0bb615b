"""``python -m benchmarks.figures FILE FOLDER``: draws the JSON of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.figures.bars import case_figure
from benchmarks.figures.roofline import roofline_figure
from benchmarks.figures.speedup import speedup_figure
from benchmarks.figures.style import formats, save
from benchmarks.records import load
from fusedrnn.cli.console import fail
from fusedrnn.cli.program import Program

app = Program()


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="A file of `fusedrnn bench --json` or `benchmarks.compare --json`.")],
    folder: Annotated[Path, typer.Argument(help="An existing folder for the figures.")],
    format: Annotated[str, typer.Option(help="svg, png, pdf or any other format of Matplotlib.")] = "svg",
    threads: Annotated[
        int | None, typer.Option(help="Draw rows of this number of threads.", show_default="all")
    ] = None,
    subtitle: Annotated[str, typer.Option(help="Of the summary.", show_default="processor and threads")] = "",
) -> None:
    """Draw a summary, a roofline, and bars for each case.

    The summary shows how many times as fast as the best other library the operator is. It needs times of other
    libraries. The other figures need all data of the rows: a file that holds times alone gives only the summary.
    """
    try:
        benchmark = load(file)
        if format not in formats():
            raise ValueError(f"unknown format {format!r}; valid: {', '.join(formats())}")
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
    except ValueError as error:
        fail(str(error))
    records = [each for each in benchmark.records if threads in (None, each.data.get("threads"))]
    machine = benchmark.data.get("machine", "")
    if isinstance(machine, dict):
        machine = f"{machine['processor']}, {machine['target_description']}, threads: {machine['threads']}"
    figures = {}
    if any(record.over_best("fused") for record in records):
        figures["speedup"] = speedup_figure(records, subtitle or machine)
    if all("least_bytes" in record.data for record in records):
        figures["roofline"] = roofline_figure(records, benchmark.bandwidth)
        for case, members in benchmark.by_case().items():
            figures[f"case-{case}"] = case_figure([record for record in members if record in records])
    for name, figure in figures.items():
        path = folder / f"{name}.{format}"
        save(figure, path)
        typer.echo(path)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.figures")
