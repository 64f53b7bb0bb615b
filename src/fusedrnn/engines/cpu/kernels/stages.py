"""How kernels see a cell: its stages, each a GEMM and the maths behind it, and how their columns lie in panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fusedrnn.cell.cells import Variant, traced
from fusedrnn.cell.derivative import Derivative, StageDerivative, differentiate
from fusedrnn.cell.expr import Expr, walk
from fusedrnn.cell.trace import Stage, TracedCell, merge


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
    return merge(traced(variant))


@lru_cache(maxsize=256)
def derivative_of(variant: Variant) -> Derivative:
    """Its derivative."""
    return differentiate(lowered_cell(variant))


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
        roots: What is computed after its GEMM: what for, which one, and how.
    """

    index: int
    stage: Stage
    derivative: StageDerivative
    num_gates: int
    first_gate: int
    first_grad: int
    roots: tuple[tuple[str, str, Expr], ...]

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
        return self.stage.merged

    @property
    def num_grads(self) -> int:
        """Distinct gradients."""
        return len(self.derivative.slots)

    def wanted(self, *kinds: str) -> list[tuple[str, str, Expr]]:
        """Its roots of these kinds: "state" a new one, "operand" of a later stage, "kept" for backward."""
        return [root for root in self.roots if root[0] in kinds]


@lru_cache(maxsize=256)
def stage_kernels(variant: Variant) -> tuple[StageKernel, ...]:
    """The stages of a cell.

    Raises:
        NotImplementedError: If a projection is not the last one, a stage's gates are no neighbours, or a state is
            needed after it has been replaced.
    """
    cell, derivative = lowered_cell(variant), derivative_of(variant)
    known = [
        (cell.known_after(new), ("state", name, new)) for name, new in zip(cell.states, cell.outputs, strict=True)
    ]
    # An operand is wanted before its stage, whenever its parts are there.
    known += [(number, ("operand", str(number + 1), operand)) for number, operand in enumerate(cell.operands)]
    # What is kept is computed once, where it is first of use.
    uses = [(number, set(walk([node]))) for number, (_, _, node) in known]
    for place, node in enumerate(derivative.kept):
        known.append((min(number for number, inside in uses if node in inside), ("kept", str(place), node)))
    found: list[StageKernel] = []
    for number, stage in enumerate(cell.stages):
        before, slots = sum(part.num_gates for part in found), sum(part.num_grads for part in found)
        neighbours = stage.projects or cell.gates[before : before + len(stage.gates)] == stage.gates
        if not neighbours or (stage.projects and number < len(cell.stages) - 1):
            raise NotImplementedError(f"a cell whose stage {number} does not have its weights next to one another")
        roots = tuple(root for after, root in known if after == number)
        gates = 1 if stage.projects else len(stage.gates)
        found.append(StageKernel(number, stage, derivative.stages[number], gates, before, slots, roots))
    _check_order(cell, found)
    return tuple(found)


def _check_order(cell: TracedCell, parts: Sequence[StageKernel]) -> None:
    """Refuse a cell that needs a state after it has been replaced, which all but h are as soon as they are known."""
    replaced: set[str] = set()
    for part in parts:
        used = {node.leaf[1] for node in walk([root[2] for root in part.roots]) if node.leaf[0] == "state"}
        if used & replaced:
            raise NotImplementedError(f"a cell that needs the old {used & replaced} after the new one is there")
        replaced |= {name for kind, name, _ in part.roots if kind == "state" and name != cell.states[0]}


def is_plain(cell: TracedCell) -> bool:
    """Whether a cell has one stage and matrices alone."""
    return len(cell.stages) == 1 and not cell.vectors
