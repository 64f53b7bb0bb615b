"""The derivatives of expressions, and of a cell: the gradients of its gates and previous states.

A cell's derivative follows from the traced equations. A forward value that the gradients use is either saved in the
reserve, or recomputed from saved values and from the states before and after the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from fusedrnn.cell.describe import describe
from fusedrnn.cell.expr import Constant, Expr, Leaf, Operation
from fusedrnn.cell.leaves import (
    MeanCotangent,
    NewState,
    OperandCotangent,
    Parameter,
    PreH,
    PreSum,
    PreX,
    Projected,
    RawInput,
    Saved,
    State,
    StateCotangent,
    VarianceCotangent,
)
from fusedrnn.cell.primitives import PRIMITIVES
from fusedrnn.cell.saved_values import choose_saved
from fusedrnn.cell.stage import Stage
from fusedrnn.cell.trace import TracedCell
from fusedrnn.cell.traversal import substitute, walk

# The gradients of a stage's inputs, which earlier stages use.
_LATER = OperandCotangent, MeanCotangent, VarianceCotangent


def vjp(roots: Sequence[Expr], cotangents: Sequence[Expr]) -> dict[Leaf, Expr]:
    """The cotangent of each leaf that ``roots`` depend on, given the cotangents of ``roots``, in reverse mode.

    Raises:
        NotImplementedError: If an operation has no derivative.
    """
    accumulated: dict[Expr, Expr] = {}

    def accumulate(node: Expr, cotangent: Expr) -> None:
        accumulated[node] = accumulated[node] + cotangent if node in accumulated else cotangent

    for root, cotangent in zip(roots, cotangents, strict=True):
        accumulate(root, cotangent)
    for node in reversed(list(walk(roots))):
        if isinstance(node, Operation) and node in accumulated:
            primitive = PRIMITIVES.get(node.op)
            if primitive is None or primitive.vjp is None:
                raise NotImplementedError(f"the derivative of {node.op!r}")
            for arg, share in zip(node.args, primitive.vjp(accumulated[node], node, *node.args), strict=True):
                if share is not None and not isinstance(arg, Constant):
                    accumulate(arg, share)
    return {node: cotangent for node, cotangent in accumulated.items() if isinstance(node, Leaf)}


@dataclass(frozen=True)
class StageDerivative:
    """The gradients that one stage's GEMMs need.

    Attributes:
        distinct_grads: The distinct gradients of the pre-activations (for a projection, of its result), then those of
            the parameters. The next three fields are indices of it.
        x_grads: For each gate of the stage, its gradient for the input weights; none where
            :attr:`Derivative.inputs` has them.
        h_grads: For each gate of the stage, its gradient for the recurrent weights; for a projection, that of its
            result.
        param_grads: For each parameter whose gradient is computed with this stage, the gradient.
        moment_grads: In a stage of reductions, for each mean and variance, what a unit adds to its gradient.
    """

    distinct_grads: tuple[Expr, ...]
    x_grads: tuple[int, ...]
    h_grads: tuple[int, ...]
    param_grads: Mapping[Parameter, int] = field(default_factory=dict)
    moment_grads: tuple[Expr, ...] = ()

    @property
    def grads(self) -> tuple[Expr, ...]:
        """All gradients that are computed with the stage, except those of states."""
        return (*self.distinct_grads, *self.moment_grads)


@dataclass(frozen=True)
class Derivative:
    """The elementwise part of a step's backward pass.

    Attributes:
        saved: What forward saves of each step, in the order of the reserve.
        recomputed: The forward values that backward recomputes.
        stages: The gradients of each stage; they use the cotangents of later stages only.
        inputs: The gradients for the input weights that no stage has, by groups of gates that are adjacent in these
            weights: of gates that the input alone gives, and of stages that have a gate without a part from the input
            or cannot compute these gradients yet. In a cell without stages, also those of its parameters.
        raw_input: The gradient of the input itself, without what comes through weights; None if that is zero.
        inputs_stage: The index of the stage with which the two above are computed; 0 if there are no stages.
        state_grads: The gradient of each previous state by its name, without what comes through the recurrent weights;
            no entry if that is zero.
    """

    saved: tuple[Expr, ...]
    recomputed: tuple[Expr, ...]
    stages: tuple[StageDerivative, ...]
    inputs: Mapping[tuple[str, ...], StageDerivative]
    raw_input: Expr | None
    inputs_stage: int
    state_grads: Mapping[str, Expr]

    def final_stage(self, state: str) -> int:
        """The index of the stage in which backward computes the gradient of a previous state.

        Backward visits the last stage first. The gradient overwrites the new state's cotangent. So it is computed in
        the first stage visited that has all operand cotangents it uses, and after which no stage and no gradient of
        another state reads that cotangent.
        """
        readers = [state]
        for name in readers:
            cotangent = StateCotangent(name)
            reading = (other for other, gradient in self.state_grads.items() if cotangent in walk([gradient]))
            readers += [other for other in reading if other not in readers]
        return min(map(self._own_final_stage, readers))

    def _own_final_stage(self, state: str) -> int:
        """:meth:`final_stage`, but ignoring the gradients of other states."""
        gradient = [self.state_grads[state]] if state in self.state_grads else []
        stages = [node.stage - 1 for node in walk(gradient) if isinstance(node, _LATER)]
        cotangent = StateCotangent(state)
        stages += [index for index, stage in enumerate(self.stages) if cotangent in walk(stage.grads)]
        raw_input = () if self.raw_input is None else (self.raw_input,)
        inputs = [grad for group in self.inputs.values() for grad in group.distinct_grads]
        stages += [self.inputs_stage] if cotangent in walk([*inputs, *raw_input]) else []
        return min(stages, default=max(0, len(self.stages) - 1))

    def __str__(self) -> str:
        saved = ", ".join(describe(node) for node in self.saved) or "no more than the states"
        recomputed = ", ".join(describe(node, self.saved) for node in self.recomputed)
        return f"saves {saved}" + (f"; recomputes {recomputed}" if recomputed else "")


@lru_cache(maxsize=64)
def differentiate(cell: TracedCell) -> Derivative:
    """Differentiate a cell.

    Raises:
        NotImplementedError: If the new states do not depend on some gate.
    """
    cotangents: list[Expr] = [*cell.output_cotangents]
    for index, stage in enumerate(cell.stages[1:], 1):
        cotangents += value_cotangents(index, stage)
    grads = vjp([*cell.outputs, *cell.operands], cotangents)
    _check_used(cell, grads)
    stages = [_differentiate_stage(cell, index, grads) for index in range(len(cell.stages))]
    inputs, inputs_stage = _differentiate_inputs(cell, grads)
    raw_input = [grads[RawInput()]] if RawInput() in grads else []
    state_grads = {name: grads[State(name)] for name in cell.states if State(name) in grads}
    targets = [grad for stage in [*stages, *inputs.values()] for grad in stage.grads]
    available = available_leaves(cell)
    saved, recomputed = choose_saved(cell, [*targets, *raw_input, *state_grads.values()], set(available))
    available.update({node: Saved(index) for index, node in enumerate(saved)})

    def of_available(exprs: Iterable[Expr]) -> tuple[Expr, ...]:
        return tuple(substitute(tuple(exprs), available.get))

    return Derivative(
        saved=tuple(saved),
        recomputed=of_available(recomputed),
        stages=tuple(
            replace(
                stage, distinct_grads=of_available(stage.distinct_grads), moment_grads=of_available(stage.moment_grads)
            )
            for stage in stages
        ),
        inputs={
            gates: replace(group, distinct_grads=of_available(group.distinct_grads)) for gates, group in inputs.items()
        },
        raw_input=next(iter(of_available(raw_input)), None),
        inputs_stage=inputs_stage,
        state_grads=dict(zip(state_grads, of_available(state_grads.values()), strict=True)),
    )


def _check_used(cell: TracedCell, grads: Mapping[Leaf, Expr]) -> None:
    """Refuse a cell whose new states do not depend on some gate."""
    sums = {gate for stage in cell.stages if stage.accumulates_in_place for gate in stage.gates}
    kinds = (PreX, cell.x_gates), (PreH, cell.h_gates)
    leaves: list[Leaf] = [PreSum(gate) if gate in sums else kind(gate) for kind, gates in kinds for gate in gates]
    if unused := [leaf for leaf in leaves if leaf not in grads]:
        raise NotImplementedError(f"the new states depend on {unused[0]!r} through comparisons alone, if at all")


def value_cotangents(index: int, stage: Stage) -> list[Expr]:
    """The gradients of the values of all units that a stage reads, in leaves for its cotangents."""
    if not stage.reductions:
        return [OperandCotangent(index)]
    return [cotangent for reduction in stage.reductions for cotangent in reduction.value_cotangents()]


def available_leaves(cell: TracedCell) -> dict[Expr, Expr]:
    """What backward can read of a step although forward does not save it, each with its leaf in backward."""
    available: dict[Expr, Expr] = {new: NewState(name) for name, new in zip(cell.states, cell.new_states, strict=True)}
    moments = [leaf for stage in cell.stages for reduction in stage.reductions for leaf in reduction.leaves]
    return available | {leaf: leaf for leaf in [*map(State, cell.states), *cell.parameters, *moments]}


def _differentiate_stage(cell: TracedCell, index: int, grads: Mapping[Leaf, Expr]) -> StageDerivative:
    """The gradients of a stage's leaves, without duplicates."""
    stage = cell.stages[index]
    if stage.projects:
        return StageDerivative((grads[Projected()],), (), (0,))
    if stage.reductions:
        moments = [leaf for reduction in stage.reductions for leaf in reduction.leaves]
        return StageDerivative((), (), (), moment_grads=tuple(grads.get(leaf, Constant(0.0)) for leaf in moments))
    kind = PreSum if stage.accumulates_in_place else PreH
    h_grads = [grads[kind(gate)] for gate in stage.gates]
    x_grads = _input_gradients(cell, index, grads)
    param_grads = {leaf: grads[leaf] for leaf in cell.parameters if _last_stage(cell, [grads[leaf]]) == index}
    distinct = list(dict.fromkeys([*x_grads, *h_grads, *param_grads.values()]))
    x_indices, h_indices = (tuple(map(distinct.index, group)) for group in (x_grads, h_grads))
    by_leaf = {leaf: distinct.index(grad) for leaf, grad in param_grads.items()}
    return StageDerivative(tuple(distinct), x_indices, h_indices, by_leaf)


def _input_gradients(cell: TracedCell, index: int, grads: Mapping[Leaf, Expr]) -> list[Expr]:
    """The gradients of a stage's gates for the input weights; none unless it can compute them already for all gates."""
    stage = cell.stages[index]
    x_grads = [grads[PreSum(gate) if stage.accumulates_in_place else PreX(gate)] for gate in _with_inputs(cell, stage)]
    return x_grads if len(x_grads) == len(stage.gates) and _last_stage(cell, x_grads) >= index else []


def _with_inputs(cell: TracedCell, stage: Stage) -> list[str]:
    """The gates of a stage that have a part from the input."""
    return [gate for gate in stage.gates if gate in cell.x_gates]


def _differentiate_inputs(
    cell: TracedCell, grads: Mapping[Leaf, Expr]
) -> tuple[dict[tuple[str, ...], StageDerivative], int]:
    """The gradients for the input weights that no stage has, and the stage with which they are computed."""
    stages = range(len(cell.stages))
    of_stages = {gate for i in stages if _input_gradients(cell, i, grads) for gate in cell.stages[i].gates}
    groups: list[list[str]] = [[]]
    for gate in cell.x_gates:
        if gate in of_stages:
            groups.append([])
        else:
            groups[-1].append(gate)
    x_grads = {gate: grads[PreX(gate)] for group in groups for gate in group}
    param_grads = {} if cell.stages else {leaf: grads[leaf] for leaf in cell.parameters}
    inputs = {tuple(group): _differentiate_group([x_grads[gate] for gate in group], param_grads) for group in groups}
    inputs.pop((), None)
    raw_input = [grads[RawInput()]] if RawInput() in grads else []
    return inputs, _last_stage(cell, [*x_grads.values(), *raw_input])


def _differentiate_group(x_grads: Sequence[Expr], param_grads: Mapping[Parameter, Expr]) -> StageDerivative:
    """The gradients of some gates for the input weights, and those of parameters."""
    distinct = list(dict.fromkeys([*x_grads, *param_grads.values()]))
    by_leaf = {leaf: distinct.index(grad) for leaf, grad in param_grads.items()}
    return StageDerivative(tuple(distinct), tuple(map(distinct.index, x_grads)), (), by_leaf)


def _last_stage(cell: TracedCell, grads: Sequence[Expr]) -> int:
    """The index of the last stage that can compute these gradients: the first one, or one that has gates."""
    stages = [0, *(index for index, stage in enumerate(cell.stages) if stage.gates)]
    limit = min([node.stage - 1 for node in walk(grads) if isinstance(node, _LATER)] + stages[-1:])
    return max(index for index in stages if index <= limit)
