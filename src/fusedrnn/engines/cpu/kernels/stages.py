"""How kernels see a cell: its stages, each a GEMM and the maths behind it, and how their columns lie in panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from fusedrnn.cell.cells import Variant
from fusedrnn.cell.derivative import Derivative, StageDerivative, differentiate
from fusedrnn.cell.expr import Expr, walk
from fusedrnn.cell.leaves import NewState, Saved, StageOperand, State
from fusedrnn.cell.trace import Stage, TracedCell, fuse_gate_sums, traced_cell


@dataclass(frozen=True)
class Blocking:
    """How the gates of a cell lie in panels: the units of a block fill a whole number of panels."""

    gates: int
    panel_vectors: int

    @property
    def block_unit_vecs(self) -> int:
        """Vectors of units in a block."""
        return math.lcm(self.gates, self.panel_vectors) // self.gates

    @property
    def block_panels(self) -> int:
        """Panels in a block."""
        return self.block_col_vecs // self.panel_vectors

    @property
    def block_col_vecs(self) -> int:
        """Vectors of gates in a block."""
        return self.block_unit_vecs * self.gates


@lru_cache(maxsize=256)
def lowered_cell(variant: Variant) -> TracedCell:
    """The cell as kernels compute it."""
    return fuse_gate_sums(traced_cell(variant))


@lru_cache(maxsize=256)
def derivative_of(variant: Variant) -> Derivative:
    """Its derivative."""
    return differentiate(lowered_cell(variant))


Result = NewState | StageOperand | Saved
"""What a stage computes: a new state, the operand of a later stage, or a value that training saves for backward."""
R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class StageKernel:
    """A stage of a cell as kernels have it: one GEMM and what follows it, for units of their own kind.

    Attributes:
        index: Its place among the stages.
        stage: The stage.
        derivative: What its gates' gradients are.
        num_gates: Vectors of columns for each vector of units: its gates, or one if it projects.
        first_gate: Gates of the stages before.
        first_grad: Distinct gradients of these.
        results: What is computed after its GEMM, each with its expression.
    """

    index: int
    stage: Stage
    derivative: StageDerivative
    num_gates: int
    first_gate: int
    first_grad: int
    results: tuple[tuple[Result, Expr], ...]

    @property
    def projects(self) -> bool:
        """Whether its units are the output's."""
        return self.stage.projects

    @property
    def gate_names(self) -> tuple[str, ...]:
        """Its gates; none if it projects."""
        return self.stage.gates

    @property
    def accumulates_in_place(self) -> bool:
        """Whether its GEMM accumulates onto the input's pre-activations."""
        return self.stage.accumulates_in_place

    @property
    def num_grads(self) -> int:
        """Distinct gradients."""
        return len(self.derivative.distinct_grads)

    def results_of(self, *kinds: type[R]) -> dict[R, Expr]:
        """Its results of these kinds."""
        return {result: expr for result, expr in self.results if isinstance(result, kinds)}


@lru_cache(maxsize=256)
def stage_kernels(variant: Variant) -> tuple[StageKernel, ...]:
    """The stages of a cell.

    Raises:
        NotImplementedError: If a projection is not the last one, a stage's gates are no neighbours, or a state is
            needed after it has been replaced.
    """
    cell, derivative = lowered_cell(variant), derivative_of(variant)
    known: list[tuple[int, Result, Expr]] = [
        (cell.ready_stage(new), NewState(name), new) for name, new in zip(cell.states, cell.outputs, strict=True)
    ]
    # An operand is computed in the stage before its own.
    known += [(number, StageOperand(number + 1), operand) for number, operand in enumerate(cell.operands)]
    # A saved value is computed once, in the first stage that uses it.
    uses = [(number, set(walk([node]))) for number, _, node in known]
    for index, node in enumerate(derivative.saved):
        known.append((min(number for number, inside in uses if node in inside), Saved(index), node))
    found: list[StageKernel] = []
    for number, stage in enumerate(cell.stages):
        before, slots = sum(part.num_gates for part in found), sum(part.num_grads for part in found)
        neighbours = stage.projects or cell.gates[before : before + len(stage.gates)] == stage.gates
        if not neighbours or (stage.projects and number < len(cell.stages) - 1):
            raise NotImplementedError(f"a cell whose stage {number} does not have its weights next to one another")
        results = tuple((result, node) for after, result, node in known if after == number)
        gates = 1 if stage.projects else len(stage.gates)
        found.append(StageKernel(number, stage, derivative.stages[number], gates, before, slots, results))
    _check_order(cell, found)
    return tuple(found)


def _check_order(cell: TracedCell, parts: Sequence[StageKernel]) -> None:
    """Refuse a cell that needs a state after it has been replaced, which all but h are as soon as they are known."""
    replaced: set[str] = set()
    for part in parts:
        used = {node.name for node in walk([expr for _, expr in part.results]) if isinstance(node, State)}
        if used & replaced:
            raise NotImplementedError(f"a cell that needs the old {used & replaced} after the new one is there")
        replaced |= {result.name for result in part.results_of(NewState)} - {cell.states[0]}


def is_plain(cell: TracedCell) -> bool:
    """Whether a cell has one stage and matrices alone."""
    return len(cell.stages) == 1 and not cell.peepholes
