"""Trace a cell: run its equations on symbols to get its GEMMs, called stages, and its new states as expressions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fusedrnn.cell.cells import Cell, Variant, make_cell
from fusedrnn.cell.expr import Expr, Leaf
from fusedrnn.cell.leaves import (
    Mask,
    OutputCotangent,
    Parameter,
    ParamScalar,
    ParamVector,
    PreH,
    PreSum,
    PreX,
    RawInput,
    State,
    StateCotangent,
)
from fusedrnn.cell.placement import place_stages
from fusedrnn.cell.stage import Stage
from fusedrnn.cell.symbols import ParameterSymbols, RecurrentProducts, Symbols
from fusedrnn.cell.traversal import substitute, walk
from fusedrnn.lazy import cached_property


@dataclass(frozen=True)
class TracedCell:
    """A cell as expressions: its stages in order, its new states, and then its output if that is not a state.

    Its parameters apart from weights and biases are vectors, with one number for each unit, and scalars. The number of
    heads, which makes recurrent weights block-diagonal, is no part of a traced cell.
    """

    gates: tuple[str, ...]
    states: tuple[str, ...]
    stages: tuple[Stage, ...]
    outputs: tuple[Expr, ...]
    param_vectors: tuple[str, ...] = ()
    param_scalars: tuple[str, ...] = ()
    is_block_diagonal: bool = False
    output: str | None = None  # its name, if it is not a state

    @property
    def accumulates_in_place(self) -> bool:
        """Whether every stage with gates accumulates in place."""
        return all(stage.accumulates_in_place or not stage.gates for stage in self.stages)

    @cached_property
    def input_gates(self) -> tuple[str, ...]:
        """The gates that no stage computes: the input alone gives them."""
        return tuple(gate for gate in self.gates if gate not in self.h_gates)

    @cached_property
    def h_gates(self) -> tuple[str, ...]:
        """The gates with recurrent weights, in the order of their rows."""
        return tuple(gate for gate in self.gates if any(gate in stage.gates for stage in self.stages))

    @cached_property
    def x_gates(self) -> tuple[str, ...]:
        """The gates with a part from the input, in the order of the rows of its weights."""
        read = {node.gate for node in walk([*self.outputs, *self.operands]) if isinstance(node, (PreX, PreSum))}
        return tuple(gate for gate in self.gates if gate in read)

    @cached_property
    def reads_raw_input(self) -> bool:
        """Whether it uses the input itself, not only its products with weights."""
        return RawInput() in walk([*self.outputs, *(stage.operand for stage in self.stages)])

    @property
    def first_state(self) -> str:
        """The first state, which is the output unless the cell has another one."""
        return self.states[0]

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of :attr:`outputs`."""
        return self.states if self.output is None else (*self.states, self.output)

    @property
    def output_cotangents(self) -> tuple[Leaf, ...]:
        """The leaves of the gradients of :attr:`outputs`."""
        states = tuple(map(StateCotangent, self.states))
        return states if self.output is None else (*states, OutputCotangent())

    @property
    def new_states(self) -> tuple[Expr, ...]:
        """The states after a step."""
        return self.outputs[: len(self.states)]

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its parameters apart from weights and biases."""
        return (*map(ParamVector, self.param_vectors), *map(ParamScalar, self.param_scalars))

    @property
    def operands(self) -> tuple[Expr, ...]:
        """The values of all units that the stages after the first one read."""
        return tuple(value for stage in self.stages[1:] for value in stage.values)

    @cached_property
    def later_values(self) -> tuple[tuple[int, Expr], ...]:
        """:attr:`operands`, each with the index of its stage."""
        return tuple((index, value) for index, stage in enumerate(self.stages) if index for value in stage.values)

    @cached_property
    def products(self) -> tuple[Stage, ...]:
        """The stages that have a GEMM."""
        return tuple(stage for stage in self.stages if stage.multiplies)

    @cached_property
    def reduces(self) -> bool:
        """Whether there are means or variances over the units."""
        return any(stage.reductions for stage in self.stages)

    @cached_property
    def masks(self) -> tuple[Mask, ...]:
        """The random masks, sorted by name. Kernels identify a mask by its index here."""
        masks = (node for node in walk([*self.outputs, *self.operands]) if isinstance(node, Mask))
        return tuple(sorted(masks, key=lambda mask: mask.name))

    @cached_property
    def projects(self) -> bool:
        """Whether there is a projection."""
        return any(stage.projects for stage in self.stages)

    def ready_stage(self, node: Expr) -> int:
        """The index of the stage after whose GEMM or reductions a node can be computed."""
        leaves = [leaf for leaf in walk([node]) if isinstance(leaf, Leaf)]
        return max((i for i, stage in enumerate(self.stages) if any(map(stage.computes, leaves))), default=0)


@dataclass(frozen=True)
class Recording:
    """One run of a cell's equations on symbols.

    Attributes:
        products: The recurrent products in the order of the calls.
        result: What the equations returned.
    """

    products: tuple[Stage, ...]
    result: Any

    def equations(self, x: Any, recurrent: Any, s: Any, *parameters: Any) -> Any:
        """The same calls and the same result, without another run of the equations."""
        for product in self.products:
            symbols = recurrent(product.operand)
            for gate in product.gates:
                getattr(symbols, gate)
        return self.result


def record(cell: Cell) -> Recording:
    """Run a cell's equations on symbols.

    Raises:
        AttributeError: If they read a gate or a state that the cell does not have.
    """
    recurrent = RecurrentProducts(cell.gates)
    parameters = [ParameterSymbols(cell)] if cell.vectors or cell.scalars else []
    x, states = Symbols(PreX, cell.gates, set()), Symbols(State, cell.states, set())
    result = cell.equations(x, recurrent, states, *parameters)
    return Recording(recurrent.stages(), result)


def place(cell: Cell, recording: Recording) -> TracedCell:
    """The traced cell of a recording.

    Raises:
        ValueError: If a gate takes part in more than one recurrent product.
    """
    result, stages = recording.result, recording.products
    outputs = result if isinstance(result, tuple) else (result,)
    if cell.output is not None:
        outputs = *outputs[1:], *outputs[:1]
    for gate in cell.gates:
        operands = [repr(stage.operand) for stage in stages if gate in stage.gates]
        if len(operands) > 1:
            raise ValueError(
                f"gate {gate!r} takes part in more than one recurrent product, of {' and of '.join(operands)}: declare "
                "a gate for each; if they have the same weights, give the gates equal rows"
            )
    if all(isinstance(output, Expr) for output in outputs):
        stages, outputs = place_stages(State(cell.states[0]), stages, outputs)
    # A peephole weight has the name of its gate.
    roots = [root for root in (*outputs, *(stage.operand for stage in stages)) if isinstance(root, Expr)]
    peepholes = {node.name for node in walk(roots) if isinstance(node, ParamVector)}
    vectors = cell.vectors or tuple(gate for gate in cell.gates if gate in peepholes)
    traced = TracedCell(cell.gates, cell.states, stages, outputs, vectors, cell.scalars, cell.heads > 1, cell.output)
    _check_masks(traced if all(isinstance(output, Expr) for output in outputs) else None)
    return traced


def _check_masks(traced: TracedCell | None) -> None:
    names = [mask.name for mask in traced.masks] if traced else []
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two masks have the name {repeated!r}, but not the same probability and per=")


@lru_cache(maxsize=64)
def trace(cell: Cell) -> TracedCell:
    """The traced cell; see :func:`record` and :func:`place`. A user cell has been traced when it was made."""
    return vars(cell).get("traced") or place(cell, record(cell))


@lru_cache(maxsize=256)
def traced_cell(variant: Variant) -> TracedCell:
    """The traced cell of a variant."""
    return trace(make_cell(variant))


@lru_cache(maxsize=64)
def fuse_gate_sums(traced: TracedCell) -> TracedCell:
    """Replace ``PreX + PreH`` by ``PreSum`` in each stage whose gates use these two only in that sum.

    The recurrent GEMM of a kernel then accumulates onto the pre-activations from the input. The reset-after GRU is
    unchanged, because its r multiplies ``PreH`` of n alone.
    """
    # The operand of a later stage may use gates too.
    roots = [*traced.outputs, *(value for stage in traced.stages for value in stage.values)]
    stages = []
    for stage in traced.stages:
        sums: dict[Expr, Expr] = {PreX(gate) + PreH(gate): PreSum(gate) for gate in stage.gates}
        fused = substitute(roots, sums.get)
        summands = {kind(gate) for kind in (PreX, PreH) for gate in stage.gates}
        in_place = bool(stage.gates) and summands.isdisjoint(walk(fused))
        roots = fused if in_place else roots
        stages.append(replace(stage, accumulates_in_place=in_place))
    if not any(stage.accumulates_in_place for stage in stages):
        return traced
    outputs, values = roots[: len(traced.outputs)], iter(roots[len(traced.outputs) :])
    stages = [stage.with_values([next(values) for _ in stage.values]) for stage in stages]
    return replace(traced, stages=tuple(stages), outputs=tuple(outputs))
