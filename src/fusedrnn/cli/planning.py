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
from fusedrnn.engines.cpu.executor import limit_threads
from fusedrnn.engines.cpu.kernels.tiling import Tiling
from fusedrnn.engines.cpu.plan import backward as backward_plan
from fusedrnn.engines.cpu.plan import forward as plan
from fusedrnn.engines.cpu.plan.cost import Cost, Machine, compared, predict
from fusedrnn.engines.cpu.plan.sizes import Grid, Problem, Share
from fusedrnn.jit.host import current_target, target_for
from fusedrnn.jit.target import Target
from fusedrnn.runtime.peak import measure_peak
from fusedrnn.spec import DTYPES, RNNSpec
from fusedrnn.testing.cases import CASES, Case

_WIDTH = 98
_WAYS = {"inference": "inference", "training": "training, forward", "backward": "training, backward"}
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


def shares(spec: RNNSpec, target: Target, case: Case, way: str, threads: int) -> list[Share]:
    """Every way to share a case out that the cost model is asked about."""
    geometry = Tiling.of(spec, target)
    share_of = backward_plan.share_of if way == "backward" else plan.share_of
    members = limit_threads(spec, threads, case.T, case.N, training=way != "inference")
    choices = plan.grids(spec, case.N, members, geometry.unit_vectors)
    return [share_of(geometry, case.T, case.N, grid) for grid in choices]


@dataclass(frozen=True)
class _Rates:
    """What is quickly measured of one thread: operations a second, and GB/s by where they are read from."""

    peak: float
    bandwidth: Mapping[str, float]

    def of(self, assumed: Machine, target: Target, dtype: str) -> Machine:
        """The machine's constants with these in the place of those assumed."""
        found = {level: rate * 1e9 for level, rate in self.bandwidth.items()}
        return replace(
            assumed,
            fma=self.peak / (2 * target.lanes(dtype)),
            near=found.get("L2", assumed.near),
            far=found.get("L3", assumed.far),
            memory=found["memory"],
        )


def _print_machine(console: Console, dtype: str, rates: _Rates) -> None:
    target = current_target()
    assumed = Machine.of(target)
    measured, flops = rates.of(assumed, target, dtype), 2 * target.lanes(dtype)
    table = Table(title="one thread", title_justify="left", box=None, pad_edge=False)
    for column in ("", "assumed", "measured"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("FMA peak, GFLOP/s", *(f"{one.fma * flops / 1e9:.1f}" for one in (assumed, measured)))
    for name, field in (("L2 read, GB/s", "near"), ("L3 read, GB/s", "far"), ("memory read, GB/s", "memory")):
        table.add_row(name, *(f"{getattr(one, field) / 1e9:.1f}" for one in (assumed, measured)))
    console.print(table, highlight=False)


def _print_way(
    console: Console, asked: Asked, case: Case, mode: str, way: str, rates: _Rates
) -> None:
    spec = case.spec(mode, asked.dtype)
    target = target_for(spec.hidden_size, spec.dtype)
    assumed = Machine.of(target)
    measured = rates.of(assumed, target, asked.dtype)
    problem = Problem.of(spec, target, case.T, case.N, way)
    found = shares(spec, target, case, way, asked.threads)
    # Calls in a loop, as they are measured, find the threads awake.
    costs = [predict(problem, share, assumed, awake=True) for share in found]
    chosen = min(range(len(found)), key=lambda place: compared(found[place], costs[place]))
    table = Table(title=f"{case.name} {NAMES[mode]}, {_WAYS[way]}", title_justify="left", box=None, pad_edge=False)
    for column in ("", "threads", "shared out", "predicted", "by measured", "time", "predicted/time"):
        table.add_column(column, justify="left" if column in ("", "shared out") else "right")
    for place, (share, cost) in enumerate(zip(found, costs, strict=True)):
        here = place == chosen
        seconds = measure(spec, case, way, share.grid) if here or asked.everything else None
        again = predict(problem, share, measured, awake=True).total
        table.add_row(
            ">" if here else "", str(share.num_threads), describe(share.grid, spec.bidirectional),
            _time(cost.total), _time(again),
            "" if seconds is None else _time(seconds), "" if seconds is None else f"{cost.total / seconds:.2f}",
        )  # fmt: skip
    console.print(table, highlight=False)
    console.print(f"  {_sizes(found[chosen], problem)}\n  {_parts(costs[chosen])}\n", highlight=False, markup=False)


def describe(grid: Grid, bidirectional: bool) -> str:
    """A grid in words."""
    kinds = zip(grid, ("directions" if bidirectional else "layers at once", "row groups", "unit groups"), strict=True)
    return " x ".join(f"{number} {kind}" for number, kind in kinds if number > 1) or "one thread"


def _sizes(share: Share, problem: Problem) -> str:
    more = f", weights' gradients of {share.block} rows at once" if share.block else ""
    return f"tile {problem.tile} rows x {problem.panel} vectors, chunk {share.chunk} step(s) of {share.rows} rows{more}"


def _parts(cost: Cost) -> str:
    shown = (f"{part} {100 * seconds / cost.total:.0f} %" for part, seconds in cost.items() if seconds)
    return ", ".join(shown)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def measure(spec: RNNSpec, case: Case, way: str, grid: Grid) -> float:
    """Seconds of a call so shared out: the median of calls in a loop."""
    with plan.forced(grid), fusedrnn.thread_limits(int(np.prod(grid))):
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
