"""``python -m benchmarks.streams``: the time of streams that come and go, compared with a fixed batch.

Times are medians of rounds in which the two take turns, in one process. The schedule is that of
``examples.stream_server``: every stream has a frame in every period, at its own time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

import fusedrnn
from examples.stream_server import schedule
from examples.stream_server.latency import distribution
from examples.stream_server.latency import table as latency_table
from examples.stream_server.options import HIDDEN, Capacity, Cell, Features, Hidden, Layers, Residual
from examples.stream_server.settings import Settings
from fusedrnn import NetworkOp, RNNOp, Streams
from fusedrnn.bench.report import environment_report
from fusedrnn.cli.console import check_writable, fail, finite, output, write_json
from fusedrnn.cli.program import Program
from fusedrnn.env import MAX_THREADS

ROUND_SECONDS = 0.02
"""Seconds of each of the two in a round. So other work on the machine disturbs single rounds, not the median."""
BATCHES = (1, 8, 64, 256)
_PAUSE = 1e-4
"""If more seconds are between two readings of the clock, the system has taken the processor away."""
_STEAL_FIELD = 8
"""The index of stolen time in the first line of /proc/stat (proc(5))."""

app = Program()


@dataclass(frozen=True)
class Comparison:
    """A step of some of many streams, compared with a step of a fixed batch of the same size.

    Attributes:
        batch: The number of streams.
        stream: The median seconds of a call of :class:`fusedrnn.Stream`.
        streams: The median seconds of :meth:`fusedrnn.Streams.step`.
        difference: The median of the difference, in each round, of the seconds of a call: the second minus the first.
    """

    batch: int
    stream: float
    streams: float
    difference: float


def compare(op: RNNOp | NetworkOp, streams: Streams, batch: int, rounds: int) -> Comparison:
    """Time both on the same input. The streams, of the same op, are random ones, in random order."""
    rng, spec = np.random.default_rng(0), op.spec
    ids = rng.permutation(streams.ids)[:batch]
    x = rng.standard_normal((1, batch, spec.input_size)).astype(spec.dtype)
    stream = op.stream(streams.params, batch)
    calls: tuple[Callable[[], object], ...] = (lambda: stream(x)), (lambda: streams.step(ids, x))
    for call in calls:
        for _ in range(4):
            call()
    number = max(1, round(ROUND_SECONDS / _seconds(calls[0], 3)))
    times = [tuple(_seconds(call, number) for call in calls) for _ in range(rounds)]
    own, others = (median(column) for column in zip(*times, strict=True))
    return Comparison(batch, own, others, median(second - first for first, second in times))


def _seconds(call: Callable[[], object], number: int) -> float:
    began = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - began) / number


def comparison_table(comparisons: list[Comparison]) -> Table:
    """A table with a row for each comparison."""
    table = Table(box=None, pad_edge=False)
    for name in ("streams in a step", "Stream, µs", "Streams, µs", "difference, µs", "ratio", "µs a stream"):
        table.add_column(name, justify="right")
    for row in comparisons:
        table.add_row(
            str(row.batch), f"{row.stream * 1e6:.1f}", f"{row.streams * 1e6:.1f}", f"{row.difference * 1e6:.2f}",
            f"{row.streams / row.stream:.2f}", f"{row.streams / row.batch * 1e6:.2f}",
        )  # fmt: skip
    return table


def pauses(seconds: float) -> list[float]:
    """The pauses, in seconds, of a loop that only reads the clock, for ``seconds`` seconds."""
    lengths, now = [], time.perf_counter()
    end = now + seconds
    while now < end:
        before, now = now, time.perf_counter()
        if now - before > _PAUSE:
            lengths.append(now - before)
    return lengths


def stolen_seconds() -> float:
    """Processor seconds that the hypervisor has kept from this machine since its start; 0 if unknown."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        return int(fields[_STEAL_FIELD]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def wait_of(lengths: list[float], seconds: float, share: float = 0.01) -> float:
    """The wait in seconds that this share of all moments exceeds. At a moment in a pause, the wait is until its end."""
    # In a pause, the wait is above w for the length of the pause minus w. The sum of these times is the share.
    total, descending = 0.0, [*sorted(lengths, reverse=True), 0.0]
    for count, (length, next_length) in enumerate(pairwise(descending), 1):
        total += length
        wait = (total - share * seconds) / count
        if wait >= next_length:
            return wait
    return 0.0


@app.command()
def main(
    cell: Cell = Settings.cell,
    features: Features = Settings.features,
    hidden: Hidden = HIDDEN,
    layers: Layers = None,
    residual: Residual = None,
    capacity: Capacity = Settings.capacity,
    threads: Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="Threads.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each comparison.")] = 51,
    period: Annotated[
        float, typer.Option(min=0.1, callback=finite, help="Milliseconds between two frames of a stream.")
    ] = 32.0,
    seconds: Annotated[float, typer.Option(min=0.1, callback=finite, help="Duration of the schedule.")] = 10.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
) -> None:
    """Time steps of some of many streams, compared with a fixed batch, and steps on a schedule."""
    try:
        check_writable("--json", json_path)
        settings = Settings.parse(cell, features, hidden, layers, residual, capacity)
        streams = settings.streams()
    except (ValueError, MemoryError) as error:
        fail(str(error))
    console, machine = output(), environment_report()
    console.print(f"{machine['processor']}, {machine['target_description']}, threads: {threads}", highlight=False)
    console.print(f"the network: {' '.join(settings.options())}", markup=False, highlight=False)
    with fusedrnn.thread_limits(threads):
        ids = [streams.join() for _ in range(capacity)]
        comparisons = [compare(settings.op, streams, batch, rounds) for batch in BATCHES if batch <= capacity]
        console.print(comparison_table(comparisons))
        for id in ids:
            streams.leave(id)
        stolen = stolen_seconds()
        result = schedule.run(streams, capacity, period / 1e3, seconds)
        stolen = stolen_seconds() - stolen
    latencies = distribution(result.latencies)
    console.print(f"\n{capacity} streams, a frame of each every {period:g} ms", highlight=False)
    console.print(latency_table({"due to output": latencies}))
    lengths = pauses(seconds)
    own_p99, longest = wait_of(lengths, seconds), max(lengths, default=0.0)
    console.print(
        f"the system's own part, seen by a loop that only reads the clock: p99 {own_p99 * 1e3:.2f} ms, "
        f"longest pause {longest * 1e3:.2f} ms; kept by the hypervisor during the schedule: {stolen * 1e3:.0f} ms",
        highlight=False,
    )  # fmt: skip
    share = result.processor_seconds / seconds
    console.print(f"{share:.0%} of one processor, {np.mean(result.batches):.1f} streams in a step", highlight=False)
    if json_path:
        figures = {
            "machine": machine, "settings": asdict(settings), "threads": threads,
            "comparisons": [asdict(row) for row in comparisons],
            "schedule": {"period": period / 1e3, "latency_ms": latencies, "processor_share": share},
            "pauses": {"p99": own_p99, "longest": longest, "stolen": stolen},
        }  # fmt: skip
        write_json(json_path, figures)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.streams")
