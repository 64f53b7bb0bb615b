"""``python -m benchmarks.page FILE PAGE``: writes the JSON of a benchmark as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.figures.bars import case_figure
from benchmarks.figures.roofline import INTENSITY, roofline_figure
from benchmarks.figures.style import MODE_NAMES, colours, inline_svg
from benchmarks.records import COMPARED, Benchmark, Record, load
from fusedrnn.bench.data import NON_FUSED, OURS
from fusedrnn.bench.extrapolate import SLOW
from fusedrnn.bench.tables import duration
from fusedrnn.bench.timing import DISTURBED, MIN_SAMPLES, ONE_SAMPLE_SECONDS
from fusedrnn.cli.console import check_writable, fail
from fusedrnn.cli.program import Program

_TEMPLATE = "page.html.j2"
_MIN_PIXELS_PER_INCH, _MAX_PIXELS_PER_INCH = 60, 110

app = Program()


class Cell(NamedTuple):
    """A cell of the table: its text, a note below it, and its class."""

    text: str = ""
    note: str = ""
    kind: str = ""


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="A file of `fusedrnn bench --json` or `benchmarks.compare --json`.")],
    page: Annotated[Path, typer.Argument(help="The HTML file to write.")],
) -> None:
    """Write one HTML page with the machine, a table of every row, the figures, the method, and the JSON itself."""
    try:
        benchmark = load(file)
        check_writable("page", page)
    except ValueError as error:
        fail(str(error))
    page.write_text(render(benchmark), encoding="utf-8")


def render(benchmark: Benchmark) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    data, records = benchmark.data, benchmark.records
    machine = data["machine"]
    contenders = list(colours(name for record in records for name in record.seconds))
    ours = [name for name in contenders if name in COMPARED]
    headings = [*contenders, "best other", *(f"{name} over it" for name in ours)]
    headings += [f"{name}, {unit}" for name in ours for unit in ("GFLOP/s", "of peak")]
    in_formats = [name for name in ours if any(record.over_float32(name) for record in records)]
    headings += [f"{name} over float32" for name in in_formats]
    cases = [
        {"name": case, "who": members[0].data["case"]["who"], "figure": _case_picture(index, case, members)}
        for index, (case, members) in enumerate(benchmark.by_case().items())
    ]
    roofline = roofline_figure(records, benchmark.bandwidth)
    return environment.get_template(_TEMPLATE).render(
        title=f"fusedrnn bench: {machine['processor']}",
        machine=_machine_lines(machine, records, benchmark.bandwidth),
        configuration=[(name.replace("_", " "), _text(value)) for name, value in data["plan"].items()],
        headings=headings,
        lines=[_line(record, contenders, ours, in_formats) for record in records],
        failures=_reasons(records, "failures"),
        rejected=_reasons(records, "shares_refused"),
        cases=cases,
        roofline=_picture(roofline, "roof", "Roofline with every case on it"),
        intensity=INTENSITY,
        disturbed=f"{DISTURBED:.0%}",
        min_samples=MIN_SAMPLES,
        one_sample_seconds=f"{ONE_SAMPLE_SECONDS:g}",
        slow_seconds=f"{SLOW:g}",
        data=json.dumps(data).replace("<", "\\u003c"),  # so that no string can end the script element
    )


def _machine_lines(
    machine: Mapping[str, Any], records: Sequence[Record], bandwidth: Mapping[str, float]
) -> list[tuple[str, str]]:
    peaks = [record.peak for record in records if record.peak]
    limits = dict.fromkeys(f"{peak:.0f}" for peak in ((min(peaks), max(peaks)) if peaks else ()))
    versions = {name: _text(value) for record in records for name, value in record.data["versions"].items()}
    caches = ", ".join(f"{level} {size / 1024:,.0f} KiB" for level, size in machine["caches"].items())
    return [
        ("processor", machine["processor"]),
        ("system", machine["system"]),
        ("target", machine["target_description"]),
        ("caches", caches),
        ("FMA peak", f"{' to '.join(limits)} GFLOP/s" if limits else ""),
        ("peaks of formats", ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in _format_peaks(records).items())),
        ("read bandwidth", ", ".join(f"{level} {speed:.0f} GB/s" for level, speed in bandwidth.items())),
        ("BLAS of non-fused", ", ".join(machine["blas"])),
        ("versions", _text(machine["versions"])),
        *((f"versions of {name}", text) for name, text in versions.items()),
    ]


def _format_peaks(records: Sequence[Record]) -> dict[str, float]:
    """GFLOP/s by format of operands, for int8 in operations on integers; empty if there is only one format."""
    peaks: dict[str, float] = {}
    for record in records:
        for name, rate in record.data.get("peaks", {}).items():
            peaks[name] = max(rate or 0.0, peaks.get(name, 0.0))
    return peaks


def _text(value: object) -> str:
    """A JSON value as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if value is None:
        return ""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _reasons(records: Sequence[Record], field: str) -> list[str]:
    """A line for each contender that lacks something, with the row and the reason."""
    return [
        f"{name}, {_row_name(record)}: {reason}" for record in records for name, reason in record.data[field].items()
    ]


def _row_name(record: Record) -> str:
    return f"{record.case} {MODE_NAMES[record.mode]} {record.phase}{' packed' if record.packed else ''}"


def _line(record: Record, contenders: Sequence[str], ours: Sequence[str], in_formats: Sequence[str]) -> dict[str, Any]:
    """A line of the table: the times of all contenders, then comparisons of ours with the others and with float32."""
    cells: list[Cell] = []
    if not record.wrong:
        cells = [_time_cell(record, name) for name in contenders]
        cells.append(Cell(record.best_other or ""))
        cells += [_ratio_cell(record.over_best(name)) for name in ours]
        for name in ours:
            share = record.data["shares_of_peak"].get(name)
            cells.append(Cell(f"{record.gflops[name]:.1f}" if name in record.gflops else ""))
            cells.append(Cell(f"{100 * share:.1f} %" if share is not None else ""))
        cells += [_ratio_cell(record.over_float32(name)) for name in in_formats]
    title = f"{record.data['least_bytes']:,} bytes at least"
    return {"name": _row_name(record), "title": title, "wrong": record.wrong, "cells": cells}


def _time_cell(record: Record, name: str) -> Cell:
    """The median; below it percentiles, if there are any, and a note on how a non-fused network was measured."""
    timing = record.data["seconds"].get(name)
    if timing is None:
        return Cell()
    notes = [f"{rank} {duration(timing[rank])}" for rank in ("p50", "p99") if timing[rank] is not None]
    if name == NON_FUSED and timing["deviation"] is not None:
        notes.append(f"±{100 * timing['deviation']:.0f} %")
    total = record.data["case"]["T"]
    if timing["steps"] != total:
        notes.append(f"{timing['steps']} of {total} steps")
    return Cell(duration(timing["median"]), ", ".join(notes), "ours" if name in OURS else "")


def _ratio_cell(ratio: float | None) -> Cell:
    if ratio is None:
        return Cell()
    return Cell(f"{ratio:.2f}\u00d7", kind="ahead" if ratio >= 1.0 else "behind")


def _case_picture(index: int, case: str, records: Sequence[Record]) -> dict[str, Any]:
    letters = "".join(letter if letter.isalnum() else " " for letter in case)
    return _picture(case_figure(records), f"case{index}", f"GFLOP/s of every contender in {letters}")


def _picture(figure: Any, prefix: str, description: str) -> dict[str, Any]:
    """An SVG with the limits of its width. It scrolls sideways if it would otherwise be too small to read."""
    inches = figure.get_figwidth()
    return {
        "svg": inline_svg(figure, prefix, description),
        "min_width": round(_MIN_PIXELS_PER_INCH * inches),
        "max_width": round(_MAX_PIXELS_PER_INCH * inches),
    }


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.page")
