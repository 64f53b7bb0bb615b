"""How a problem is divided among threads: the possible grids, and the cheapest of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fusedrnn.engines.cpu.plan.cost import adjusted_cost, predict_cost
from fusedrnn.engines.cpu.plan.sizes import LargestShare, ProblemSize, ThreadGrid
from fusedrnn.engines.cpu.plan.thread_trials import Forecast
from fusedrnn.engines.cpu.tuning import Tuning

_forced_grid: ContextVar[ThreadGrid | None] = ContextVar("fusedrnn_grid", default=None)


@contextmanager
def force_grid(grid: tuple[int, int, int]) -> Iterator[None]:
    """Divide problems that this thread or task plans in the ``with`` block by this grid, where it is possible."""
    token = _forced_grid.set(ThreadGrid(*grid))
    try:
        yield
    finally:
        _forced_grid.reset(token)


def possible_grids(problem: ProblemSize, threads: int, tuning: Tuning) -> list[ThreadGrid]:
    """All grids of at most so many threads, that of one thread first.

    The number of groups of rows or of units is a power of two, or as large as the threads allow. A network of one
    direction may pipeline its layers. A short training or backward call that reads unpacked weights uses one thread:
    the one that has just written the weights.
    """
    spec, training = problem.spec, problem.phase != "inference"
    is_short = problem.steps <= tuning.max_own_steps and problem.work <= tuning.max_own_work
    if training and problem.unpacked and is_short:
        threads = 1
    grids = {ThreadGrid(1, 1, 1): None}
    for layer_dirs in {1, min(spec.num_directions if spec.bidirectional else spec.num_layers, threads)}:
        num = threads // layer_dirs
        counts = {1 << power for power in range(num.bit_length())} | {num}
        pairs = {(first, second) for first in counts for second in (1, num // first)}
        for rows, units in sorted(pairs | {pair[::-1] for pair in pairs}):
            grids[ThreadGrid(layer_dirs, min(rows, problem.batch), min(units, problem.unit_vecs))] = None
    return list(grids)


def choose_share(
    problem: ProblemSize, threads: int, spinning: bool, tuning: Tuning
) -> tuple[LargestShare, Forecast | None]:
    """The largest share of the grid with the least cost, for threads that are asleep or ``spinning``, and its forecast.

    A forced grid, or one that the tuning chooses, has no forecast; nor has the grid of one thread.
    """
    grids, forced = possible_grids(problem, threads, tuning), _forced_grid.get()
    if forced is not None and forced in grids:
        grids = [forced]
    elif tuning.choose_grid is not None:
        grids = [tuning.choose_grid(problem, grids)]
    shares = [LargestShare.of(problem, grid, tuning) for grid in grids]
    if len(shares) == 1:
        return shares[0], None
    machine = tuning.machine_of(problem.target)
    costs = [predict_cost(problem, share, machine, spinning=spinning) for share in shares]
    adjusted = [adjusted_cost(share, cost, tuning.min_speedup) for share, cost in zip(shares, costs, strict=True)]
    best = adjusted.index(min(adjusted))
    if forced is not None or shares[best].num_threads == 1:
        return shares[best], None
    return shares[best], Forecast(several=costs[best].total, alone=costs[0].total)
