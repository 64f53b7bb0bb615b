"""The plan of a backward call: how threads divide it, and its scratch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fusedrnn.engines.cpu import tuning as tunings
from fusedrnn.engines.cpu.kernels.scratch import BACKWARD, BackwardSizes, gradients_stride
from fusedrnn.engines.cpu.kernels.tiling import Tiling
from fusedrnn.engines.cpu.plan import partition
from fusedrnn.engines.cpu.plan.partition import Plan, largest_share, partition_bounds
from fusedrnn.engines.cpu.plan.sizes import ProblemSize, ThreadGrid, ThreadShare
from fusedrnn.engines.cpu.tuning import Tuning
from fusedrnn.jit.target import Target
from fusedrnn.spec import RNNSpec


@dataclass(frozen=True)
class BackwardPlan(Plan):
    """The plan of backward.

    Attributes:
        block: Steps of a GEMM of the weight gradients.
        recomputes: Whether values that were not saved are computed again.
    """

    block: int
    recomputes: bool

    def __str__(self) -> str:
        return (
            f"backward of {super().__str__()}; {self.chunk} step(s) per gradient GEMM of inputs, "
            f"{self.block} of weights; workspace {self.size / 2**20:.2f} MiB"
        )


def make_backward_plan(
    spec: RNNSpec,
    target: Target,
    steps: int,
    batch: int,
    threads: int,
    *,
    recompute: bool = False,
    awake: bool = False,
    tuning: Tuning | None = None,
) -> BackwardPlan:
    """Plan T steps of N sequences on at most so many threads, which are asleep when the call comes, or ``awake``.

    ``recompute`` is for reserves that hold the states alone.
    """
    tuning = tuning or tunings.current()
    tiling = Tiling.of(spec, target)
    problem = ProblemSize.of(spec, target, steps, batch, "backward")
    share_of = partial(backward_share, tiling, steps, batch, tuning=tuning)
    grids = partition.possible_grids(spec, batch, threads, tiling.unit_vecs)
    grid = partition.choose_grid(problem, target, grids, share_of, awake, tuning)
    share = share_of(grid)
    chunk, block = _steps_at_once(tiling, steps, batch, grid, tuning)
    sizes = BackwardSizes(
        spec, tiling, steps, batch, *grid, share.rows, share.unit_vecs, chunk,
        block=block, gemm_rows=tuning.gemm_rows, packed_bytes=tuning.l2_bytes // 2, recompute=recompute,
    )  # fmt: skip
    units, outs, everyone = tiling.unit_vecs, tiling.out_vecs, grid.rows * grid.units
    return BackwardPlan(
        steps, batch, grid, chunk,
        bounds={
            "row_starts": partition_bounds(batch, grid.rows),
            "unit_starts": partition_bounds(units, grid.units),
            "out_starts": partition_bounds(outs, grid.units),
            "weight_starts": partition_bounds(units, everyone),
            "out_weight_starts": partition_bounds(outs, everyone),
        },
        scratch=BACKWARD.lay_out(sizes),
        forecast=partition.forecast_times(problem, target, share, share_of, awake, tuning),
        block=block, recomputes=sizes.recomputed_rows > 0,
    )  # fmt: skip


def backward_share(tiling: Tiling, steps: int, batch: int, grid: ThreadGrid, tuning: Tuning) -> ThreadShare:
    """The largest share of a backward call."""
    chunk, block = _steps_at_once(tiling, steps, batch, grid, tuning)
    return ThreadShare(
        grid,
        rows=-(-batch // grid.rows),
        unit_vecs=largest_share(tiling.unit_vecs, grid.units),
        chunk=chunk,
        out_unit_vecs=largest_share(tiling.out_vecs, grid.units),
        block=min(block * batch, tuning.gemm_rows),
        weight_unit_vecs=largest_share(tiling.unit_vecs, grid.rows * grid.units),
    )


def _steps_at_once(tiling: Tiling, steps: int, batch: int, grid: ThreadGrid, tuning: Tuning) -> tuple[int, int]:
    """Steps of a GEMM for dx, and of one of the weight gradients: a whole number of the former."""
    rows = partition.chunk_rows(gradients_stride(tiling), tuning.min_dx_chunk_rows, tuning)
    chunk = max(1, min(partition.max_chunk(tiling, steps, grid, tuning), rows // batch))
    return chunk, min(max(1, tuning.block_rows // (batch * chunk)) * chunk, -(-steps // chunk) * chunk)
