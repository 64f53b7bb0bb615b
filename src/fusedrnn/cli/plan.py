"""``fusedrnn info --plan``: the partitions of a workload over threads, their predicted and their measured times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

import fusedrnn
from fusedrnn.bench.data import workload
from fusedrnn.bench.tables import MODE_NAMES
from fusedrnn.cli.console import output
from fusedrnn.engines.cpu import tuning
from fusedrnn.engines.cpu.plan.cost import adjusted_cost, predict_cost
from fusedrnn.engines.cpu.plan.partition import force_grid, possible_grids
from fusedrnn.engines.cpu.plan.sizes import LargestShare, Phase, ProblemSize, ThreadGrid
from fusedrnn.engines.cpu.plan.weight_format import max_narrow_rows, weight_target
from fusedrnn.engines.cpu.tuning import MachineModel
from fusedrnn.jit.host import current_target
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.cases import Case

_WIDTH = 98
_PASSES: dict[Phase, str] = {
    "inference": "inference", "training": "training, forward", "backward": "training, backward",
}  # fmt: skip
_BANDWIDTHS = {"L2": "l2_bandwidth", "L3": "l3_bandwidth", "memory": "memory_bandwidth"}
"""The field of the machine model for each level."""
_MIN_CALLS = 2


@dataclass(frozen=True)
class PlanConfig:
    """Which workloads to plan, and for how many threads.

    Attributes:
        everything: Whether to time every partition rather than only the chosen one.
        seconds: For how long to time a partition.
    """

    cases: Sequence[Case]
    modes: Sequence[str]
    dtype: str
    threads: int
    everything: bool
    seconds: float = 0.25


def print_plans(config: PlanConfig) -> None:
    """Print the rates of the machine model, then a table of partitions for each case, mode and pass.

    The model in use has the rates that are kept for this machine, if there are any.
    """
    console = output()
    console.width = min(console.width, _WIDTH)
    _print_machine(console, config.dtype)
    for case, mode, pass_name in product(config.cases, config.modes, _PASSES):
        _print_partitions(console, config, case, mode, pass_name)


def _print_machine(console: Console, dtype: str) -> None:
    target = current_target()
    models = MachineModel.of(target), tuning.current().machine_of(target)
    flops = 2 * target.lanes(dtype)
    table = Table(title="one thread", title_justify="left", box=None, pad_edge=False)
    for column in ("", "assumed", "in use"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("FMA peak, GFLOP/s", *(f"{model.fma_rate * flops / 1e9:.1f}" for model in models))
    for level, field in _BANDWIDTHS.items():
        table.add_row(f"{level} read, GB/s", *(f"{getattr(model, field) / 1e9:.1f}" for model in models))
    console.print(table, highlight=False)


def _print_partitions(console: Console, config: PlanConfig, case: Case, mode: str, pass_name: Phase) -> None:
    spec = case.spec(mode, config.dtype)
    thresholds = tuning.current()
    target = weight_target(spec, max_narrow_rows(spec, case.T, thresholds) >= case.N)
    problem = ProblemSize(spec, target, case.T, case.N, pass_name, thresholds, packed=True)
    assumed, machine = MachineModel.of(target), thresholds.machine_of(target)
    grids = possible_grids(problem, config.threads, thresholds)
    shares = [LargestShare.of(problem, grid, thresholds) for grid in grids]
    # The calls are measured in a loop, so the threads are spinning when a call begins.
    costs = [predict_cost(problem, share, machine, spinning=True) for share in shares]
    adjusted = [adjusted_cost(*pair, thresholds.min_speedup) for pair in zip(shares, costs, strict=True)]
    chosen = adjusted.index(min(adjusted))
    table = Table(title=f"{case.name} {MODE_NAMES[mode]}, {_PASSES[pass_name]}", title_justify="left")
    table.box, table.pad_edge = None, False
    for column in ("", "threads", "partition", "predicted", "by assumed", "time", "predicted/time"):
        table.add_column(column, justify="left" if column in ("", "partition") else "right")
    for index, (share, cost) in enumerate(zip(shares, costs, strict=True)):
        timed = index == chosen or config.everything
        seconds = measure(spec, case, pass_name, share.grid, config.seconds) if timed else None
        by_assumed_rates = predict_cost(problem, share, assumed, spinning=True).total
        table.add_row(
            ">" if index == chosen else "", str(share.num_threads), describe(share.grid, spec.bidirectional),
            _time(cost.total), _time(by_assumed_rates),
            "" if seconds is None else _time(seconds), "" if seconds is None else f"{cost.total / seconds:.2f}",
        )  # fmt: skip
    console.print(table, highlight=False)
    share, cost = shares[chosen], costs[chosen]
    tile = f"tile {problem.rows_per_tile} rows x {problem.panel_vectors} vectors"
    block = f", weight gradients of {share.block_rows} rows at once" if share.block_rows else ""
    terms = ", ".join(f"{term} {100 * seconds / cost.total:.0f} %" for term, seconds in cost.items() if seconds)
    chunk = f"chunk {share.chunk} step(s) of {share.rows} rows{block}"
    console.print(f"  {tile}, {chunk}\n  {terms}\n", highlight=False, markup=False)


def describe(grid: ThreadGrid, bidirectional: bool) -> str:
    """A thread grid in words."""
    kinds = ("directions" if bidirectional else "pipelined layers", "row groups", "unit groups")
    dimensions = zip(grid, kinds, strict=True)
    return " x ".join(f"{number} {kind}" for number, kind in dimensions if number > 1) or "one thread"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def measure(spec: RNNSpec, case: Case, pass_name: Phase, grid: ThreadGrid, duration: float) -> float:
    """The seconds of a call with this thread grid: the median of the calls in a loop of ``duration`` seconds."""
    with force_grid(grid), fusedrnn.thread_limits(int(np.prod(grid))):
        calls = _calls(spec, case, pass_name)
        next(calls)()
        seconds: list[float] = []
        end = time.perf_counter() + duration
        while len(seconds) < _MIN_CALLS or time.perf_counter() < end:
            call = next(calls)
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def _calls(spec: RNNSpec, case: Case, pass_name: Phase) -> Iterator[Callable[[], object]]:
    """An endless series of calls to time. What a call needs is prepared before the call is yielded."""
    work = workload(case, spec.mode_name, spec.dtype)
    op, batch, params = fusedrnn.RNNOp(spec), work.batch(case.T), fusedrnn.frozen(work.params)
    while True:
        if pass_name == "inference":
            yield partial(op.forward, batch.x, params)
        elif pass_name == "training":
            yield partial(op.forward, batch.x, params, training=True)
        else:
            reserve = op.forward(batch.x, params, training=True)[2]
            yield partial(op.backward, batch.dy, None, reserve)
