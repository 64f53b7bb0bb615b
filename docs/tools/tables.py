"""Benchmark tables of the documentation, generated from the benchmark's JSON.

A page marks the place of a table with ``<!-- table: FILE VIEW [ARGUMENTS] -->`` and ``<!-- /table -->``. FILE is a file
in ``docs/benchmarks/data`` without its ending. ``python docs/tools/tables.py`` writes every table again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from math import exp, log
from pathlib import Path
from textwrap import fill
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
DATA = DOCS / "benchmarks" / "data"
MARKED = re.compile(r"(<!-- table: (\S+) ([^>]*?) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_relu": "ReLU", "rnn_tanh": "tanh"}
WORKLOADS = {
    "ds2": "300 steps of 20 sequences, 800 units",
    "ds2-5bi": "the same, five layers, both directions",
    "small": "50 steps of 32 sequences, 64 units",
    "forecaster": "60 steps of 32 sequences, two layers of 40",
    "seq1": "one sequence of 100 steps, 256 units",
    "stream1": "one step of one sequence, 256 units",
}
OURS = "fused"
MISSING = "\N{EN DASH}"
PEERS = ["PyTorch", "ONNX RT", "OpenVINO", "JAX", "Keras", "MXNet fused", "MXNet cells"]
Rows = list[dict[str, Any]]


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(columns), *map(list, rows)]
    rule = "|" + "---|" * len(lines[0])
    first, *others = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([first.replace("|  |", "| |"), rule, *others])


def seconds(value: Any) -> str:
    """A time with three digits in its unit; a dash if it was not measured."""
    if value is None:
        return MISSING
    value = value["median"] if isinstance(value, dict) else value
    scale, unit = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{value * scale:.3g} {unit}"


def percent(share: float | None) -> str:
    """A share of the peak."""
    return MISSING if share is None else f"{share * 100:.1f} %"


def name(row: dict[str, Any]) -> str:
    """Workload and cell of a row, as ``ds2 LSTM``."""
    case = row["case"]
    return f"{case['name'] if isinstance(case, dict) else case} {CELLS[row['mode']]}"


def chosen(rows: Rows, phase: str, threads: str) -> Rows:
    """Rows of one phase on that many threads."""
    return [row for row in rows if row["phase"] == phase and row["threads"] == int(threads)]


def peers(data: dict[str, Any], phase: str, threads: str) -> str:
    """Every workload and cell beside the other libraries, the fastest of them in bold."""
    lines = []
    for row in chosen(data["rows"], phase, threads):
        times = {peer: row["seconds"][peer] for peer in PEERS if peer in row["seconds"]}
        best = min(times, key=lambda peer: times[peer])
        shown = [f"**{seconds(times[peer])}**" if peer == best else seconds(times.get(peer)) for peer in PEERS]
        ratio = f"{row['fused_over_best_peer']:.2f}"
        lines.append([name(row), seconds(row["seconds"][OURS]), *shown, ratio, percent(row["share_of_peak"])])
    return table(["", OURS, *PEERS, "best peer / fused", "of the peak"], lines)


def summary(data: dict[str, Any], threads: str) -> str:
    """Times as fast as the fastest peer, in a few workloads: LSTM / GRU / vanilla tanh."""
    ratio = {
        (row["case"], row["mode"], row["phase"]): row["fused_over_best_peer"]
        for row in data["rows"]
        if row["threads"] == int(threads)
    }
    lines = []
    for case, text in WORKLOADS.items():
        cells = [
            " / ".join(f"{ratio[case, mode, phase]:.2f}" for mode in ("lstm", "gru", "rnn_tanh"))
            for phase in ("inference", "training")
        ]
        lines.append([text, *cells])
    return table(["LSTM / GRU / vanilla tanh", "inference", "training"], lines)


def counts(data: dict[str, Any], threads: str) -> str:
    """In how many rows we are ahead, and the geometric means over the fastest peer and over torch.nn."""
    rows = [row for row in data["rows"] if row["threads"] == int(threads)]
    ahead = sum(row["fused_over_best_peer"] >= 1 for row in rows)
    far_ahead = sum(row["fused_over_best_peer"] >= 1.2 for row in rows)
    by_phase = [chosen(rows, phase, threads) for phase in ("inference", "training")]
    over_best = [mean(row["fused_over_best_peer"] for row in phase) for phase in by_phase]
    over_torch = [mean(row["seconds"]["PyTorch"] / row["seconds"][OURS] for row in phase) for phase in by_phase]
    alone = sum(row["seconds"].keys() <= {OURS, "PyTorch"} for row in rows)
    return fill(
        f"At least as fast as the fastest peer in {ahead} of {len(rows)} rows, by a fifth or more in {far_ahead}; in "
        f"{alone} of the rows PyTorch is the only peer that was measured. Geometric means over the fastest peer: "
        f"{over_best[0]:.2f} in inference, {over_best[1]:.2f} in training; over PyTorch: {over_torch[0]:.2f} and "
        f"{over_torch[1]:.2f}.",
        width=120,
    )


def mean(ratios: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [log(ratio) for ratio in ratios]
    return exp(sum(logs) / len(logs))


def engines(data: dict[str, Any]) -> str:
    """The operator on one engine and on another: inference and training side by side."""
    others = sorted({engine for row in data["rows"] for engine in row["seconds"]} - {OURS})
    lines: dict[str, list[str]] = {}
    for row in data["rows"]:
        times = [seconds(row["seconds"].get(engine)) for engine in (OURS, *others)]
        lines.setdefault(name(row), [name(row)]).extend([*times, f"{row['fused_over_onednn']:.2f}"])
    heads = [
        f"{phase}: {head}" for phase in ("inference", "training") for head in (OURS, *others, f"{others[0]} / fused")
    ]
    return table(["", *heads], lines.values())


def measured(data: dict[str, Any]) -> str:
    """A file that ``fusedrnn bench --json`` wrote: every contender, and the share of the peak."""
    contenders = list(dict.fromkeys(contender for row in data["rows"] for contender in row["seconds"]))
    lines = [
        [name(row), row["phase"], *(seconds(row["seconds"].get(contender)) for contender in contenders),
         percent(row["share_of_peak"])]
        for row in data["rows"]
    ]  # fmt: skip
    return table(["", "phase", *contenders, "of the peak"], lines)


def figures(data: dict[str, Any], key: str) -> str:
    """A table that the file holds as it is shown."""
    held = data["tables"][key]
    return table(held["columns"], held["rows"])


def onnx_models(data: dict[str, Any]) -> str:
    """Whole ONNX models in ONNX Runtime alone and after ``accelerate``."""
    lines = []
    for row in data["rows"]:
        times = f"{row['onnxruntime']:.3g}", f"{row['fused']:.3g}", f"{row['ratio']:.2f}"
        noise = f"{row['noise'] * 100:+.1f} %"
        error = MISSING if row["error"] is None else f"{row['error']:.2g}"
        replaced = f"{row['replaced']} of {row['nodes']}"
        lines.append([row["model"], replaced, percent(row["share"]), *times, noise, error])
    return table(["", "replaced", "share", "ONNX Runtime", "accelerate", "ratio", "noise", "error"], lines)


def packages(data: dict[str, Any]) -> str:
    """Cells of the catalogue and the packages that published them, from ``python -m benchmarks.published_cells``."""
    lines = [
        [
            f"`{row['cell']}`", ", ".join(str(row[size]) for size in ("steps", "batch", "features", "hidden")),
            row["phase"], seconds(row["package"]), seconds(row["fused"]), f"{row['package'] / row['fused']:.2f}",
        ]
        for row in data["rows"]
        if "package" in row
    ]  # fmt: skip
    return table(["", "T, N, I, H", "", "package", OURS, "package / fused"], lines)


def recurrences(data: dict[str, Any]) -> str:
    """Cells without recurrent weights beside a copy of memory, from ``python -m benchmarks.published_cells``."""
    lines = []
    for row in data["rows"]:
        if "copy" in row:
            needed, copied = (row[size] / row[time] / 1e9 for size, time in (("bytes", OURS), ("copied_bytes", "copy")))
            cells = f"{needed:.1f} GB/s", f"{copied:.1f} GB/s", f"{needed / copied * 100:.0f} %"
            lines.append([f"`{row['cell']}`", seconds(row[OURS]), *cells])
    return table(["", OURS, "reads and writes", "copy", "of the copy"], lines)


def modules(data: dict[str, Any], phase: str) -> str:
    """How many times as fast as torch.nn's modules ours are, from ``fusedrnn bench --only-torch``; bold where slower.

    For packed sequences also the rate of useful work, as a share of the rate without padding.
    """
    ratios: dict[str, dict[str, float]] = {}
    lines: dict[str, list[str]] = {}
    for row in (row for row in data["rows"] if row["phase"] == phase):
        case, ratio, useful = row["case"]["name"], row["fused_in_torch_over"]["torch.nn"], row["packed_over_unpacked"]
        ratios.setdefault(row["mode"], {})[case] = ratio
        text = f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"
        lines.setdefault(case, [case]).append(text if useful is None else f"{text}, {useful * 100:.0f} %")
    means = [f"{mean(by_case.values()):.2f}" for by_case in ratios.values()]
    return table([phase, *(CELLS[mode] for mode in ratios)], [*lines.values(), ["geometric mean", *means]])


def torch_cells(data: dict[str, Any]) -> str:
    """Our cells in PyTorch and torch.nn's, from ``python -m benchmarks.pytorch_cells``; bold where slower."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in data["rows"]:
        theirs, ours = row["median"]["torch.nn"], row["median"]["fused"]
        ratio = f"{theirs / ours:.2f}" if theirs >= ours else f"**{theirs / ours:.2f}**"
        units, _, batch = row["case"].partition("x")
        key = f"{units}, {batch}", row["phase"]
        lines.setdefault(key, [*key]).append(f"{ratio}, {seconds(ours)}")
    return table(["H, N", "", *dict.fromkeys(row["cell"] for row in data["rows"])], lines.values())


def compiled_loops(data: dict[str, Any]) -> str:
    """The fused layer and loops in PyTorch, from ``python -m benchmarks.compiled_loops``."""
    lines = []
    for row in data["rows"]:
        ours = row["median"]["fused"]
        ratios = [f"{row['median'][loop] / ours:.2f}" for loop in ("loop", "compiled loop")]
        cell = CELLS.get(row["cell"], f"`{row['cell']}`")
        lines.append([f"{row['case']} {cell}", row["phase"], seconds(ours), *ratios])
    return table(["", "", OURS, "loop / fused", "compiled loop / fused"], lines)


VIEWS: dict[str, Callable[..., str]] = {
    "peers": peers, "summary": summary, "counts": counts, "engines": engines, "measured": measured, "figures": figures,
    "onnx_models": onnx_models, "packages": packages, "recurrences": recurrences,
    "modules": modules, "torch_cells": torch_cells, "compiled_loops": compiled_loops,
}  # fmt: skip


def with_tables(page: str) -> str:
    """The text of a page with its tables as the data have them."""

    def again(marked: re.Match[str]) -> str:
        begin, file, arguments, _, end = marked.groups()
        data = json.loads((DATA / f"{file}.json").read_text(encoding="utf-8"))
        view, *options = arguments.split()
        return f"{begin}\n{VIEWS[view](data, *options)}\n\n{end}"

    return MARKED.sub(again, page)


def main() -> None:
    """Write every table of every page again."""
    for path in sorted([DOCS.parent / "README.md", *DOCS.rglob("*.md")]):
        text = path.read_text(encoding="utf-8")
        if with_tables(text) != text:
            path.write_text(with_tables(text), encoding="utf-8")
            print(f"written: {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
