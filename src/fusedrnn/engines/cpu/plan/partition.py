"""How a problem is divided among threads: the possible grids, the cheapest of them, and who has which part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from fusedrnn.engines.cpu.kernels.scratch import ScratchLayout
from fusedrnn.engines.cpu.kernels.stages import is_plain, lowered_cell
from fusedrnn.engines.cpu.plan.cost import adjusted_cost, predict_cost
from fusedrnn.engines.cpu.plan.sizes import ProblemSize, ThreadGrid, ThreadShare
from fusedrnn.engines.cpu.plan.thread_trials import Forecast
from fusedrnn.engines.cpu.tiling import Tiling
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


def choose_share(
    problem: ProblemSize,
    target: Target,
    grids: Sequence[ThreadGrid],
    share_of: Callable[[ThreadGrid], ThreadShare],
    spinning: bool,
    tuning: Tuning,
) -> tuple[ThreadShare, Forecast | None]:
    """The largest share of the grid with the least cost, for threads that are asleep or ``spinning``, and its forecast.

    A forced grid, or one that the tuning chooses, has no forecast; neither has one thread.
    """
    forced = _forced_grid.get()
    if forced is not None and forced in grids:
        return share_of(forced), None
    if tuning.choose_grid is not None:
        return share_of(tuning.choose_grid(problem, grids)), None
    if len(grids) == 1:
        return share_of(grids[0]), None
    machine = tuning.machine_of(target)
    shares = [share_of(grid) for grid in grids]
    costs = [predict_cost(problem, share, machine, spinning=spinning) for share in shares]
    adjusted = [adjusted_cost(share, cost, tuning.min_speedup) for share, cost in zip(shares, costs, strict=True)]
    best = adjusted.index(min(adjusted))
    if forced is not None or shares[best].num_threads == 1:
        return shares[best], None
    return shares[best], Forecast(several=costs[best].total, alone=costs[0].total)


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
    return -(-count // groups)


def max_chunk(tiling: Tiling, steps: int, grid: ThreadGrid, tuning: Tuning) -> int:
    """The most steps of a chunk. A pipelined layer waits for a chunk of the layer below, which must be short."""
    return -(-steps // tuning.min_pipeline_chunks) if tiling.is_pipelined(grid.layer_dirs) else steps


def chunk_rows(row_bytes: int, min_rows: int, tuning: Tuning) -> int:
    """Rows of a chunk whose gates fill half of L2, but not fewer than ``min_rows``."""
    return max(min_rows, min(tuning.max_chunk_rows, tuning.l2_bytes // 2 // row_bytes))
