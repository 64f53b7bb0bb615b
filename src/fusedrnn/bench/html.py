"""A benchmark as one page that needs nothing else: facts, table, bars, roofline, and the figures themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fusedrnn.bench.computed import NON_FUSED
from fusedrnn.bench.html_style import DOWNLOAD, STYLE
from fusedrnn.bench.parts import SLOW
from fusedrnn.bench.plots import by_case, case_figure, roofline_figure
from fusedrnn.bench.plots.bars import SHORT_NAMES
from fusedrnn.bench.plots.colours import colours
from fusedrnn.bench.plots.svg import markup
from fusedrnn.bench.ranking import COMPARED, OURS, best_other, over_best
from fusedrnn.bench.rows import Row
from fusedrnn.bench.timing import FEWEST, VERY_LONG
from fusedrnn.bench.traffic import INTENSITY, least_bytes

_METHOD = (
    "Before anything is timed, every contender's outputs and, in training, all its gradients are compared with a "
    "reference in float64; what was timed is compared once more. A row with a wrong result has no times. Contenders "
    "then take turns in rounds, so that a disturbance of the machine meets them all. A time is the median over rounds "
    f"of the seconds a call takes; everyone has at least {FEWEST} of them, but for a network cell by cell that runs "
    f"all steps and takes {VERY_LONG:g} seconds or more. One of more than {SLOW:g} seconds is measured on its first "
    "steps, where the page says so, and the time of all is told from theirs. \u00b1 is half the distance between the "
    "fastest and the slowest time. p50 and p99 are percentiles over single calls. "
    "Training is the forward pass and all gradients, without an optimizer.",
    "Useful work is that of the matrix products alone, three times as much in training; of packed sequences only the "
    "steps that are there count. The FMA peak is what the same threads reach with nothing but fused multiply-adds in "
    "the vectors in use: the best of all short samples of the run, one before each turn of a contender. A share above "
    "100 % is measured again, and left out if it stays.",
    f"The roofline's horizontal axis is {INTENSITY}: no computer can do with fewer, since a step needs the one before "
    "and no register file holds a network. Layers' inputs, outputs, states and other parameters count once; training "
    "counts all this twice, and once the gradients of each. A point belongs under the roof of the cache or memory from "
    "which its recurrent weights are read. Bandwidths are those at which the same threads find the largest number in "
    "arrays that fill half of a second-level cache, a quarter of the third level, and much more than that.",
)


def page(figures: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The whole page, of what :func:`fusedrnn.bench.report.report` made of the rows, and of the rows."""
    machine, plan = figures["machine"], figures["plan"]
    title = f"fusedrnn bench: {machine['processor']}"
    bandwidth = figures.get("bandwidth") or {}
    body = [
        f"<h1>{escape(title)}</h1>",
        _facts("Machine", _machine_facts(machine, rows, bandwidth)),
        _facts("Plan", [(name.replace("_", " "), _said(value)) for name, value in plan.items()]),
        "<h2>Every row</h2>",
        _table(rows),
        _left_out("Without a time", rows, [row.failures for row in rows]),
        _left_out("Without a share of the peak", rows, [row.refused for row in rows]),
        "<h2>Work done a second</h2>",
        *(_case(turn, members) for turn, members in enumerate(by_case(rows))),
        "<h2>Roofline</h2>",
        _picture(markup(roofline_figure(rows, bandwidth), "roof", "Roofline with every case on it"), 12.0),
        "<h2>How it was measured</h2>",
        *(f"<p>{escape(paragraph)}</p>" for paragraph in _METHOD),
        '<p><a id="download" download="fusedrnn-bench.json">Every figure, as JSON</a></p>',
        f'<script type="application/json" id="figures">{_embedded(figures)}</script>',
        f"<script>{DOWNLOAD}</script>",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    content = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{content}\n</body></html>\n'


def _facts(heading: str, facts: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts if value)
    return f"<h2>{heading}</h2>\n<dl>{items}</dl>"


def _machine_facts(
    machine: Mapping[str, Any], rows: Sequence[Row], bandwidth: Mapping[str, float]
) -> list[tuple[str, str]]:
    peaks = [row.peak for row in rows if row.peak]
    theirs = {who: _said(versions) for row in rows for who, versions in row.versions.items()}
    ends = (min(peaks), max(peaks)) if peaks else ()
    caches = ", ".join(f"{level} {size / 1024:,.0f} KiB" for level, size in machine["caches"].items())
    return [
        ("processor", machine["processor"]),
        ("system", machine["system"]),
        ("target", machine["target_description"]),
        ("caches", caches),
        ("FMA peak", f"{' to '.join(dict.fromkeys(f'{peak:.0f}' for peak in ends))} GFLOP/s" if ends else ""),
        ("read from", ", ".join(f"{level} at {speed:.0f} GB/s" for level, speed in bandwidth.items())),
        ("BLAS of non-fused", ", ".join(machine["blas"])),
        ("versions", _said(machine["versions"])),
        *((f"versions of {who}", versions) for who, versions in theirs.items()),
    ]


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_said(each) for each in value)
    return {True: "yes", False: "no", None: ""}[value] if value is None or isinstance(value, bool) else str(value)


def _table(rows: Sequence[Row]) -> str:
    """A line for each row: seconds a call of everyone, then how ours stand."""
    contenders = list(colours(who for row in rows for who in row.timings))
    ours = [who for who in contenders if who in COMPARED]
    headings = [*contenders, "best other", *(f"{who} over it" for who in ours)]
    headings += [f"{who}, {unit}" for who in ours for unit in ("GFLOP/s", "of peak")]
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in ("", *headings))
    lines = "\n".join(_line(row, contenders, ours, len(headings)) for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def _left_out(heading: str, rows: Sequence[Row], reasons: Sequence[Mapping[str, str]]) -> str:
    """Who has none of what the heading says, in which row, and why."""
    missing = [(who, row.name, why) for row, each in zip(rows, reasons, strict=True) for who, why in each.items()]
    items = "".join(f"<li>{escape(who)}, {escape(name)}: {escape(why)}</li>" for who, name, why in missing)
    return f"<details><summary>{heading}: {len(missing)}</summary><ul>{items}</ul></details>" if missing else ""


def _line(row: Row, contenders: Sequence[str], ours: Sequence[str], width: int) -> str:
    label = f"{row.case.name} {SHORT_NAMES[row.mode]} {row.phase}{' packed' if row.lengths else ''}"
    name = f'<th scope="row" title="{least_bytes(row):,} bytes at least">{escape(label)}</th>'
    if row.wrong:
        return f'<tr>{name}<td class="wrong" colspan="{width}">wrong: {escape(row.wrong)}</td></tr>'
    cells = [_time_cell(row, who) for who in contenders]
    cells.append(f"<td>{escape(best_other(row) or '')}</td>")
    cells += [_ratio_cell(over_best(row, who)) for who in ours]
    for who in ours:
        there = who in row.timings
        share = row.share(who) if there else None
        cells.append(f"<td>{row.gflops(who):.1f}</td>" if there else "<td></td>")
        cells.append(f"<td>{100 * share:.1f} %</td>" if share is not None else "<td></td>")
    return f"<tr>{name}{''.join(cells)}</tr>"


def _time_cell(row: Row, who: str) -> str:
    """The median, and under it the percentiles that the timing has, or how far the non-fused network's times differ."""
    timing = row.timings.get(who)
    if timing is None:
        return "<td></td>"
    percentiles = [("p50", timing.p50), ("p99", timing.p99)]
    notes = [f"{name} {duration(seconds)}" for name, seconds in percentiles if seconds is not None]
    if who == NON_FUSED and timing.deviation is not None:
        notes.append(f"±{100 * timing.deviation:.0f} %")
    if who in row.parts:
        notes.append(f"{row.parts[who]} of {row.case.T} steps")
    small = f"<small>{', '.join(notes)}</small>" if notes else ""
    kind = ' class="ours"' if who in OURS else ""
    return f"<td{kind}>{duration(timing.median)}{small}</td>"


def _ratio_cell(ratio: float | None) -> str:
    if ratio is None:
        return "<td></td>"
    kind = "ahead" if ratio >= 1.0 else "behind"
    return f'<td class="{kind}">{ratio:.2f}\u00d7</td>'


def duration(seconds: float) -> str:
    """Seconds with three digits, in the unit that leaves at least one of them before the point."""
    size, unit = next(((size, unit) for size, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= size), (1e-6, "µs"))
    return f"{seconds / size:{'#.3g' if seconds < 999.5 * size else '.0f'}}".rstrip(".") + f" {unit}"


def _case(turn: int, rows: Sequence[Row]) -> str:
    case, figure = rows[0].case, case_figure(rows)
    who = f"<p>{escape(case.who)}</p>" if case.who else ""
    drawn = markup(figure, f"case{turn}", f"GFLOP/s of every contender in {escape(case.name)}")
    return f"<h3>{escape(case.name)}</h3>{who}{_picture(drawn, figure.get_figwidth())}"


def _picture(svg: str, inches: float) -> str:
    """In a frame that scrolls sideways where the picture would become too small to be read."""
    return (
        f'<div class="wide"><div style="min-width:{60 * inches:.0f}px;max-width:{110 * inches:.0f}px">{svg}</div></div>'
    )


def _embedded(figures: Mapping[str, Any]) -> str:
    """JSON in which nothing can end the element that holds it."""
    return json.dumps(figures).replace("<", "\\u003c")
