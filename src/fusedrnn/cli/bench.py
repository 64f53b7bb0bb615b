"""``fusedrnn bench``: from options to a plan, and from rows to tables, files and an exit code."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import fusedrnn
from fusedrnn.bench import plots
from fusedrnn.bench.bandwidth import measure_bandwidth
from fusedrnn.bench.contenders import PHASES, phase_named
from fusedrnn.bench.data import load
from fusedrnn.bench.estimate import expected_seconds
from fusedrnn.bench.facts import machine
from fusedrnn.bench.html import page
from fusedrnn.bench.mxnet_page import NAMES
from fusedrnn.bench.peaks import at_best_peak
from fusedrnn.bench.peers.environments import PEERS
from fusedrnn.bench.peers.revision import find
from fusedrnn.bench.peers.table import failures, rivals_table
from fusedrnn.bench.report import report
from fusedrnn.bench.rows import Plan, Row
from fusedrnn.bench.runner import run as run_rows
from fusedrnn.bench.tables import engines_table, parts_said, refusals, summary, tables
from fusedrnn.cli.console import names, output, steps
from fusedrnn.engines import registry
from fusedrnn.runtime.peak import measure_peak
from fusedrnn.spec import DTYPES
from fusedrnn.testing.cases import CASES


def make_plan(
    cases: str,
    modes: str,
    phases: str,
    dtype: str,
    threads: int | None,
    data: Path | None,
    torch: bool,
    seconds: float,
    *,
    full: bool = False,
    only_torch: bool = False,
    packed: bool = False,
    peers: str = "",
    against: str = "",
    backends: str = "",
    steps: str = "",
    batch: str = "",
) -> Plan:
    """The plan that the options describe; ``only_torch`` and ``packed`` ask for torch as well.

    ``steps`` and ``batch`` are numbers, separated by commas, in the place of the cases' own T and N.

    Raises:
        ValueError: If a name or revision is unknown, a peer that was named is not built, options exclude one another,
            or the data is not what it must be.
        ModuleNotFoundError: If torch is asked for and missing.
    """
    chosen = [CASES[name] for name in names(cases, "case", CASES)]
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; valid: {', '.join(DTYPES)}")
    asked = [name for name, on in (("--torch", torch), ("--only-torch", only_torch), ("--packed", packed)) if on]
    if asked and importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError(f"{asked[0]} needs PyTorch, which is not installed")
    if asked and (peers or against):
        raise ValueError(f"{asked[0]} cannot go with {'--peers' if peers else '--against'}: those compare the operator")
    others = [name for name, on in (*zip(asked, asked, strict=True), ("--peers", peers), ("--against", against)) if on]
    if backends and others:
        raise ValueError(f"--backends cannot go with {others[0]}: it compares engines of the operator alone")
    x = load(data) if data else None
    if x is not None:
        if steps or batch:
            raise ValueError(f"--data cannot go with {'--steps' if steps else '--batch'}: it has its own")
        T, N, I = x.shape
        chosen = [case.at(T, N, I) for case in chosen]
    chosen = [
        case.at(T or case.T, N or case.N, case.I)
        for case in chosen
        for T, N in product(_numbers("--steps", steps), _numbers("--batch", batch))
    ]
    return Plan(
        cases=chosen,
        modes=names(modes, "mode", NAMES),
        phases=[phase_named(name) for name in names(phases, "phase", PHASES)],
        dtype=dtype,
        threads=threads or fusedrnn.get_num_threads(),
        torch=bool(asked),
        only_torch=only_torch or packed,
        packed=packed,
        peers=choose_peers(peers) if peers else (),
        revisions=tuple(dict.fromkeys(find(each.strip()) for each in against.split(",") if each.strip())),
        backends=tuple(names(backends, "engine", registry.names())) if backends else (),
        budget=seconds,
        full=full,
        data=x,
    )


def _numbers(option: str, given: str) -> list[int]:
    """The positive numbers in a list; a single 0 if there is none.

    Raises:
        ValueError: If something else is in it.
    """
    found = [each.strip() for each in given.split(",")] if given.strip() else []
    if wrong := [each for each in found if not each.isdecimal() or int(each) == 0]:
        raise ValueError(f"{option} must be positive numbers, separated by commas; got {wrong[0]!r}")
    return [int(each) for each in found] or [0]


def choose_peers(given: str) -> tuple[str, ...]:
    """The peers in a list of names, or with ``all`` every one; what is not built is then said for each row.

    Raises:
        ValueError: If a name is unknown, or nothing of what was asked for can run.
    """
    chosen = tuple(PEERS) if given.strip() == "all" else tuple(names(given, "peer", ("all", *PEERS)))
    if "all" in chosen:
        raise ValueError("--peers takes all, or names, not both")
    missing = [name for name in chosen if not PEERS[name].environment.is_built()]
    if missing and (given.strip() != "all" or len(missing) == len(chosen)):
        listed, verb = ", ".join(missing), "is" if len(missing) == 1 else "are"
        raise ValueError(f"--peers: {listed} {verb} not built: run `make peers`")
    return chosen


def check_outputs(json_path: Path | None, plot_path: Path | None, html_path: Path | None = None) -> None:
    """Find out before minutes of measuring that a file cannot be written after them.

    Raises:
        ValueError: Naming the option.
    """
    for option, path in (("--json", json_path), ("--plot", plot_path), ("--html", html_path)):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {path.parent}")
        if path and os.path.isdir(path):
            raise ValueError(f"{option} {path}: it is a folder; expected the path of a file")
        if path:
            _check_writable(option, path)
    if plot_path and plot_path.suffix[1:].lower() not in plots.formats():
        raise ValueError(f"--plot {plot_path}: its ending must be one of {', '.join(plots.formats())}")


def _check_writable(option: str, path: Path) -> None:
    try:
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{option} {path}: it cannot be written: {error.strerror}") from error


def run(plan: Plan, json_path: Path | None, plot_path: Path | None, html_path: Path | None = None) -> bool:
    """Run the plan, print its tables, write its files. Returns whether every result was right."""
    rows: list[Row] = []
    with steps(expected_seconds(plan, measure_peak(plan.dtype, plan.threads))) as progress:
        for row in run_rows(plan, progress.say):
            rows.append(row)
            progress.done(summary(row))
    rows = at_best_peak(rows)
    show(plan, rows)
    _write(plan, rows, json_path, plot_path, html_path)
    return not any(row.wrong for row in rows)


def _write(
    plan: Plan, rows: Sequence[Row], json_path: Path | None, plot_path: Path | None, html_path: Path | None
) -> None:
    if not (json_path or plot_path or html_path):
        return
    bandwidth = measure_bandwidth(plan.threads)
    figures = report(plan, rows, bandwidth)
    if json_path:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    if plot_path:
        plots.plot(rows, plot_path, bandwidth)
    if html_path:
        html_path.write_text(page(figures, rows), encoding="utf-8")


def show(plan: Plan, rows: Sequence[Row]) -> None:
    """Print the machine, the tables, and what was wrong."""
    console = output()
    facts = machine()
    console.print(f"{facts['processor']}, {facts['target_description']}, threads: {plan.threads}", highlight=False)
    beside = plan.peers or plan.revisions
    one_table = engines_table if plan.backends else rivals_table if beside else None
    for table in [one_table(rows)] if one_table else tables(rows, plan.contenders()):
        console.print()
        console.print(table)
    for line in (*parts_said(rows), *refusals(rows), *failures(rows)):
        console.print(line, markup=False, highlight=False)
    for row in rows:
        if row.wrong:
            console.print(f"[bold red]wrong[/] {row.name}: ", end="", highlight=False)
            console.print(row.wrong, markup=False, highlight=False)
