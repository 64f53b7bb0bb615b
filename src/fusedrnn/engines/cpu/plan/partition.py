"""How a problem is divided among threads: the possible grids, the cheapest of them, and who has which part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise

from fusedrnn.engines.cpu.kernels.arena import ScratchLayout
from fusedrnn.engines.cpu.kernels.stages import is_plain, lowered_cell
from fusedrnn.engines.cpu.kernels.tiling import Tiling
from fusedrnn.engines.cpu.plan.cost import adjusted_cost, predict_cost
from fusedrnn.engines.cpu.plan.sizes import ProblemSize, ThreadGrid, ThreadShare
from fusedrnn.engines.cpu.plan.thread_trials import Forecast
from fusedrnn.engines.cpu.tuning import Tuning
from fusedrnn.jit.target import Target
from fusedrnn.spec import RNNSpec

ONE_THREAD = ThreadGrid(1, 1, 1)
_forced_grid: ContextVar[ThreadGrid | None] = ContextVar("fusedrnn_grid", default=None)


@dataclass(frozen=True)
class Plan:
    """How a call is divided among threads, and the layout of its workspace.

    Attributes:
        steps, batch: T and N.
        grid: How threads divide the problem.
        chunk: Steps of an input GEMM, in backward of one for dx.
        bounds: By the names of the kernels' fields, the first row or unit vector of each group, and the end.
        scratch: The layout of the workspace.
        forecast: Predicted times; None on one thread, or if something else than the cost model chose the grid.
    """

    steps: int
    batch: int
    grid: ThreadGrid
    chunk: int
    bounds: Mapping[str, tuple[int, ...]]
    scratch: ScratchLayout
    forecast: Forecast | None

    @property
    def num_threads(self) -> int:
        """Threads in use."""
        return self.grid.num_threads

    @property
    def row_starts(self) -> tuple[int, ...]:
        """The first row of each group, and the end."""
        return self.bounds["row_starts"]

    @property
    def size(self) -> int:
        """Bytes of the workspace."""
        return self.scratch.size

    def __str__(self) -> str:
        layer_dirs, rows, units = self.grid
        return (
            f"T={self.steps} N={self.batch}: {self.num_threads} thread(s) = {layer_dirs} direction(s) or layer(s) at "
            f"once x {rows} row group(s) x {units} unit group(s)"
        )


@contextmanager
def force_grid(grid: tuple[int, int, int]) -> Iterator[None]:
    """Divide problems that this thread or task plans in the ``with`` block by this grid, where it is possible."""
    token = _forced_grid.set(ThreadGrid(*grid))
    try:
        yield
    finally:
        _forced_grid.reset(token)


def possible_grids(spec: RNNSpec, batch: int, threads: int, unit_vecs: int) -> list[ThreadGrid]:
    """All grids of at most so many threads, that of one thread first.

    There are as many groups of rows or units as a power of two, or as there are threads for. A network of one direction
    may pipeline its layers.
    """
    grids = {ONE_THREAD: None}
    for layer_dirs in {1, min(spec.num_directions if spec.bidirectional else spec.num_layers, threads)}:
        most = threads // layer_dirs
        counts = {1 << power for power in range(most.bit_length())} | {most}
        pairs = {(first, second) for first in counts for second in (1, most // first)}
        for rows, units in sorted(pairs | {pair[::-1] for pair in pairs}):
            grids[ThreadGrid(layer_dirs, min(rows, batch), min(units, unit_vecs))] = None
    return list(grids)


def choose_grid(
    problem: ProblemSize,
    target: Target,
    grids: Sequence[ThreadGrid],
    share_of: Callable[[ThreadGrid], ThreadShare],
    awake: bool,
    tuning: Tuning,
) -> ThreadGrid:
    """The forced grid, or the one with the least cost for the threads' state, ``awake`` or asleep."""
    forced = _forced_grid.get()
    if forced is not None and forced in grids:
        return forced
    if tuning.choose_grid is not None:
        return ThreadGrid(*tuning.choose_grid(problem, grids))
    if len(grids) == 1:
        return grids[0]
    machine = tuning.machine_of(target)

    def cost(share: ThreadShare) -> float:
        return adjusted_cost(share, predict_cost(problem, share, machine, awake=awake), tuning.min_speedup)

    return min(map(share_of, grids), key=cost).grid


def forecast_times(
    problem: ProblemSize,
    target: Target,
    share: ThreadShare,
    share_of: Callable[[ThreadGrid], ThreadShare],
    awake: bool,
    tuning: Tuning,
) -> Forecast | None:
    """The predicted times of a plan and of one thread; None if there is nothing to choose between."""
    if share.num_threads == 1 or _forced_grid.get() is not None or tuning.choose_grid is not None:
        return None
    machine = tuning.machine_of(target)
    costs = (predict_cost(problem, each, machine, awake=awake) for each in (share, share_of(ONE_THREAD)))
    return Forecast(*(cost.total for cost in costs))


def reads_unpacked(spec: RNNSpec, steps: int, batch: int, training: bool, tuning: Tuning) -> bool:
    """Whether a call uses its weights unpacked."""
    return is_plain(lowered_cell(spec.variant)) and has_few_reads(steps, batch, training, tuning)


def has_few_reads(steps: int, batch: int, training: bool, tuning: Tuning) -> bool:
    """Whether a call reads its weights so rarely that packing, or looking for changes, takes longer."""
    reads = steps * -(-batch // tuning.unpacked_rows)
    return reads <= (tuning.max_unpacked_reads_training if training else tuning.max_unpacked_reads)


def limit_threads(spec: RNNSpec, threads: int, steps: int, batch: int, training: bool, tuning: Tuning) -> int:
    """The threads that a call may use: one if it reads weights once that this thread has just written."""
    return 1 if training and reads_unpacked(spec, steps, batch, training, tuning) else threads


def partition_bounds(count: int, groups: int) -> tuple[int, ...]:
    """The first item of each group, and the end."""
    return tuple(count * group // groups for group in range(groups + 1))


def largest_share(count: int, groups: int) -> int:
    """The size of the largest group."""
    return max(end - first for first, end in pairwise(partition_bounds(count, groups)))


def max_chunk(tiling: Tiling, steps: int, grid: ThreadGrid, tuning: Tuning) -> int:
    """The most steps of a chunk. A pipelined layer waits for a chunk of the layer below, which must be short."""
    return -(-steps // tuning.min_pipeline_chunks) if tiling.is_pipelined(grid.layer_dirs) else steps


def chunk_rows(row_bytes: int, min_rows: int, tuning: Tuning) -> int:
    """Rows of a chunk whose gates fill half of L2, but not fewer than ``min_rows``."""
    return max(min_rows, min(tuning.max_chunk_rows, tuning.l2_bytes // 2 // row_bytes))
