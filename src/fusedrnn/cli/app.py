"""The commands."""

from __future__ import annotations

import typer

from fusedrnn import env
from fusedrnn.cli.bench import bench
from fusedrnn.cli.console import fail
from fusedrnn.cli.info import info
from fusedrnn.cli.warmup import warmup
from fusedrnn.jit.host import current_target

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


for command in (bench, info, warmup):
    app.command()(command)
