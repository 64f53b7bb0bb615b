"""The plan of a forward call: how threads divide it, and its scratch. Made once for a problem, and printable."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fusedrnn.engines.cpu import tuning as tunings
from fusedrnn.engines.cpu.kernels.scratch import FORWARD, ForwardSizes, gates_stride
from fusedrnn.engines.cpu.kernels.tiling import Tiling
from fusedrnn.engines.cpu.plan import partition
from fusedrnn.engines.cpu.plan.partition import Plan, largest_share, partition_bounds
from fusedrnn.engines.cpu.plan.sizes import ProblemSize, ThreadGrid, ThreadShare
from fusedrnn.engines.cpu.tuning import Tuning
from fusedrnn.jit.target import Target
from fusedrnn.spec import RNNSpec


@dataclass(frozen=True)
class ForwardPlan(Plan):
    """The plan of inference or training.

    Attributes:
        layer_output_row, layer_output_size: Bytes of a row and of the whole of a layer's output in the workspace.
    """

    layer_output_row: int
    layer_output_size: int

    def __str__(self) -> str:
        return f"{super().__str__()}; {self.chunk} step(s) per input GEMM; workspace {self.size / 2**20:.2f} MiB"


def make_forward_plan(
    spec: RNNSpec,
    target: Target,
    steps: int,
    batch: int,
    threads: int,
    *,
    training: bool = False,
    awake: bool = False,
    tuning: Tuning | None = None,
) -> ForwardPlan:
    """Plan T steps of N sequences on at most so many threads, which are asleep when the call comes, or ``awake``."""
    tuning = tuning or tunings.current()
    tiling = Tiling.of(spec, target)
    problem = ProblemSize.of(spec, target, steps, batch, "training" if training else "inference")
    share_of = partial(forward_share, tiling, steps, batch, tuning=tuning)
    grids = partition.possible_grids(spec, batch, threads, tiling.unit_vecs)
    grid = partition.choose_grid(problem, target, grids, share_of, awake, tuning)
    share = share_of(grid)
    sizes = ForwardSizes(
        spec, tiling, steps, batch, *grid, share.rows, share.unit_vecs, share.chunk, is_training=training
    )
    return ForwardPlan(
        steps,
        batch,
        grid,
        share.chunk,
        bounds={
            "row_starts": partition_bounds(batch, grid.rows),
            "unit_starts": partition_bounds(tiling.unit_vecs, grid.units),
            "out_starts": partition_bounds(tiling.out_vecs, grid.units),
        },
        scratch=FORWARD.lay_out(sizes),
        forecast=partition.forecast_times(problem, target, share, share_of, awake, tuning),
        layer_output_row=sizes.layer_output_row,
        layer_output_size=sizes.layer_output_size,
    )


def forward_share(tiling: Tiling, steps: int, batch: int, grid: ThreadGrid, tuning: Tuning) -> ThreadShare:
    """The largest share of a forward call."""
    rows, unit_vecs = -(-batch // grid.rows), largest_share(tiling.unit_vecs, grid.units)
    chunk_rows = partition.chunk_rows(gates_stride(tiling, unit_vecs), tuning.min_chunk_rows, tuning)
    chunk = max(1, min(partition.max_chunk(tiling, steps, grid, tuning), chunk_rows // rows))
    return ThreadShare(grid, rows, unit_vecs, chunk, largest_share(tiling.out_vecs, grid.units))
