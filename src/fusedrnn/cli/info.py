"""``fusedrnn info``: the processor, the engines, and the measured peaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

import fusedrnn
from fusedrnn import RNNSpec
from fusedrnn.bench.lines import rate_text
from fusedrnn.bench.report import environment_report
from fusedrnn.bench.tables import MODE_NAMES
from fusedrnn.cli import kernels_folder
from fusedrnn.cli.console import fail, output
from fusedrnn.cli.options import ALL_MODES, Threads, parse_cases, parse_dtype, parse_modes
from fusedrnn.cli.plan import PlanConfig, print_plans
from fusedrnn.engines import registry
from fusedrnn.env import cache_directory
from fusedrnn.jit.amx import request_permission
from fusedrnn.jit.host import current_target, dot_product_sets
from fusedrnn.runtime.bandwidth import measured_rates
from fusedrnn.runtime.machine_rates import MachineRates
from fusedrnn.runtime.peak import measure_peak
from fusedrnn.runtime.peak_instructions import FMA, instruction_of
from fusedrnn.spec import DTYPES
from fusedrnn.testing.cases import CASES

_FORMATS = {"BF16": "bfloat16", "INT8": "int8"}
"""Formats of GEMM operands by the name of their peak."""


def info(
    plan: Annotated[
        str, typer.Option(help=f"Show how these workloads are partitioned, separated by commas: {', '.join(CASES)}.")
    ] = "",
    modes: Annotated[
        str, typer.Option(help=f"With --plan: cells, separated by commas: {', '.join(MODE_NAMES)}.")
    ] = ALL_MODES,
    dtype: Annotated[str, typer.Option(help=f"With --plan: {' or '.join(DTYPES)}.")] = "float32",
    threads: Threads = None,
    everything: Annotated[
        bool, typer.Option("--all", help="With --plan: time every partition, not only the chosen one.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure anew the rates that the cost model has of this machine.")
    ] = False,
) -> None:
    """Show the processor, the instruction set of the kernels, the peaks of formats, and the rates that plans assume.

    If there are no rates yet, they are measured and kept in the folder of compiled kernels.

    With --plan, show the partitions of a workload over threads, the time that the cost model predicts for each, and the
    measured time of the partition that it chooses. Nothing else should run on the machine meanwhile.
    """
    num_threads = threads or fusedrnn.get_num_threads()
    if not plan:
        is_changed = {"--modes": modes != ALL_MODES, "--dtype": dtype != "float32", "--all": everything}
        if changed := [name for name, changed in is_changed.items() if changed]:
            fail(f"{' and '.join(changed)} cannot be used without --plan")
        measured_rates(anew=measure)
        _print_machine(num_threads)
        return
    try:
        workloads = parse_cases(plan), parse_modes(modes), parse_dtype(dtype)
    except ValueError as error:
        fail(str(error))
    measured_rates(anew=measure)
    print_plans(PlanConfig(*workloads, num_threads, everything))


def _print_machine(num_threads: int) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(num_threads):
        table.add_row(name, escape(value))
    output().print(table, highlight=False)


def _lines(num_threads: int) -> Iterator[tuple[str, str]]:
    machine = environment_report()
    yield "processor", machine["processor"]
    yield "system", machine["system"]
    yield "target", f"{machine['target']}: {machine['target_description']}, compiled for {machine['target_cpu']}"
    yield "vector width", f"{machine['vector_bits']} bits"
    yield "threads", str(num_threads)
    yield "caches", ", ".join(f"{level} {_size(size)}" for level, size in machine["caches"].items()) or "unknown"
    for engine in registry.engines():
        selection = "" if engine.automatic else f", with backend={engine.name!r}"
        rejection = _rejection(engine.name)
        yield f"engine {engine.name}", f"{engine.description}{selection}: {engine.capabilities}{rejection}"
    yield "dot products", _dot_products()
    for dtype in DTYPES:
        yield f"FMA peak {dtype}", _peaks(dtype, num_threads)
    for name, number_format in _FORMATS.items():
        instruction = instruction_of(number_format, current_target())
        by_fma = "that of FMA: widened to float32"
        yield (
            f"{name} peak",
            by_fma if instruction == FMA else (f"{_peaks(number_format, num_threads)}, by {instruction.name}"),
        )
    yield "cost model", _rates(measured_rates())
    yield "BLAS of non-fused", ", ".join(machine["blas"]) or "unknown"
    yield "kernels kept in", _kernels_folder()
    yield "versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())


def _rejection(name: str) -> str:
    """Why an engine declines even a small network within its capabilities, for example because a library is missing."""
    capabilities = registry.find(name).capabilities
    spec = RNNSpec(capabilities.modes[0], 1, 1, dtype=capabilities.dtypes[0])
    try:
        registry.EngineSelector(spec, name).select()
    except NotImplementedError as error:
        return f"; declines here: {error}"
    return ""


def _kernels_folder() -> str:
    """The folder of compiled kernels; if it cannot be used, the text says so and why."""
    reason = kernels_folder.rejection()
    return f"memory only: {reason}" if reason else str(cache_directory())


def _dot_products() -> str:
    """The host's instruction sets for dot products, each with yes or no."""
    sets = {name: "yes" if present else "no" for name, present in dot_product_sets().items()}
    if "yes" in (sets["AMX-BF16"], sets["AMX-INT8"]) and not request_permission():
        sets |= {name: f"{text}, but not permitted" for name, text in sets.items() if name.startswith("AMX")}
    return ", ".join(f"{name} {text}" for name, text in sets.items())


def _peaks(number_format: str, threads: int) -> str:
    on_one = f"{rate_text(number_format, measure_peak(number_format, 1))} on 1 thread"
    return on_one if threads == 1 else f"{on_one}, {measure_peak(number_format, threads):.1f} on {threads}"


def _rates(rates: MachineRates) -> str:
    """The rates of this machine in the cost model, without levels that were not measured."""
    bandwidths = {"L2": rates.l2, "L3": rates.l3, "memory": rates.memory}
    reads = ", ".join(f"{level} {rate:.0f}" for level, rate in bandwidths.items() if rate)
    return f"{rate_text('float32', rates.fma)}, reading {reads} GB/s on 1 thread, as measured once"


def _size(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"
