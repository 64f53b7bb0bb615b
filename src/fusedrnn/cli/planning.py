"""``fusedrnn info --plan``: the ways to share a workload out, what each is predicted to take, and what it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

import fusedrnn
from fusedrnn.bench.bandwidth import measure_bandwidth
from fusedrnn.bench.data import workload
from fusedrnn.bench.mxnet_page import NAMES
from fusedrnn.cli.console import names, output
from fusedrnn.engines.cpu import tuning
from fusedrnn.engines.cpu.kernels.tiling import Tiling
from fusedrnn.engines.cpu.plan.backward import backward_share
from fusedrnn.engines.cpu.plan.cost import Cost, adjusted_cost, predict_cost
from fusedrnn.engines.cpu.plan.forward import forward_share
from fusedrnn.engines.cpu.plan.partition import force_grid, limit_threads, possible_grids
from fusedrnn.engines.cpu.plan.sizes import ProblemSize, ThreadGrid, ThreadShare
from fusedrnn.engines.cpu.tuning import MachineModel
from fusedrnn.jit.host import current_target, target_for
from fusedrnn.jit.target import Target
from fusedrnn.runtime.peak import measure_peak
from fusedrnn.spec import DTYPES, RNNSpec
from fusedrnn.testing.cases import CASES, Case

_WIDTH = 98
_WAYS = {"inference": "inference", "training": "training, forward", "backward": "training, backward"}
_BANDWIDTHS = {
    "L2 read, GB/s": "l2_bandwidth", "L3 read, GB/s": "l3_bandwidth", "memory read, GB/s": "memory_bandwidth",
}  # fmt: skip
_SECONDS = 0.25
_FEWEST = 2


@dataclass(frozen=True)
class Asked:
    """What to plan: cases with modes, for so many threads; whether to time more than what is chosen."""

    cases: Sequence[Case]
    modes: Sequence[str]
    dtype: str
    threads: int
    everything: bool


def make(cases: str, modes: str, dtype: str, threads: int | None, everything: bool) -> Asked:
    """What the options ask for.

    Raises:
        ValueError: If one names something unknown.
    """
    chosen = [CASES[name] for name in names(cases, "case", CASES)]
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; valid: {', '.join(DTYPES)}")
    return Asked(chosen, names(modes, "mode", NAMES), dtype, threads or fusedrnn.get_num_threads(), everything)


def run(asked: Asked) -> None:
    """Print tables: of the machine's constants, then for each case, mode and way one of what it could be."""
    console = output()
    console.width = min(console.width, _WIDTH)
    rates = _Rates(measure_peak(asked.dtype, 1) * 1e9, measure_bandwidth(1))
    _print_machine(console, asked.dtype, rates)
    for case in asked.cases:
        for mode in asked.modes:
            for way in _WAYS:
                _print_way(console, asked, case, mode, way, rates)


def shares(spec: RNNSpec, target: Target, case: Case, way: str, threads: int) -> list[ThreadShare]:
    """Every way to share a case out that the cost model is asked about."""
    tiling, thresholds = Tiling.of(spec, target), tuning.current()
    share_of = backward_share if way == "backward" else forward_share
    threads = limit_threads(spec, threads, case.T, case.N, way != "inference", thresholds)
    grids = possible_grids(spec, case.N, threads, tiling.unit_vecs)
    return [share_of(tiling, case.T, case.N, grid, thresholds) for grid in grids]


@dataclass(frozen=True)
class _Rates:
    """What is quickly measured of one thread: operations a second, and GB/s by where they are read from."""

    peak: float
    bandwidth: Mapping[str, float]

    def of(self, assumed: MachineModel, target: Target, dtype: str) -> MachineModel:
        """The machine's constants with these in the place of those assumed."""
        found = {level: rate * 1e9 for level, rate in self.bandwidth.items()}
        return replace(
            assumed,
            fma_rate=self.peak / (2 * target.lanes(dtype)),
            l2_bandwidth=found.get("L2", assumed.l2_bandwidth),
            l3_bandwidth=found.get("L3", assumed.l3_bandwidth),
            memory_bandwidth=found["memory"],
        )


def _print_machine(console: Console, dtype: str, rates: _Rates) -> None:
    target = current_target()
    assumed = MachineModel.of(target)
    measured, flops = rates.of(assumed, target, dtype), 2 * target.lanes(dtype)
    table = Table(title="one thread", title_justify="left", box=None, pad_edge=False)
    for column in ("", "assumed", "measured"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("FMA peak, GFLOP/s", *(f"{one.fma_rate * flops / 1e9:.1f}" for one in (assumed, measured)))
    for name, field in _BANDWIDTHS.items():
        table.add_row(name, *(f"{getattr(one, field) / 1e9:.1f}" for one in (assumed, measured)))
    console.print(table, highlight=False)


def _print_way(
    console: Console, asked: Asked, case: Case, mode: str, way: str, rates: _Rates
) -> None:
    spec = case.spec(mode, asked.dtype)
    target = target_for(spec.hidden_size, spec.dtype)
    assumed = MachineModel.of(target)
    measured = rates.of(assumed, target, asked.dtype)
    problem = ProblemSize.of(spec, target, case.T, case.N, way)
    found = shares(spec, target, case, way, asked.threads)
    # Calls in a loop, as they are measured, find the threads awake.
    costs = [predict_cost(problem, share, assumed, awake=True) for share in found]
    min_speedup = tuning.current().min_speedup
    chosen = min(range(len(found)), key=lambda place: adjusted_cost(found[place], costs[place], min_speedup))
    table = Table(title=f"{case.name} {NAMES[mode]}, {_WAYS[way]}", title_justify="left", box=None, pad_edge=False)
    for column in ("", "threads", "shared out", "predicted", "by measured", "time", "predicted/time"):
        table.add_column(column, justify="left" if column in ("", "shared out") else "right")
    for place, (share, cost) in enumerate(zip(found, costs, strict=True)):
        here = place == chosen
        seconds = measure(spec, case, way, share.grid) if here or asked.everything else None
        again = predict_cost(problem, share, measured, awake=True).total
        table.add_row(
            ">" if here else "", str(share.num_threads), describe(share.grid, spec.bidirectional),
            _time(cost.total), _time(again),
            "" if seconds is None else _time(seconds), "" if seconds is None else f"{cost.total / seconds:.2f}",
        )  # fmt: skip
    console.print(table, highlight=False)
    console.print(f"  {_sizes(found[chosen], problem)}\n  {_parts(costs[chosen])}\n", highlight=False, markup=False)


def describe(grid: ThreadGrid, bidirectional: bool) -> str:
    """A grid in words."""
    kinds = zip(grid, ("directions" if bidirectional else "layers at once", "row groups", "unit groups"), strict=True)
    return " x ".join(f"{number} {kind}" for number, kind in kinds if number > 1) or "one thread"


def _sizes(share: ThreadShare, problem: ProblemSize) -> str:
    more = f", weights' gradients of {share.block} rows at once" if share.block else ""
    tile = f"tile {problem.rows_per_tile} rows x {problem.vectors_per_panel} vectors"
    return f"{tile}, chunk {share.chunk} step(s) of {share.rows} rows{more}"


def _parts(cost: Cost) -> str:
    shown = (f"{part} {100 * seconds / cost.total:.0f} %" for part, seconds in cost.items() if seconds)
    return ", ".join(shown)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def measure(spec: RNNSpec, case: Case, way: str, grid: ThreadGrid) -> float:
    """Seconds of a call so shared out: the median of calls in a loop."""
    with force_grid(grid), fusedrnn.thread_limits(int(np.prod(grid))):
        calls = _calls(spec, case, way)
        next(calls)()
        taken: list[float] = []
        end = time.perf_counter() + _SECONDS
        while len(taken) < _FEWEST or time.perf_counter() < end:
            call = next(calls)
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    return median(taken)


def _calls(spec: RNNSpec, case: Case, way: str) -> Iterator[Callable[[], object]]:
    """What is timed, again and again; what comes before it is not."""
    work = workload(case, spec.mode, spec.dtype)
    op, batch, params = fusedrnn.RNNOp(spec), work.batch(case.T), fusedrnn.frozen(work.params)
    while True:
        if way == "inference":
            yield partial(op.forward, batch.x, params)
        elif way == "training":
            yield partial(op.forward, batch.x, params, training=True)
        else:
            reserve = op.forward(batch.x, params, training=True)[2]
            yield partial(op.backward, batch.dy, None, reserve)
