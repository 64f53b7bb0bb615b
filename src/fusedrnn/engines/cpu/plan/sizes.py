"""The sizes that the cost model works with: of a problem, and of the share of it that one thread has."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fusedrnn.cell.cells import Variant
from fusedrnn.cell.expr import Constant, Expr, Operation, walk
from fusedrnn.cell.primitives import PRIMITIVES
from fusedrnn.engines.cpu.kernels.stages import derivative_of, lowered_cell, stage_kernels
from fusedrnn.jit.target import ITEM_SIZE, Target
from fusedrnn.spec import RNNSpec


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


class StageGemm(NamedTuple):
    """The recurrent GEMM of a cell's stage.

    Attributes:
        k: Elements of a row of its operand.
        col_vecs: Vectors of columns for each vector of units.
        projects: Whether its columns are the units of a projection.
    """

    k: int
    col_vecs: int
    projects: bool


class ProblemSize(NamedTuple):
    """A call's sizes. A *unit vector* is a vector of hidden units; each gate has one vector for it.

    Attributes:
        phase: "inference", "training" (its forward pass) or "backward".
        inputs: Features that each layer reads.
        instructions: Vector instructions of the cell's maths, or of its derivative's, for a unit vector of a row.
        states: Vectors of states for each unit vector, the operands of later stages among them.
        saved: Vectors that training saves for each unit vector.
        pre_act_grads: Distinct vectors of pre-activation gradients for each unit vector.
        stages: The recurrent GEMMs of a step.
    """

    phase: str
    steps: int
    batch: int
    directions: int
    inputs: tuple[int, ...]
    hidden: int
    unit_vecs: int
    gates: int
    lanes: int
    vector_bytes: int
    vectors_per_panel: int
    rows_per_tile: int
    instructions: int
    states: int
    saved: int
    pre_act_grads: int
    stages: tuple[StageGemm, ...]

    @classmethod
    def of(cls, spec: RNNSpec, target: Target, steps: int, batch: int, phase: str) -> ProblemSize:
        """The sizes of T steps of N sequences."""
        derivative, stages = derivative_of(spec.variant), stage_kernels(spec.variant)
        lanes = target.lanes(spec.dtype)
        return cls(
            phase=phase,
            steps=steps,
            batch=batch,
            directions=spec.num_directions,
            inputs=tuple(spec.layer_input_size(layer) for layer in range(spec.num_layers)),
            hidden=spec.hidden_size,
            unit_vecs=-(-spec.hidden_size // lanes),
            gates=spec.num_gates,
            lanes=lanes,
            vector_bytes=lanes * ITEM_SIZE[spec.dtype],
            vectors_per_panel=target.tile[1],
            rows_per_tile=target.tile[0],
            instructions=_cell_instructions(spec.variant, phase),
            states=len(spec.state_names) + len(stages) - 1,
            saved=len(derivative.saved),
            pre_act_grads=sum(stage.num_grads for stage in stages),
            stages=tuple(
                StageGemm(spec.hidden_size if stage.index else spec.state_size, stage.num_gates, stage.projects)
                for stage in stages
            ),
        )


class ThreadShare(NamedTuple):
    """The share of the thread that has most to do.

    Attributes:
        grid: How the problem is divided.
        rows: Sequences.
        unit_vecs: Unit vectors.
        chunk: Steps of an input GEMM, in backward of one for dx.
        out_unit_vecs: Vectors of h's units; other than ``unit_vecs`` only with a projection.
        block: In backward, rows of a GEMM of the weight gradients.
        weight_unit_vecs: In backward, unit vectors of the weight gradients, which all threads of a direction divide.
    """

    grid: ThreadGrid
    rows: int
    unit_vecs: int
    chunk: int
    out_unit_vecs: int
    block: int = 0
    weight_unit_vecs: int = 0

    def unit_vecs_of(self, stage: StageGemm) -> int:
        """Unit vectors of a stage."""
        return self.out_unit_vecs if stage.projects else self.unit_vecs

    @property
    def num_threads(self) -> int:
        """Threads in use."""
        return self.grid.num_threads


@lru_cache(maxsize=64)
def _cell_instructions(variant: Variant, phase: str) -> int:
    """Vector instructions of a cell's maths for a unit vector of a row, its loads and stores included."""
    cell, derivative = lowered_cell(variant), derivative_of(variant)
    roots: list[Expr] = [*cell.outputs, *cell.operands]
    stores = len(roots)
    if phase == "training":
        stores += len(roots) + len(derivative.saved)
        roots += derivative.saved
    if phase == "backward":
        grads = [slot for stage in derivative.stages for slot in stage.distinct_grads]
        roots = [*grads, *derivative.state_grads.values()]
        stores = 2 * len(cell.gates) + len(grads) + len(cell.states)
    return sum(map(_instructions, walk(roots))) + 2 * stores


def _instructions(node: Expr) -> int:
    if isinstance(node, Constant):
        return 0
    return PRIMITIVES[node.op].instructions if isinstance(node, Operation) else 1
