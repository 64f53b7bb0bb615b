"""``python -m benchmarks.scaling``: sequences per second of one process and of several, and the limits of a network.

This is weak scaling: each of several processes has the work of the single process, on one thread. They are compared
with the single process, and with one process that has as many threads and as many sequences as all of them together.
Training is DistributedDataParallel over gloo on the loopback interface. Inference is the operator on NumPy arrays,
without any communication.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from rich.table import Table
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fusedrnn
import fusedrnn.torch
from fusedrnn.cli.console import fail, finite, output
from fusedrnn.cli.program import Program
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.cases import CASES, Case

PHASES = ("training", "inference")
NETWORKS = (1, 10, 25)
"""Gbit/s."""
HOSTS = (2, 4, 16, 64)

_LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": fusedrnn.torch.LSTM,
    "gru": fusedrnn.torch.GRU,
    "rnn_relu": partial(fusedrnn.torch.RNN, nonlinearity="relu"),
    "rnn_tanh": fusedrnn.torch.RNN,
}

app = Program()


@dataclass(frozen=True)
class Setup:
    """A number of processes and of threads for each; each process has a multiple of the case's sequences."""

    processes: int
    threads: int
    multiple: int

    def __str__(self) -> str:
        if self.processes > 1:
            return f"{self.processes} processes, {self.threads} thread each"
        return f"1 process, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Run:
    """The measurements to make.

    Attributes:
        case: The workload of one process.
        mode: The cell, as in :class:`fusedrnn.RNNSpec`.
        processes: The number of processes of the second setup, and of threads of the third.
        rounds: How often each setup is measured. Setups take turns.
        seconds: The duration of a measurement of the first setup.
    """

    case: Case
    mode: str
    processes: int
    rounds: int
    seconds: float

    @property
    def setups(self) -> list[Setup]:
        """The single process, several processes, and the single process with several threads."""
        return [Setup(1, 1, 1), Setup(self.processes, 1, 1), Setup(1, self.processes, self.processes)]


Rates = dict[tuple[str, Setup], list[float]]
"""Sequences per second in each round, by phase and setup."""


def all_reduce_seconds(gradient_bytes: int, hosts: int, gigabits: float) -> float:
    """The time of a ring all-reduce in which each host sends and receives ``gigabits`` Gbit/s, without latencies."""
    return 2 * (hosts - 1) / hosts * gradient_bytes / (gigabits * 1e9 / 8)


def _training_step(run: Run, setup: Setup, share: bool) -> Callable[[], None]:
    """A training step: forward, backward and an update, together with other processes if ``share``."""
    case = run.case
    torch.manual_seed(0)
    layer = _LAYERS[run.mode](case.I, case.H, case.layers, bidirectional=case.bidirectional)
    model: nn.Module = DistributedDataParallel(layer) if share else layer
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(case.T, case.N * setup.multiple, case.I)

    def step() -> None:
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()

    return step


def _inference_step(run: Run, setup: Setup) -> Callable[[], None]:
    case = run.case
    op = fusedrnn.RNNOp(case.spec(run.mode))
    params = fusedrnn.frozen(fusedrnn.init_params(op.spec, np.random.default_rng(0)))
    x = np.random.default_rng(1).standard_normal((case.T, case.N * setup.multiple, case.I), np.float32)

    def step() -> None:
        with fusedrnn.thread_limits(setup.threads):
            op.forward(x, params)

    return step


def _measure(run: Run, rank: int) -> Rates:
    """Measure in every process of the group. Processes that a setup does not use wait."""
    rates: Rates = {}
    for phase in PHASES:
        steps = {}
        for setup in run.setups:
            share = phase == "training" and setup.processes > 1
            if rank < setup.processes:
                torch.set_num_threads(setup.threads)
                steps[setup] = _training_step(run, setup, share) if phase == "training" else _inference_step(run, setup)
                for _ in range(3):  # compile, pack, and let DDP order its buckets
                    steps[setup]()
            distributed.barrier()
        single = torch.tensor(_seconds(steps[run.setups[0]], 1) if rank == 0 else 0.0)
        distributed.broadcast(single, 0)
        count = max(1, round(run.seconds / single.item()))
        for _ in range(run.rounds):
            for setup in run.setups:
                torch.set_num_threads(setup.threads)
                distributed.barrier()
                elapsed = torch.tensor(_seconds(steps[setup], count) if rank < setup.processes else 0.0)
                distributed.all_reduce(elapsed, distributed.ReduceOp.MAX)
                sequences = run.case.N * setup.multiple * setup.processes * count
                rates.setdefault((phase, setup), []).append(sequences / elapsed.item())
    return rates


def _seconds(step: Callable[[], None], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - start


def _join(run: Run, rank: int, meeting: str) -> Rates:
    """Join the group and measure."""
    with _loopback():
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=run.processes)
    try:
        rates = _measure(run, rank)
        distributed.barrier()
        return rates
    finally:
        distributed.destroy_process_group()


@contextmanager
def _loopback() -> Iterator[None]:
    """Let gloo use only the loopback interface."""
    name = "GLOO_SOCKET_IFNAME"
    before = os.environ.get(name)
    os.environ[name] = "lo" if sys.platform == "linux" else "lo0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def measure(run: Run) -> Rates:
    """Start the other processes, and measure. This process is the first one."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        context = get_context("spawn")
        others = [context.Process(target=_join, args=(run, rank, meeting)) for rank in range(1, run.processes)]
        try:
            for process in others:
                process.start()
            return _join(run, 0, meeting)
        finally:
            torch.set_num_threads(threads)
            for process in others:
                process.join(30)
                process.kill()
                process.join()


def rates_table(run: Run, rates: Rates) -> Table:
    """A table of medians, ranges over the rounds, and medians of the ratios to the first setup."""
    table = Table("phase", "setup", "sequences/s", "lowest to highest", "times the first", box=None)
    for (phase, setup), samples in rates.items():
        first = rates[phase, run.setups[0]]
        ratio = median(sample / base for sample, base in zip(samples, first, strict=True))
        spread = f"{min(samples):.0f} to {max(samples):.0f}"
        table.add_row(phase, str(setup), f"{median(samples):.0f}", spread, f"{ratio:.2f}")
    return table


def network_table(gradient_bytes: int, step_seconds: float) -> Table:
    """A table of the all-reduce's time for networks and numbers of hosts, and its share of the time of a step."""
    table = Table("network", *(f"{hosts} hosts" for hosts in HOSTS), box=None)
    for gigabits in NETWORKS:
        seconds = [all_reduce_seconds(gradient_bytes, hosts, gigabits) for hosts in HOSTS]
        cells = (f"{second * 1e3:.2f} ms, {second / step_seconds:.0%}" for second in seconds)
        table.add_row(f"{gigabits} Gbit/s", *cells)
    return table


@app.command()
def main(
    case: Annotated[str, typer.Option(help=f"The work of a process: {', '.join(CASES)}.")] = "bi2",
    mode: Annotated[str, typer.Option(help=f"The cell: {', '.join(_LAYERS)}.")] = "lstm",
    processes: Annotated[int, typer.Option(min=2, help="Processes, of one thread each.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each setup, in alternation.")] = 9,
    seconds: Annotated[float, typer.Option(min=0.001, callback=finite, help="The length of a measurement.")] = 1.0,
) -> None:
    """Measure weak scaling on this machine, and compute how long a network takes to average the gradients.

    A percentage is the time of the all-reduce relative to a training step of one process. Above 100 %, the network is
    the bottleneck.
    """
    if case not in CASES or mode not in _LAYERS:
        fail(f"--case is one of {', '.join(CASES)}, --mode one of {', '.join(_LAYERS)}; got {case} and {mode}")
    run = Run(CASES[case], mode, processes, rounds, seconds)
    load = os.getloadavg()[0]
    rates = measure(run)
    spec: RNNSpec = run.case.spec(mode)
    step_seconds = run.case.N / median(rates["training", run.setups[0]])
    gradient_bytes = 4 * spec.layout.size
    console = output()
    console.print(f"{mode}, {run.case}")
    console.print(f"load average before: {load:.1f} on {os.cpu_count()} processors; other work lowers the figures")
    console.print(rates_table(run, rates))
    console.print(f"\n{gradient_bytes / 1e6:.2f} MB of gradients, {step_seconds * 1e3:.1f} ms a step of one process")
    console.print(network_table(gradient_bytes, step_seconds))


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.scaling")
