"""``python -m examples.stream_server``: the commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from examples.stream_server import commands, latency, limits
from examples.stream_server.options import HIDDEN, Capacity, Cell, Features, Hidden, Layers, Residual
from examples.stream_server.protocol import ProtocolError
from examples.stream_server.settings import Settings
from fusedrnn.cli.console import check_writable, fail, finite
from fusedrnn.cli.program import Program
from fusedrnn.env import MAX_THREADS

app = Program(no_args_is_help=True)
_MAX_PERIOD = 1e6


def _sleepable(period: float) -> float:
    """A period that a process can sleep for."""
    if finite(period) > _MAX_PERIOD:
        raise typer.BadParameter(f"{period} is more than {_MAX_PERIOD:.0f}")
    return period


Period = Annotated[
    float, typer.Option(min=0.1, callback=_sleepable, help="Milliseconds from one frame of a stream to the next.")
]
Seconds = Annotated[float, typer.Option(min=0.1, callback=finite, help="How long to send frames.")]
Window = Annotated[
    float, typer.Option(min=0.0, callback=finite, help="Milliseconds to wait for more frames before a step.")
]
Threads = Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="Threads of a step.")]
Host = Annotated[str, typer.Option(help="The server's address.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="The server's port; 0 lets the system choose one.")]
Processor = Annotated[int | None, typer.Option(min=0, help="Run on this processor alone.", show_default="any")]
Plot = Annotated[Path | None, typer.Option(help="Draw a histogram of the latencies into this file.")]
Json = Annotated[Path | None, typer.Option(help="Write every latency to this file.")]


@app.command()
def serve(
    cell: Cell = Settings.cell,
    features: Features = Settings.features,
    hidden: Hidden = HIDDEN,
    layers: Layers = None,
    residual: Residual = None,
    capacity: Capacity = Settings.capacity,
    host: Host = "127.0.0.1",
    port: Port = 7032,
    window: Window = 1.0,
    threads: Threads = 1,
    processor: Processor = None,
    json: Json = None,
) -> None:
    """Serve a network with random parameters until Ctrl-C."""
    try:
        check_writable("--json", json)
        if processor is not None:
            limits.run_on(processor)
        settings = Settings.parse(cell, features, hidden, layers, residual, capacity)
        commands.serve(settings, host, port, window / 1e3, threads, json)
    except (ValueError, OSError, MemoryError) as error:
        fail(str(error))


@app.command()
def load(
    streams: Annotated[int, typer.Option(min=1, help="Connections.")] = 100,
    period: Period = 32.0,
    seconds: Seconds = 10.0,
    host: Host = "127.0.0.1",
    port: Port = 7032,
    plot: Plot = None,
) -> None:
    """Load a running server, and print the distribution of the latencies."""
    try:
        _check_picture(plot)
        result = commands.load_server(host, port, streams, period / 1e3, seconds)
        commands.show(result, None, plot)
    except (ValueError, OSError, ProtocolError) as error:
        fail(str(error))


@app.command()
def test(
    cell: Cell = Settings.cell,
    features: Features = Settings.features,
    hidden: Hidden = HIDDEN,
    layers: Layers = None,
    residual: Residual = None,
    streams: Capacity = 100,
    period: Period = 32.0,
    seconds: Seconds = 10.0,
    window: Window = 1.0,
    threads: Threads = 1,
    pin: Annotated[bool, typer.Option(help="Server and load generator on one processor each.")] = False,
    plot: Plot = None,
) -> None:
    """Start a server in another process, load it, and print the latencies that both sides measure."""
    try:
        _check_picture(plot)
        settings = Settings.parse(cell, features, hidden, layers, residual, streams)
        commands.test(settings, period / 1e3, seconds, window / 1e3, threads, pin, plot)
    except (ValueError, OSError, RuntimeError, ProtocolError) as error:
        fail(str(error))


@app.command()
def schedule(
    cell: Cell = Settings.cell,
    features: Features = Settings.features,
    hidden: Hidden = HIDDEN,
    layers: Layers = None,
    residual: Residual = None,
    streams: Capacity = 1000,
    period: Period = 32.0,
    seconds: Seconds = 10.0,
    threads: Threads = 1,
    plot: Plot = None,
) -> None:
    """Step streams at the times when their frames are due, without sockets, to measure the operator alone."""
    try:
        _check_picture(plot)
        settings = Settings.parse(cell, features, hidden, layers, residual, streams)
        commands.run_schedule(settings, period / 1e3, seconds, threads, plot)
    except (ValueError, MemoryError) as error:
        fail(str(error))


def _check_picture(path: Path | None) -> None:
    check_writable("--plot", path)
    if path and path.suffix[1:].lower() not in latency.formats():
        raise ValueError(f"--plot {path}: its ending must be one of {', '.join(latency.formats())}")


if __name__ == "__main__":
    app(prog_name="python -m examples.stream_server")
