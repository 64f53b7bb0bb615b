"""The commands, and the options of ``info`` and ``warmup``."""

from __future__ import annotations

from typing import Annotated

import typer

from fusedrnn import env
from fusedrnn.cli import info as info_command
from fusedrnn.cli import plan as plan_command
from fusedrnn.cli import warmup as warmup_command
from fusedrnn.cli.bench import bench
from fusedrnn.cli.console import fail
from fusedrnn.cli.options import ALL_MODES, Dtype, Modes, Threads
from fusedrnn.jit.host import current_target
from fusedrnn.spec import DTYPES
from fusedrnn.testing.cases import CASES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def check_environment() -> None:
    """Fused recurrent networks on the CPU: measure them, show the machine, compile kernels ahead of time."""
    try:
        current_target(), env.debug(), env.num_threads()
    except ValueError as error:
        fail(str(error))


app.command()(bench)


@app.command()
def info(
    plan: Annotated[
        str, typer.Option(help=f"Show how these workloads are partitioned, separated by commas: {', '.join(CASES)}.")
    ] = "",
    modes: Modes = ALL_MODES,
    dtype: Dtype = "float32",
    threads: Threads = None,
    everything: Annotated[
        bool, typer.Option("--all", help="With --plan: time every partition, not only the chosen one.")
    ] = False,
) -> None:
    """Show the processor, the instruction set of the kernels, and the measured FMA peak.

    With --plan: the partitions of a workload over threads, the time that the cost model predicts for each, and the
    measured time of the one that it chooses. Nothing else should run on the machine meanwhile.
    """
    if not plan:
        info_command.run()
        return
    try:
        config = plan_command.make_config(plan, modes, dtype, threads, everything)
    except ValueError as error:
        fail(str(error))
    plan_command.run(config)


@app.command()
def warmup(
    modes: Modes = ALL_MODES,
    dtypes: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(DTYPES)}.")] = ",".join(DTYPES),
) -> None:
    """Compile kernels ahead of time, so that no first call has to. Kernels depend on the cell and the float type."""
    try:
        pairs = warmup_command.make_pairs(modes, dtypes)
    except ValueError as error:
        fail(str(error))
    warmup_command.run(pairs)
