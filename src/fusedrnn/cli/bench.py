"""``fusedrnn bench``: the options, the tables, the file, and the exit code."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import fusedrnn
from fusedrnn.bench import variants as variants_bench
from fusedrnn.bench.contenders import PHASES, Phase
from fusedrnn.bench.data import FUSED, IN_FORMAT, IN_TORCH, NON_FUSED, TORCH, UNPACKED, load
from fusedrnn.bench.formats import format_fields
from fusedrnn.bench.lines import extrapolated_lines, failure_lines, peak_lines, rejected_share_lines, summary
from fusedrnn.bench.memory import check_memory
from fusedrnn.bench.peaks import at_best_peak
from fusedrnn.bench.report import environment_report, report
from fusedrnn.bench.rows import AnyRow, BenchConfig, Row
from fusedrnn.bench.runner import Progress
from fusedrnn.bench.runner import run as run_rows
from fusedrnn.bench.tables import engines_table, formats_table, tables, variants_table
from fusedrnn.cell.cells import Cell
from fusedrnn.cli import options
from fusedrnn.cli.cells import load_cells
from fusedrnn.cli.console import check_writable, fail, output, steps, write_json
from fusedrnn.engines import registry
from fusedrnn.extras import needs
from fusedrnn.runtime.bandwidth import measure_bandwidth
from fusedrnn.spec import RNNSpec


def bench(
    cases: options.Cases = "ds2,ds2-5bi",
    modes: options.Modes = options.ALL_MODES,
    cell: options.Cells = "",
    phases: options.Phases = options.ALL_PHASES,
    threads: options.Threads = None,
    dtype: options.Dtype = "float32",
    data: options.Data = None,
    steps: options.Steps = "",
    batch: options.Batch = "",
    hidden: options.Hidden = "",
    torch: Annotated[
        bool, typer.Option("--torch", help="Compare with torch.nn too: its modules as they are, and accelerated.")
    ] = False,
    only_torch: Annotated[
        bool, typer.Option("--only-torch", help="Compare those modules alone: idle BLAS threads disturb them.")
    ] = False,
    packed: Annotated[
        bool,
        typer.Option("--packed", help="Compare those modules on packed sequences, lengths uniform in T/2 to T."),
    ] = False,
    backends: Annotated[
        str, typer.Option(help=f"Compare engines of the operator, separated by commas: {', '.join(registry.names())}.")
    ] = "",
    variants: Annotated[
        bool, typer.Option("--variants", help="Compare each cell with its variants, such as a projected LSTM.")
    ] = False,
    compute: options.Compute = "float32",
    seconds: options.Seconds = 5.0,
    full: Annotated[
        bool, typer.Option("--full", help="Run all steps cell by cell, however long that takes, not only the first.")
    ] = False,
    json: options.Json = None,
) -> None:
    """Time the fused operator against the same network, run cell by cell. Without options, print MXNet's two tables.

    Training is the forward pass and all gradients. Outputs and gradients are checked before the timing, and again as
    they were timed. If one is wrong, its row says so and the exit code is 1.

    Useful work per second and its share of the peak do not count padding. The peak is the best of short samples between
    the contenders' turns. A share above 100 % is measured again; if it is again above, it is not shown.

    With --variants, each cell takes turns with its variants, and their shares of the peak are compared. The projected
    LSTM is also compared with torch.nn's. With --cell, --torch compares a cell with a loop of PyTorch's operations, as
    a user of PyTorch would write it. With --backends, the operator takes turns on several engines. With --compute, it
    takes turns in several formats of GEMM operands, each with its share of the format's own peak.

    Contenders take turns on the same threads. Turns before or after which the machine has less than three quarters of
    the peak do not count, if enough others remain. Each contender runs at least twice, and medians are shown; for the
    network cell by cell, ± is half the distance between its fastest and slowest run. If that network takes more than
    three seconds, its time is extrapolated from as many first steps as take one or two seconds, and the table says how
    many. With --full it runs all steps, but only once if that takes ten seconds or more. The two tables take less than
    six minutes on two slow cores.

    In a checkout of the project, `python -m benchmarks.compare` times other libraries and earlier revisions, and
    `python -m benchmarks.figures` and `python -m benchmarks.page` draw the file of --json.
    """
    try:
        compared = contender_fields(torch, only_torch, packed, backends, variants, compute)
        if cell and variants:
            raise ValueError("--variants cannot be used with --cell: a cell has no variants")
        options.check_cells_alone(cell, modes)
        config = make_config(
            cases, load_cells(cell) if cell else modes, phases, dtype, threads, data, steps, batch, hidden,
            budget=seconds, full=full, **compared,
        )  # fmt: skip
        if full and (variants or NON_FUSED not in config.contenders):
            raise ValueError("--full cannot be used without the network cell by cell, as with --variants or --backends")
        check_writable("--json", json)
    except (ValueError, ModuleNotFoundError) as error:
        fail(str(error))
    raise typer.Exit(0 if run(config, json) else 1)


def contender_fields(
    torch: bool = False,
    only_torch: bool = False,
    packed: bool = False,
    backends: str = "",
    variants: bool = False,
    compute: str = "float32",
) -> dict[str, Any]:
    """The fields of BenchConfig that determine the contenders.

    Raises:
        ValueError: If options exclude one another, or an engine is unknown.
        ModuleNotFoundError: If an option needs PyTorch and it is missing.
    """
    torch_contenders = {
        "--packed": (TORCH, IN_TORCH, UNPACKED) if packed else (),
        "--only-torch": (TORCH, IN_TORCH) if only_torch else (),
        "--torch": (NON_FUSED, FUSED, TORCH, IN_TORCH) if torch else (),
    }
    torch_option = next((name for name, names in torch_contenders.items() if names), None)
    if torch_option and importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError(needs(torch_option, "torch"))
    in_formats = format_fields(options.parse_names(compute, "format", IN_FORMAT))
    if in_formats and (torch_option or backends or variants):
        raise ValueError("--compute cannot be used with --torch, --only-torch, --packed, --backends or --variants")
    if in_formats:
        return in_formats
    if variants and (torch_option or backends):
        raise ValueError("--variants cannot be used with --torch, --only-torch, --packed or --backends")
    if backends and torch_option:
        raise ValueError(f"--backends cannot be used with {torch_option}: it compares engines of the operator alone")
    if backends:
        return {"contenders": tuple(options.parse_names(backends, "engine", registry.names())), "engines": True}
    return {"contenders": torch_contenders[torch_option]} if torch_option else {"variants": variants}


def make_config(
    cases: str,
    modes: str | Sequence[Cell],
    phases: str,
    dtype: str,
    threads: int | None,
    data: Path | None = None,
    steps: str = "",
    batch: str = "",
    hidden: str = "",
    **fields: Any,
) -> BenchConfig:
    """The configuration that the options describe; ``modes`` may be cells.

    ``fields`` are the fields of BenchConfig that need no parsing.

    Raises:
        ValueError: If a name is unknown, the data is not a suitable array, a case does not fit the memory, or
            contenders cannot run a case and a cell.
    """
    dtype = options.parse_dtype(dtype)
    x = load(data, dtype) if data else None
    config = BenchConfig(
        cases=options.parse_cases(cases, steps, batch, hidden, x),
        modes=options.parse_modes(modes) if isinstance(modes, str) else modes,
        phases=[PHASES[name] for name in options.parse_names(phases, "phase", PHASES)],
        dtype=dtype,
        threads=threads or fusedrnn.get_num_threads(),
        data=x,
        **fields,
    )
    if config.formats and dtype != "float32":
        raise ValueError(f"--compute {','.join(config.formats.values())} needs --dtype float32; got {dtype}")
    for case, mode, phase in config.rows():
        spec = case.spec(mode, dtype)
        check_memory(case, spec, training=phase.training)
        _check_contenders(config, spec, phase)
    return config


def _check_contenders(config: BenchConfig, spec: RNNSpec, phase: Phase) -> None:
    """Raise a ValueError if the contenders cannot run a network in a phase, or not so that results can be compared."""
    for number_format in config.formats.values():
        replace(spec, compute=number_format)  # an error if the format does not have the network
    if phase.training and spec.drops and TORCH in config.contenders:
        raise ValueError(
            f"--torch, --only-torch and --packed cannot be used with the cell {spec.mode_name} in training: PyTorch "
            "draws other random masks than the reference; use --phases inference"
        )


def run(config: BenchConfig, json_path: Path | None) -> bool:
    """Run the benchmark, print its tables, write its file. Returns whether every result was right."""

    def make_tables(rows: Sequence[Row]) -> list[Table]:
        if config.variants:
            return [variants_table(rows)]
        if config.formats:
            return [formats_table(rows)]
        return [engines_table(rows)] if config.engines else tables(rows, config.contenders)

    summarize = (lambda row: row.name) if config.variants else summary
    rows = run_and_print(config, lambda progress: run_rows(config, progress), summarize, make_tables)
    if json_path and config.variants:
        lines = variants_bench.report(rows)
        write_json(json_path, {"machine": environment_report(), "threads": config.threads, "lines": lines})
    elif json_path:
        write_json(json_path, report(config, rows, measure_bandwidth(config.threads)))
    return not any(row.wrong or (config.variants and row.failures) for row in rows)


def run_and_print(
    config: BenchConfig,
    run_rows: Callable[[Progress], Iterator[AnyRow]],
    summary: Callable[[AnyRow], str],
    make_tables: Callable[[Sequence[AnyRow]], list[Table]],
) -> list[AnyRow]:
    """Run every row and print the machine, the tables, and the notes that a reader of the tables needs.

    The notes are on extrapolated times, shares that are not shown, failures and errors. Returns the rows with the best
    peak. The command ends with an error if a row needs more memory than there is, or nothing could be timed.
    """
    rows: list[AnyRow] = []
    try:
        with steps(len(config.rows())) as progress:
            for row in run_rows(progress.say):
                rows.append(row)
                progress.done(summary(row))
    except MemoryError as error:
        case, mode, phase = config.rows()[len(rows)]
        fail(f"{case.name} {mode} {phase.name} does not fit the memory: {error}")
    rows = at_best_peak(rows)
    if not any(row.timings or row.is_wrong for row in rows):
        fail(f"there is nothing to time: {'; '.join(failure_lines(rows))}")
    console, machine = output(), environment_report()
    console.print(
        f"{machine['processor']}, {machine['target_description']}, threads: {config.threads}", highlight=False
    )
    for table in make_tables(rows):
        console.print()
        console.print(table)
    for line in (
        *peak_lines(rows),
        *extrapolated_lines(rows),
        *rejected_share_lines(rows),
        *failure_lines(rows),
    ):
        console.print(line, markup=False, highlight=False)
    for row in rows:
        if row.wrong:
            console.print(f"[bold red]wrong[/] {row.name}: ", end="", highlight=False)
            console.print(row.wrong, markup=False, highlight=False)
    return rows
