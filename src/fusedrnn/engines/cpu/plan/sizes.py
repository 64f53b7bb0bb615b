"""What the cost model knows of a problem: its sizes, and what a way to share it out gives a member to do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fusedrnn.cell.cells import Variant
from fusedrnn.cell.expr import Constant, Expr, Operation, walk
from fusedrnn.cell.primitives import PRIMITIVES
from fusedrnn.engines.cpu.kernels.stages import derivative_of, lowered_cell, stage_kernels
from fusedrnn.jit.target import ITEM_SIZE, Target
from fusedrnn.spec import RNNSpec

Grid = tuple[int, int, int]
"""Groups of directions, or in a network of one direction of layers; of rows; of units."""


@dataclass(frozen=True)
class Gemm:
    """A stage's GEMM in a step: what it multiplies, and vectors of columns for each vector of its units.

    Attributes:
        k: Elements of its operand.
        gates: Vectors of columns for each vector of units.
        projects: Whether its units are the output's.
    """

    k: int
    gates: int
    projects: bool


@dataclass(frozen=True)
class Problem:
    """The sizes that matter. A *vector* is one of units; gates of a vector of units are so many vectors.

    Attributes:
        way: "inference", "training" (the forward pass) or "backward".
        inputs: Features that each layer reads.
        operations: Instructions of the cell's maths on a vector, or of its derivative's.
        states, kept, slots: Vectors that a vector of units has of states, of what training keeps, of distinct gate
            gradients.
        stages: The GEMMs of a step.
    """

    way: str
    steps: int
    batch: int
    directions: int
    inputs: tuple[int, ...]
    hidden: int
    gates: int
    lanes: int
    vector: int
    panel: int
    tile: int
    operations: int
    states: int
    kept: int
    slots: int
    stages: tuple[Gemm, ...]

    @property
    def units(self) -> int:
        """Vectors that hold the hidden units."""
        return -(-self.hidden // self.lanes)

    @classmethod
    def of(cls, spec: RNNSpec, target: Target, steps: int, batch: int, way: str) -> Problem:
        """That of T steps of N sequences through these layers."""
        derivative, parts = derivative_of(spec.variant), stage_kernels(spec.variant)
        lanes = target.lanes(spec.dtype)
        return cls(
            way=way,
            steps=steps,
            batch=batch,
            directions=spec.num_directions,
            inputs=tuple(spec.layer_input_size(layer) for layer in range(spec.num_layers)),
            hidden=spec.hidden_size,
            gates=spec.num_gates,
            lanes=lanes,
            vector=lanes * ITEM_SIZE[spec.dtype],
            panel=target.tile[1],
            tile=target.tile[0],
            operations=_operations(spec.variant, way),
            states=len(spec.state_names) + len(parts) - 1,
            kept=len(derivative.saved),
            slots=sum(stage.num_grads for stage in parts),
            stages=tuple(
                Gemm(spec.hidden_size if stage.index else spec.state_size, stage.num_gates, stage.projects)
                for stage in parts
            ),
        )


@dataclass(frozen=True)
class Share:
    """A way to share a problem out: the grid, and what the member with most to do then has.

    Attributes:
        rows: Its rows.
        units: Its vectors of units.
        chunk: Steps to an input GEMM, backward to one of the inputs' gradients.
        block: Rows to a GEMM of the weights' gradients, in backward.
        shared: Its vectors of units in those.
        outs: Its vectors of h's units; as many as of hidden ones unless there is a projection.
    """

    grid: Grid
    rows: int
    units: int
    chunk: int
    block: int = 0
    shared: int = 0
    outs: int = 0

    def of(self, stage: Gemm) -> int:
        """Its vectors of a stage's units."""
        return self.outs if stage.projects else self.units

    @property
    def num_threads(self) -> int:
        """Threads at work."""
        directions, rows, units = self.grid
        return directions * rows * units


@lru_cache(maxsize=64)
def _operations(variant: Variant, way: str) -> int:
    """Instructions of a cell's maths on a vector of units of a row, its loads and stores with it."""
    cell, derivative = lowered_cell(variant), derivative_of(variant)
    roots: list[Expr] = [*cell.outputs, *cell.operands]
    stores = len(roots)
    if way == "training":
        stores += len(roots) + len(derivative.saved)
        roots += derivative.saved
    if way == "backward":
        slots = [slot for stage in derivative.stages for slot in stage.distinct_grads]
        roots = [*slots, *(state for state in derivative.state_grads if state is not None)]
        stores = 2 * len(cell.gates) + len(slots) + len(cell.states)
    return sum(map(_instructions, walk(roots))) + 2 * stores


def _instructions(node: Expr) -> int:
    if isinstance(node, Constant):
        return 0
    return PRIMITIVES[node.op].instructions if isinstance(node, Operation) else 1
