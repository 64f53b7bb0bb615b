"""A cell as kernels compute it: stages of one GEMM and the maths on its results, and how their columns fill panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from fusedrnn.cell.cells import Variant
from fusedrnn.cell.derivative import Derivative, StageDerivative, differentiate
from fusedrnn.cell.expr import Expr
from fusedrnn.cell.leaves import (
    KeptProduct,
    NewState,
    Output,
    PreH,
    PreSum,
    PreX,
    ReducedRow,
    RowMean,
    RowVariance,
    Saved,
    StageOperand,
    State,
)
from fusedrnn.cell.reductions import Reduction
from fusedrnn.cell.trace import TracedCell, fuse_gate_sums, traced_cell
from fusedrnn.cell.traversal import substitute, walk


@dataclass(frozen=True)
class Blocking:
    """How the gates of a stage fill panels: the units of a block fill a whole number of panels."""

    gates: int
    panel_vectors: int

    @property
    def block_unit_vecs(self) -> int:
        """Vectors of units in a block."""
        return math.lcm(self.gates, self.panel_vectors) // self.gates

    @property
    def block_col_vecs(self) -> int:
        """Vectors of columns in a block: those of all gates of its units."""
        return self.block_unit_vecs * self.gates

    @property
    def block_panels(self) -> int:
        """Panels in a block."""
        return self.block_col_vecs // self.panel_vectors


@lru_cache(maxsize=256)
def lowered_cell(variant: Variant) -> TracedCell:
    """The cell as kernels compute it."""
    return fuse_gate_sums(traced_cell(variant))


@lru_cache(maxsize=256)
def derivative_of(variant: Variant) -> Derivative:
    """The derivative of the lowered cell."""
    return differentiate(lowered_cell(variant))


def is_plain(cell: TracedCell) -> bool:
    """Whether a cell has one stage for all gates, full recurrent weights and no parameters of its own.

    Calls of such cells can use unpacked weights.
    """
    has_own = cell.parameters or cell.is_block_diagonal
    return len(cell.stages) == 1 and cell.x_gates == cell.h_gates == cell.gates and not has_own


STATE_LETTERS = "hcsuvw"
"""Fields of structs name states by their number: h0 and h_n of the first, c0 and c_n of the second."""


def state_letters(num_states: int) -> str:
    """The letters of the states that structs have fields for: at least two."""
    return STATE_LETTERS[: max(2, num_states)]


Result = NewState | Output | StageOperand | ReducedRow | KeptProduct | Saved
"""What a stage computes: a new state, an output that is no state, the operand of a later stage, a row that a later
stage reduces, a product that later stages read, or a value that training saves for backward."""
R = TypeVar("R", bound=Result)


@dataclass(frozen=True, kw_only=True)
class LoweredStage:
    """A stage of a lowered cell: one GEMM and the maths on its results; or reductions and maths, or maths alone.

    It may also be a group of gates whose part from the input belongs to no stage: the group has columns of the input
    GEMM alone. In a cell without stages, such a group has the maths of a step.
    """

    index: int  # among the stages
    gate_names: tuple[str, ...]  # none if it projects
    projects: bool  # whether it is the projection, whose units are those of h
    accumulates_in_place: bool  # whether its GEMM accumulates onto the input's pre-activations
    derivative: StageDerivative  # the gradients that its GEMMs need
    first_x_gate: int  # the number of its first gate in the input weights; any number if it has no columns there
    first_h_gate: int  # the same in the recurrent weights, which the projection follows
    first_grad: int  # the number of distinct gradients of the stages before
    results: tuple[tuple[Result, Expr], ...] = ()  # what is computed after its GEMM, each with its expression
    multiplies: bool = False  # whether it has a GEMM of each step
    gemm_number: int = 0  # among the stages that have a GEMM
    operand_number: int = 0  # among the operands: 0 for the output before the step, from 1 on those of stages
    reductions: tuple[Reduction, ...] = ()  # what it computes instead of a GEMM
    recomputed: tuple[tuple[Saved, Expr], ...] = ()  # saved values that are computed again with it

    @property
    def num_gates(self) -> int:
        """Vectors of columns for each vector of units: one for each gate, or one if it projects."""
        return 1 if self.projects else len(self.gate_names)

    @property
    def has_inputs(self) -> bool:
        """Whether it has columns of the input GEMM."""
        return bool(self.derivative.x_grads)

    @property
    def num_grads(self) -> int:
        """Its distinct gradients."""
        return len(self.derivative.distinct_grads)

    def results_of(self, *kinds: type[R]) -> dict[R, Expr]:
        """Its results of these kinds."""
        return {result: expr for result, expr in self.results if isinstance(result, kinds)}


@lru_cache(maxsize=256)
def lowered_stages(variant: Variant) -> tuple[LoweredStage, ...]:
    """The stages of a cell: GEMMs and reductions.

    Raises:
        NotImplementedError: If a projection is not the last stage, the gates of a stage are not adjacent, or a state is
            needed after it has been replaced.
    """
    cell, derivative = lowered_cell(variant), derivative_of(variant)
    results = _results(cell, derivative)
    recomputed = _recomputed(cell, derivative, results)
    stages: list[LoweredStage] = []
    first_h_gate = first_grad = gemm_number = 0
    for index, stage in enumerate(cell.stages):
        adjacent = stage.projects or cell.h_gates[first_h_gate : first_h_gate + len(stage.gates)] == stage.gates
        if not adjacent or (stage.projects and index < len(cell.stages) - 1):
            raise NotImplementedError(f"a cell in which the weights of stage {index} are not adjacent")
        lowered = LoweredStage(
            index=index, gate_names=stage.gates, projects=stage.projects,
            accumulates_in_place=stage.accumulates_in_place, derivative=derivative.stages[index],
            first_x_gate=cell.x_gates.index(stage.gates[0]) if derivative.stages[index].x_grads else 0,
            first_h_gate=first_h_gate, first_grad=first_grad,
            results=tuple((result, expr) for ready, result, expr in results if ready == index),
            multiplies=stage.multiplies, gemm_number=gemm_number,
            operand_number=gemm_number + (not cell.stages[0].multiplies), reductions=stage.reductions,
            recomputed=tuple((saved, expr) for product, saved, expr in recomputed if product == index),
        )  # fmt: skip
        stages.append(lowered)
        gemm_number += stage.multiplies
        first_h_gate, first_grad = first_h_gate + lowered.num_gates, first_grad + lowered.num_grads
    _check_order(cell, stages)
    return tuple(stages)


@lru_cache(maxsize=256)
def input_only_groups(variant: Variant) -> tuple[LoweredStage, ...]:
    """The gates whose part from the input belongs to no stage, in groups that are adjacent in the input weights."""
    cell, derivative, stages = lowered_cell(variant), derivative_of(variant), lowered_stages(variant)
    results = [] if stages else _results(cell, derivative)
    recomputed = _recomputed(cell, derivative, results)
    groups: list[LoweredStage] = []
    for gates, grads in derivative.inputs.items():
        first_grad = sum(stage.num_grads for stage in (*stages, *groups))
        group = LoweredStage(
            index=len(stages), gate_names=gates, projects=False, accumulates_in_place=False, derivative=grads,
            first_x_gate=cell.x_gates.index(gates[0]), first_h_gate=0, first_grad=first_grad,
            results=tuple(result[1:] for result in results), recomputed=tuple(saved[1:] for saved in recomputed),
        )  # fmt: skip
        groups.append(group)
    return tuple(groups)


def column_groups(stages: Sequence[LoweredStage], inputs: Sequence[LoweredStage]) -> list[LoweredStage]:
    """The stages and groups of the input alone that have a GEMM in each step or gradients of parameters."""
    return [stage for stage in (*stages, *inputs) if stage.multiplies or stage.num_grads]


def input_groups(groups: Sequence[LoweredStage]) -> list[LoweredStage]:
    """Those of :func:`column_groups` that have columns of the input GEMM, in the order of the columns."""
    return sorted((group for group in groups if group.has_inputs), key=lambda group: group.first_x_gate)


def _results(cell: TracedCell, derivative: Derivative) -> list[tuple[int, Result, Expr]]:
    """Everything that a cell computes, each with its stage and its expression."""
    results: list[tuple[int, Result, Expr]] = [
        (stage, NewState(name), new)
        for stage, name, new in zip(_new_state_stages(cell), cell.states, cell.new_states, strict=True)
    ]
    if cell.output is not None:
        results.append((cell.ready_stage(cell.outputs[-1]), Output(), cell.outputs[-1]))
    # What a stage reads from all units is computed in the stage before.
    for index, stage in enumerate(cell.stages[1:]):
        if stage.reductions:
            results += [(index, ReducedRow(index + 1, row), value) for row, value in enumerate(stage.values)]
        else:
            results.append((index, StageOperand(index + 1), stage.operand))
    results = [(index, result, _with_rows(cell, index, expr)) for index, result, expr in results]
    results += _kept_products(cell, results)
    # A saved value is computed once, in the first stage that uses it.
    nodes = [(index, set(walk([expr]))) for index, _, expr in results]
    for number, saved in enumerate(derivative.saved):
        uses = (index for index, used in nodes if _with_rows(cell, index, saved) in used)
        index = min(uses)
        results.append((index, Saved(number), _with_rows(cell, index, saved)))
    kept = {result for _, result, _ in results}
    recomputed = _recomputed(cell, derivative, results)
    return results + [result for result in _kept_products(cell, recomputed) if result[1] not in kept]


def _kept_products(cell: TracedCell, results: Sequence[tuple[int, Result, Expr]]) -> list[tuple[int, Result, Expr]]:
    """The products that results of later stages read, as results of the stages that compute the products."""
    kept: list[tuple[int, Result, Expr]] = []
    for index, stage in enumerate(cell.stages):
        later = set(walk([expr for reader, _, expr in results if reader > index]))
        kept += [(index, KeptProduct(gate), PreH(gate)) for gate in stage.gates if PreH(gate) in later]
    return kept


def _with_rows(cell: TracedCell, index: int, expr: Expr) -> Expr:
    """A stage's expression, changed to read the rows stored for earlier reductions instead of computing them again."""
    rows: dict[Expr, Expr] = {}
    for number, stage in enumerate(cell.stages[: index + 1]):
        if stage.reductions:
            computed = ((row, value) for row, value in enumerate(stage.values) if not isinstance(value, (PreX, PreSum)))
            rows.update({value: ReducedRow(number, row) for row, value in computed})
    return substitute([expr], rows.get)[0] if rows else expr


def _recomputed(
    cell: TracedCell, derivative: Derivative, results: Sequence[tuple[int, Result, Expr]]
) -> list[tuple[int, Saved, Expr]]:
    """The saved values, each with the stage after whose GEMM it is computed again.

    At that point all moments are known, but no rows. So what forward computes after reductions belongs to the GEMM
    before the reductions, or to the maths with which a step begins if it does not begin with a GEMM.
    """
    products = [index for index, stage in enumerate(cell.stages) if not stage.reductions]
    return [
        (max((i for i in products if i <= index), default=0), result, derivative.saved[result.index])
        for index, result, _ in results if isinstance(result, Saved)
    ]  # fmt: skip


def reduced_rows(stages: Sequence[LoweredStage]) -> list[ReducedRow]:
    """The rows that reductions read."""
    return [row for stage in stages for row in stage.results_of(ReducedRow)]


def moments(stages: Sequence[LoweredStage]) -> list[RowMean | RowVariance]:
    """The means and variances."""
    return [leaf for stage in stages for reduction in stage.reductions for leaf in reduction.leaves]


def kept_products(stages: Sequence[LoweredStage]) -> list[KeptProduct]:
    """The products that later stages read."""
    return [kept for stage in stages for kept in stage.results_of(KeptProduct)]


def _new_state_stages(cell: TracedCell) -> list[int]:
    """The stage of each new state: the first that can compute it, but not before the last that reads the old state."""
    stages = [cell.ready_stage(new) for new in cell.new_states]
    own_output = [(cell.ready_stage(output), output) for output in cell.outputs[len(stages) :]]
    while True:
        readers = [*zip(stages, cell.new_states, strict=True), *own_output]
        readers += [(index - 1, value) for index, value in cell.later_values]
        last = [
            max([index, *(reader for reader, expr in readers if State(name) in walk([expr]))])
            for index, name in zip(stages, cell.states, strict=True)
        ]
        # The first state has two buffers: a new value does not overwrite the old one.
        if last[1:] == stages[1:]:
            return stages
        stages[1:] = last[1:]


def _check_order(cell: TracedCell, stages: Sequence[LoweredStage]) -> None:
    """Refuse a cell that needs a state after its stage has replaced it, as stages do with all states but the first."""
    replaced: set[str] = set()
    for stage in stages:
        used = {node.name for node in walk([expr for _, expr in stage.results]) if isinstance(node, State)}
        if used & replaced:
            raise NotImplementedError(f"a cell that needs the old {used & replaced} after it has been replaced")
        replaced |= {result.name for result in stage.results_of(NewState)} - {cell.states[0]}
