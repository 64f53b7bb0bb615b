"""The sizes that plans and the cost model work with: those of a problem, and those of one thread's share of it."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

from fusedrnn.cell.cells import Variant
from fusedrnn.cell.expr import Constant, Expr, Operation
from fusedrnn.cell.primitives import PRIMITIVES
from fusedrnn.cell.traversal import walk
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage, derivative_of, lowered_cell
from fusedrnn.engines.cpu.kernels.tile_gemm import ROWS_PER_KERNEL
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.engines.cpu.tuning import Tuning
from fusedrnn.jit.target import Target
from fusedrnn.spec import RNNSpec

Phase = Literal["inference", "training", "backward"]
"""What a call computes; ``"training"`` is its forward pass."""


class ThreadGrid(NamedTuple):
    """How threads divide a problem.

    Attributes:
        layer_dirs: Groups of layer-directions: the directions, or in a network of one direction pipelined layers.
        rows: Groups of sequences.
        units: Groups of hidden units.
    """

    layer_dirs: int
    rows: int
    units: int

    @property
    def num_threads(self) -> int:
        """Threads in use."""
        return self.layer_dirs * self.rows * self.units


def reads_unpacked(tiling: Tiling, steps: int, batch: int, training: bool, tuning: Tuning) -> bool:
    """Whether a call uses unpacked weights: it reads them so rarely that packing or looking for changes costs more."""
    if training:
        reads = steps * (1 + batch / tuning.unpacked_rows_training)
        max_reads, max_floats = tuning.max_unpacked_reads_training, tuning.max_unpacked_floats_training
    else:
        reads, max_reads, max_floats = steps, tuning.max_unpacked_reads, tuning.max_unpacked_floats
    is_small = (reads - max_reads) * tiling.spec.layout.size <= max_floats
    return tiling.can_read_unpacked and (steps <= max_reads or is_small)


class ProblemSize(Tiling):
    """The sizes of a call.

    Attributes:
        steps, batch: T and N.
        phase: What the call computes.
        inputs: Features that each layer reads.
        rows_per_tile: Rows of a micro-kernel's tile, in GEMMs of the weights' gradients.
        instructions: Vector instructions of the cell's maths, or of its derivative's, for a unit vector of a row.
        states: Vectors of states for each unit vector, including the operands of later stages.
        saved: Vectors that training saves for each unit vector.
        pre_act_grads: Distinct vectors of pre-activation gradients for each unit vector.
        unpacked: Whether the call uses unpacked weights.
    """

    def __init__(
        self, spec: RNNSpec, target: Target, steps: int, batch: int, phase: Phase = "inference",
        tuning: Tuning | None = None, *, packed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(spec, target)
        training = phase != "inference"
        self.unpacked = tuning is not None and not packed and reads_unpacked(self, steps, batch, training, tuning)
        self.steps, self.batch, self.phase = steps, batch, phase
        self.inputs = tuple(spec.layer_input_size(layer) for layer in range(spec.num_layers))
        self.rows_per_tile = self.lanes if self.multiplies_tiles else target.tile[0]
        self.instructions = _cell_instructions(spec.variant, phase)
        self.states = len(spec.state_names) + len(self.later_gemm_stages)
        self.saved = len(derivative_of(spec.variant).saved)
        self.pre_act_grads = sum(stage.num_grads for stage in self.column_groups)

    @property
    def work(self) -> int:
        """Multiply-adds of forward."""
        return self.steps * self.batch * self.spec.layout.size

    def weights_bytes(self, features: int, unit_vecs: int) -> int:
        """Bytes of the packed weights of so many unit vectors of a layer that reads so many features."""
        return (features + self.out) * unit_vecs * self.num_gates * self.weight_vector_bytes

    @property
    def gradient_groups(self) -> int:
        """Groups of rows that the GEMMs of the weights' gradients multiply, of all steps."""
        group = self.gradient_products.group
        if self.multiplies_tiles:
            return -(-self.steps * self.batch // group)
        return self.steps * -(-self.batch // group)

    @property
    def rows_per_gemm_tile(self) -> int:
        """Rows that read a panel together, in GEMMs other than those of the weights' gradients."""
        return ROWS_PER_KERNEL if self.multiplies_tiles else self.rows_per_tile


class LargestShare(NamedTuple):
    """The share of the thread that has most to do.

    Attributes:
        grid: How the problem is divided.
        rows: Sequences.
        unit_vecs: Unit vectors.
        out_unit_vecs: Unit vectors of h; they differ from ``unit_vecs`` only with a projection.
        chunk: Steps of an input GEMM; in backward, steps of a GEMM for dx.
        block: In backward, steps of a GEMM of the weight gradients: whole chunks.
        block_rows: In backward, rows of such a GEMM that are packed at once.
        weight_unit_vecs: In backward, unit vectors of the weight gradients; all threads of a direction divide these.
    """

    grid: ThreadGrid
    rows: int
    unit_vecs: int
    out_unit_vecs: int
    chunk: int
    block: int = 0
    block_rows: int = 0
    weight_unit_vecs: int = 0

    @classmethod
    def of(cls, problem: ProblemSize, grid: ThreadGrid, tuning: Tuning) -> LargestShare:
        """The largest share of a problem that is divided by this grid."""
        steps, batch, is_backward = problem.steps, problem.batch, problem.phase == "backward"
        rows, unit_vecs = -(-batch // grid.rows), -(-problem.unit_vecs // grid.units)
        # The gates of a chunk fill half of L2, but a chunk has at least the minimum of rows.
        row_bytes = problem.gradients_stride if is_backward else problem.gates_stride(unit_vecs)
        min_rows = tuning.min_dx_chunk_rows if is_backward else tuning.min_chunk_rows
        chunk_rows = max(min_rows, min(tuning.max_chunk_rows, tuning.l2_bytes // 2 // row_bytes))
        if problem.multiplies_tiles and not is_backward:
            # Tiles multiply faster than L3 is read: if weights do not stay in L2, more rows read them at once.
            weights_bytes = problem.weights_bytes(max(problem.inputs), unit_vecs)
            if weights_bytes + chunk_rows * row_bytes > tuning.l2_bytes:
                chunk_rows = max(min_rows, min(tuning.max_tile_chunk_rows, tuning.l2_bytes // row_bytes))
        # A pipelined layer waits for a chunk of the layer below, so chunks must be short.
        max_chunk = -(-steps // tuning.min_pipeline_chunks) if problem.is_pipelined(grid.layer_dirs) else steps
        chunk = max(1, min(max_chunk, chunk_rows // (batch if is_backward else rows)))
        share = cls(grid, rows, unit_vecs, -(-problem.out_vecs // grid.units), chunk)
        if not is_backward:
            return share
        block = min(max(1, tuning.block_rows // (batch * chunk)), -(-steps // chunk)) * chunk
        return share._replace(
            block=block,
            block_rows=min(block * batch, tuning.gemm_rows),
            weight_unit_vecs=-(-problem.unit_vecs // (grid.rows * grid.units)),
        )

    def unit_vecs_of(self, stage: LoweredStage) -> int:
        """Unit vectors of a stage."""
        return self.out_unit_vecs if stage.projects else self.unit_vecs

    @property
    def num_threads(self) -> int:
        """Threads in use."""
        return self.grid.num_threads


@lru_cache(maxsize=64)
def _cell_instructions(variant: Variant, phase: Phase) -> int:
    """Vector instructions of a cell's maths for a unit vector of a row, its loads and stores included."""
    cell, derivative = lowered_cell(variant), derivative_of(variant)
    roots: list[Expr] = [*cell.outputs, *cell.operands]
    stores = len(roots)
    if phase == "training":
        stores += len(roots) + len(derivative.saved)
        roots += derivative.saved
    if phase == "backward":
        grads = [slot for stage in (*derivative.stages, *derivative.inputs.values()) for slot in stage.grads]
        raw_input = [] if derivative.raw_input is None else [derivative.raw_input]
        roots = [*grads, *derivative.state_grads.values(), *raw_input]
        stores = 2 * len(cell.gates) + len(grads) + len(cell.states)
    return sum(map(_instructions, walk(roots))) + 2 * stores


def _instructions(node: Expr) -> int:
    if isinstance(node, Constant):
        return 0
    return PRIMITIVES[node.op].instructions if isinstance(node, Operation) else 1
