"""The commands: serve, load, both together, and the schedule without sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fusedrnn
from examples.stream_server import limits, load, schedule
from examples.stream_server.latency import Latencies, distribution, plot, table
from examples.stream_server.server import Server
from examples.stream_server.settings import Settings
from fusedrnn.cli.console import output

LISTENING = "listening on "
_SWITCH_SECONDS = 5e-4
"""The longest time that the stepping thread waits for the interpreter. By default it is ten times as long."""


def serve(settings: Settings, host: str, port: int, window: float, threads: int, json_path: Path | None) -> None:
    """Serve until an interrupt or a termination signal, then print the latencies.

    Raises:
        OSError: If the address is not available.
        ValueError: If the system allows fewer connections.
    """
    limits.allow_connections(settings.capacity)
    sys.setswitchinterval(_SWITCH_SECONDS)
    server = asyncio.run(_serve(settings, host, port, window, threads))
    latencies, seconds = server.latencies, server.processor_seconds
    show_steps(server.batches, seconds)
    console = output()
    console.print(f"refused connections: {server.refused}")
    console.print(table({"server": distribution(latencies)}))
    if json_path:
        measured = {"latencies": list(latencies), "batches": list(server.batches), "seconds": seconds}
        json_path.write_text(json.dumps(measured), encoding="utf-8")


def show_steps(batches: Sequence[int], processor_seconds: float) -> None:
    """Print how many streams the steps had, and the processor time of the server for each frame."""
    frames = sum(batches)
    if frames:
        output().print(
            f"{frames:,} frames in {len(batches):,} steps of {frames / len(batches):.1f} on average; "
            f"{processor_seconds / frames * 1e6:.1f} µs of processor time for each frame",
            highlight=False,
        )


async def _serve(settings: Settings, host: str, port: int, window: float, threads: int) -> Server:
    server, stopped = Server(settings.streams(), window, threads), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stopped.set)
        except NotImplementedError:  # on Windows; there asyncio.run stops at an interrupt
            break
    actual_port = await server.start(host, port)
    # The garbage collector need not look at objects that stay until the end.
    gc.collect()
    gc.freeze()
    print(f"{LISTENING}{host}:{actual_port}", flush=True)
    began = time.process_time()
    serving, stopping = asyncio.ensure_future(server.wait()), asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        await server.stop()
        server.processor_seconds = time.process_time() - began
    if not serving.cancelled() and (error := serving.exception()):
        raise error
    return server


def load_server(host: str, port: int, streams: int, period: float, seconds: float) -> load.Result:
    """Load a running server.

    Raises:
        OSError: If a connection fails.
        ProtocolError: If the server refuses a connection.
        ValueError: If the system allows fewer connections.
    """
    limits.allow_connections(streams)
    return load.run(host, port, streams, period, seconds)


def show(result: load.Result, server: Latencies | None, picture: Path | None) -> None:
    """Print what a load test has measured."""
    console, rows = output(), {"end to end": distribution(result.latencies)}
    if server is not None:
        rows = {"server": distribution(server), **rows}
    console.print(table({**rows, "frame sent late by": distribution(result.delays)}))
    if result.lost:
        console.print(f"{result.lost:,} frames without an output")
    for error in sorted(set(result.errors)):
        console.print(f"the server says, to {result.errors.count(error)}: {error}", markup=False, highlight=False)
    if picture:
        latencies: dict[str, Latencies] = {"end to end": result.latencies}
        plot(latencies if server is None else {"server": server, **latencies}, picture)


def test(
    settings: Settings, period: float, seconds: float, window: float, threads: int, pin: bool, picture: Path | None
) -> None:
    """Start a server in its own process, load it with as many streams as it has, and print the figures of both sides.

    Raises:
        RuntimeError: If the server does not start, or dies.
        ValueError: If ``pin`` is not possible.
    """
    allowed = limits.processors()
    if pin and len(allowed) < 2:
        raise ValueError(f"--pin needs two processors; this process may run on {len(allowed)}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "server.json"
        options: list[Any] = [*settings.options(), "--port", 0, "--window", window * 1e3]
        options += ["--threads", threads, "--json", file]
        if pin:
            options += ["--processor", allowed[0]]
        command = [sys.executable, "-m", "examples.stream_server", "serve", *map(str, options)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                line = server.stdout.readline()
                if not line.startswith(LISTENING):
                    raise RuntimeError(f"the server has not started: {line.strip() or 'see its message above'}")
                if pin:  # only now, because the server would inherit it
                    limits.run_on(allowed[1])
                host, _, port = line.strip().removeprefix(LISTENING).rpartition(":")
                result = load_server(host, int(port), settings.capacity, period, seconds)
            finally:
                server.send_signal(signal.SIGINT)
                server.wait()
        if not file.exists():
            raise RuntimeError(f"the server has died: it ended with status {server.returncode}")
        measured = json.loads(file.read_text(encoding="utf-8"))
    show_steps(measured["batches"], measured["seconds"])
    show(result, array("d", measured["latencies"]), picture)


def run_schedule(settings: Settings, period: float, seconds: float, threads: int, picture: Path | None) -> None:
    """Step streams on a schedule, without sockets, and print the latencies."""
    with fusedrnn.thread_limits(threads):
        result = schedule.run(settings.streams(), settings.capacity, period, seconds)
    show_steps(result.batches, result.processor_seconds)
    output().print(table({"operator": distribution(result.latencies)}))
    if picture:
        plot({"operator": result.latencies}, picture)
