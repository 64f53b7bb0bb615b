"""The commands."""

from __future__ import annotations

from typing import Annotated

import typer

import fusedrnn
from fusedrnn import env
from fusedrnn.cli.bench import bench
from fusedrnn.cli.console import fail
from fusedrnn.cli.info import info
from fusedrnn.cli.program import Program
from fusedrnn.cli.warmup import warmup
from fusedrnn.jit.host import current_target

app = Program(no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fusedrnn {fusedrnn.__version__}")
        raise typer.Exit


@app.callback()
def check_environment(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fused recurrent networks on the CPU: measure them, show the machine, compile kernels ahead of time."""
    try:
        current_target(), env.debug(), env.num_threads()
    except ValueError as error:
        fail(str(error))


for command in (bench, info, warmup):
    app.command()(command)
