"""The derivatives of expressions, and of a cell: the gradients of its gates and previous states.

A cell's derivative follows from the traced equations. A forward value that the gradients use is either saved in the
reserve or recomputed from the states before and after the step and from what is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from fusedrnn.cell.expr import Constant, Expr, Leaf, Operation, substitute, walk
from fusedrnn.cell.leaves import (
    Mask,
    MeanCotangent,
    NewState,
    OperandCotangent,
    OutputCotangent,
    Parameter,
    ParamScalar,
    ParamVector,
    PreH,
    PreSum,
    PreX,
    Projected,
    RawInput,
    RowMean,
    RowVariance,
    Saved,
    State,
    StateCotangent,
    VarianceCotangent,
)
from fusedrnn.cell.primitives import PRIMITIVES
from fusedrnn.cell.stage import Stage
from fusedrnn.cell.trace import TracedCell

# To save an element is to fetch its cache line, write it and read it again: 12 bytes in float32, 24 in float64. In the
# same time a core at its peak that shares the memory bandwidth with others does 8 or 4 operations for each byte.
_MAX_RECOMPUTE_FLOPS = 96
# The gradients of what a stage reads, which earlier stages use.
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
        distinct_grads: The distinct gradients of the pre-activations (of a projection, of its result), then those of
            the parameters. The fields below index it.
        x_grads: For each gate of the stage, its gradient for the input weights.
        h_grads: For each gate of the stage, its gradient for the recurrent weights; the result's for a projection.
        param_grads: For each parameter whose gradient is computed with this stage, the gradient.
        moment_grads: Of reductions, for each mean and variance what a unit adds to its gradient.
    """

    distinct_grads: tuple[Expr, ...]
    x_grads: tuple[int, ...]
    h_grads: tuple[int, ...]
    param_grads: Mapping[Parameter, int] = field(default_factory=dict)
    moment_grads: tuple[Expr, ...] = ()

    @property
    def grads(self) -> tuple[Expr, ...]:
        """All gradients that are computed with the stage, but those of states."""
        return (*self.distinct_grads, *self.moment_grads)


@dataclass(frozen=True)
class Derivative:
    """The elementwise part of a step's backward pass.

    Attributes:
        saved: What forward saves of each step, in the order of the reserve.
        recomputed: The forward values that backward recomputes.
        stages: The gradients of each stage; they use the cotangents of later stages only.
        inputs: The gradients of the gates that the input alone gives; of a cell without stages, of its parameters too.
        raw_input: The gradient of the input itself beside what comes through weights; None if that is zero.
        inputs_stage: The index of the stage with which these are computed; 0 if there are no stages.
        state_grads: The gradient of each previous state by its name, without what comes through the recurrent weights;
            none if that is zero.
    """

    saved: tuple[Expr, ...]
    recomputed: tuple[Expr, ...]
    stages: tuple[StageDerivative, ...]
    inputs: StageDerivative
    raw_input: Expr | None
    inputs_stage: int
    state_grads: Mapping[str, Expr]

    def final_stage(self, state: str) -> int:
        """The index of the stage in which backward computes the gradient of a previous state.

        Backward visits the last stage first. This is the first stage visited that has all operand cotangents the
        gradient uses, and after which no stage reads the new state's cotangent, which the gradient then overwrites.
        """
        gradient = [self.state_grads[state]] if state in self.state_grads else []
        stages = [node.stage - 1 for node in walk(gradient) if isinstance(node, _LATER)]
        cotangent = StateCotangent(state)
        stages += [index for index, stage in enumerate(self.stages) if cotangent in walk(stage.grads)]
        raw_input = () if self.raw_input is None else (self.raw_input,)
        stages += [self.inputs_stage] if cotangent in walk([*self.inputs.distinct_grads, *raw_input]) else []
        return min(stages, default=max(0, len(self.stages) - 1))

    def __str__(self) -> str:
        saved = ", ".join(describe(node) for node in self.saved) or "no more than the states"
        recomputed = ", ".join(describe(node, self.saved) for node in self.recomputed)
        return f"saves {saved}" + (f"; recomputes {recomputed}" if recomputed else "")


@lru_cache(maxsize=64)
def differentiate(cell: TracedCell) -> Derivative:
    """Differentiate a cell whose first stage, if there are any, multiplies its first state.

    Raises:
        NotImplementedError: If the first stage has another operand, or the new states do not depend on some gate.
    """
    if cell.stages and cell.stages[0].operand != State(cell.states[0]):
        raise NotImplementedError("the derivative of a cell whose recurrent GEMM has another operand than its output")
    cotangents: list[Expr] = output_cotangents(cell)
    for index, stage in enumerate(cell.stages[1:], 1):
        cotangents += value_cotangents(index, stage)
    grads = vjp([*cell.outputs, *cell.operands], cotangents)
    stages = [_differentiate_stage(cell, stage, grads) for stage in cell.stages]
    inputs, inputs_stage = _differentiate_inputs(cell, grads)
    raw_input = [grads[RawInput()]] if RawInput() in grads else []
    state_grads = {name: grads[State(name)] for name in cell.states if State(name) in grads}
    targets = [grad for stage in [*stages, inputs] for grad in stage.grads]
    available = available_leaves(cell)
    saved, recomputed = _choose(cell, [*targets, *raw_input, *state_grads.values()], set(available))
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
        inputs=replace(inputs, distinct_grads=of_available(inputs.distinct_grads)),
        raw_input=next(iter(of_available(raw_input)), None),
        inputs_stage=inputs_stage,
        state_grads=dict(zip(state_grads, of_available(state_grads.values()), strict=True)),
    )


def output_cotangents(cell: TracedCell) -> list[Expr]:
    """The gradients of the new states, and of the output if it is no state, by their leaves."""
    return [*map(StateCotangent, cell.states), *[OutputCotangent()] * (cell.output is not None)]


def value_cotangents(index: int, stage: Stage) -> list[Expr]:
    """The gradients of what a stage reads of all units, by the leaves of its cotangents."""
    if not stage.reductions:
        return [OperandCotangent(index)]
    return [cotangent for reduction in stage.reductions for cotangent in reduction.value_cotangents()]


def available_leaves(cell: TracedCell) -> dict[Expr, Expr]:
    """What backward reads of a step although forward does not save it, each with its leaf in backward."""
    available: dict[Expr, Expr] = {new: NewState(name) for name, new in zip(cell.states, cell.new_states, strict=True)}
    moments = [leaf for stage in cell.stages for reduction in stage.reductions for leaf in reduction.leaves]
    return available | {leaf: leaf for leaf in [*map(State, cell.states), *cell.parameters, *moments]}


def _differentiate_stage(cell: TracedCell, stage: Stage, grads: Mapping[Leaf, Expr]) -> StageDerivative:
    """The gradients of a stage's leaves, each distinct one once."""
    if stage.projects:
        return StageDerivative((grads[Projected()],), (), (0,))
    if stage.reductions:
        moments = [leaf for reduction in stage.reductions for leaf in reduction.leaves]
        return StageDerivative((), (), (), moment_grads=tuple(grads.get(leaf, Constant(0.0)) for leaf in moments))
    kinds = (PreSum, PreSum) if stage.accumulates_in_place else (PreX, PreH)
    if unused := [gate for gate in stage.gates for kind in kinds if kind(gate) not in grads]:
        raise NotImplementedError(f"the derivative of a cell that does not use both parts of gate {unused[0]}")
    x_grads, h_grads = ([grads[kind(gate)] for gate in stage.gates] for kind in kinds)
    param_grads = {
        leaf: grads[leaf] for leaf in cell.parameters if cell.stages[_last_stage(cell, [grads[leaf]])] is stage
    }
    distinct = list(dict.fromkeys([*x_grads, *h_grads, *param_grads.values()]))
    x_indices, h_indices = (tuple(map(distinct.index, group)) for group in (x_grads, h_grads))
    by_leaf = {leaf: distinct.index(grad) for leaf, grad in param_grads.items()}
    return StageDerivative(tuple(distinct), x_indices, h_indices, by_leaf)


def _differentiate_inputs(cell: TracedCell, grads: Mapping[Leaf, Expr]) -> tuple[StageDerivative, int]:
    """The gradients of the gates that the input alone gives, and the stage with which they are computed."""
    if unused := [gate for gate in cell.input_gates if PreX(gate) not in grads]:
        raise NotImplementedError(f"the derivative of a cell that does not use gate {unused[0]}")
    x_grads = [grads[PreX(gate)] for gate in cell.input_gates]
    param_grads = {} if cell.stages else {leaf: grads[leaf] for leaf in cell.parameters}
    distinct = list(dict.fromkeys([*x_grads, *param_grads.values()]))
    by_leaf = {leaf: distinct.index(grad) for leaf, grad in param_grads.items()}
    raw_input = [grads[RawInput()]] if RawInput() in grads else []
    inputs = StageDerivative(tuple(distinct), tuple(map(distinct.index, x_grads)), (), by_leaf)
    return inputs, _last_stage(cell, [*x_grads, *raw_input])


def _last_stage(cell: TracedCell, grads: Sequence[Expr]) -> int:
    """The index of the last stage that has gates and can compute these gradients; 0 if there are no stages."""
    gate_stages = [index for index, stage in enumerate(cell.stages) if stage.gates] or [0]
    limit = min([node.stage - 1 for node in walk(grads) if isinstance(node, _LATER)] + gate_stages[-1:])
    return max(index for index in gate_stages if index <= limit)


def _choose(cell: TracedCell, targets: list[Expr], available: set[Expr]) -> tuple[list[Expr], list[Expr]]:
    """The forward values to save for the gradients ``targets``, and those to recompute."""
    roots = [*cell.outputs, *cell.operands]
    forward = set(walk(roots))
    needed = {arg for node in walk(targets) if node not in forward for arg in node.args if arg in forward}
    needed.update(node for node in targets if node in forward)
    saved, recomputed = [], []
    for node in walk(roots):  # arguments first: a value that is saved is available to those computed from it
        if node in needed and node not in available and not isinstance(node, Constant):
            if _recompute_flops(node, available) > _MAX_RECOMPUTE_FLOPS:
                saved.append(node)
                available.add(node)
            else:
                recomputed.append(node)
    return saved, recomputed


def _recompute_flops(node: Expr, available: set[Expr]) -> int:
    """Operations to compute a node from what is available; more than the limit if that is not possible."""
    if node in available or isinstance(node, Constant):
        return 0
    if not isinstance(node, Operation):
        return _MAX_RECOMPUTE_FLOPS + 1
    return PRIMITIVES[node.op].flops + sum(_recompute_flops(arg, available) for arg in node.args)


def describe(node: Expr, saved: Sequence[Expr] = ()) -> str:
    """A forward expression as text, such as ``sigmoid(x.r + h.r)`` or ``tanh(new c)``."""
    match node:
        case Saved(index):
            return describe(saved[index], saved)
        case PreX(gate):
            return f"x.{gate}"
        case PreH(gate):
            return f"h.{gate}"
        case PreSum(name) | ParamVector(name) | ParamScalar(name) | State(name):
            return name
        case NewState(name):
            return f"new {name}"
        case Projected():
            return "h"
        case RawInput():
            return "x.raw"
        case RowMean(stage, index):
            return f"mean {stage + 1}.{index + 1}"
        case RowVariance(stage, index):
            return f"variance {stage + 1}.{index + 1}"
        case Mask(name):
            return f"mask {name}"
        case Constant(value):
            return f"{value:g}"
    assert isinstance(node, Operation)
    args = [describe(arg, saved) for arg in node.args]
    infix = {"add": " + ", "sub": " - ", "mul": "·"}.get(node.op)
    if infix is None:
        return f"{node.op}({', '.join(args)})"
    sums = [isinstance(arg, Operation) and arg.op in ("add", "sub") for arg in node.args]
    return infix.join(f"({text})" if is_sum else text for is_sum, text in zip(sums, args, strict=True))
