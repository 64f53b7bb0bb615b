"""A cell's derivative: the gradients of its gates and previous states, and what forward must keep for them.

Everything comes from the traced equations. What the gradients use of the forward pass is either kept in the reserve
or computed again from what is there anyway: the states before and after the step, and whatever else is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fusedrnn.cell.autodiff import vjp
from fusedrnn.cell.expr import Constant, Expr, Leaf, Operation, substitute, walk
from fusedrnn.cell.leaves import (
    NewState,
    OperandCotangent,
    Peephole,
    PreH,
    PreSum,
    PreX,
    Projected,
    Saved,
    State,
    StateCotangent,
)
from fusedrnn.cell.primitives import PRIMITIVES
from fusedrnn.cell.trace import Stage, TracedCell

# Keeping an element means to fetch its cache line, write it and read it again: 12 bytes in float32, 24 in float64,
# at some 8 or 4 operations a byte for a core that is at its peak while it shares the memory with others.
_FLOPS_WORTH_KEEPING = 96


@dataclass(frozen=True)
class StageDerivative:
    """The gradients that one stage's GEMMs need.

    Attributes:
        slots: The distinct gradients of pre-activations, then those of the weights that multiply element by element.
        from_input: The slot of each of the stage's gates' gradient towards the input weights.
        from_state: The slot of each one's gradient towards the recurrent weights; of a projection's result.
        vectors: The slot of each of the cell's element by element weights whose gate is of this stage.
    """

    slots: tuple[Expr, ...]
    from_input: tuple[int, ...]
    from_state: tuple[int, ...]
    vectors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Derivative:
    """The pointwise part of a step's backward pass.

    Attributes:
        kept: What the reserve keeps of each step, in its order.
        recomputed: What backward computes again although forward had it, of what is kept.
        stages: What each stage's GEMMs need; a stage's gradients use the operands' of later stages alone.
        states: The gradient of each previous state, without what comes through the recurrent weights; None for zero.
        names: What these states are called.
    """

    kept: tuple[Expr, ...]
    recomputed: tuple[Expr, ...]
    stages: tuple[StageDerivative, ...]
    states: tuple[Expr | None, ...]
    names: tuple[str, ...]

    def final_stage(self, state: str) -> int:
        """The stage, of which backward goes through the last first, that gives a previous state's gradient.

        It is the first that can, and after which no other needs what has reached the new state.
        """
        gradient = dict(zip(self.names, self.states, strict=True))[state]
        used = [] if gradient is None else walk([gradient])
        stages = [node.stage - 1 for node in used if isinstance(node, OperandCotangent)]
        for number, stage in enumerate(self.stages):
            if StateCotangent(state) in walk(stage.slots):
                stages.append(number)
        return min(stages, default=len(self.stages) - 1)

    def __str__(self) -> str:
        kept = ", ".join(describe(node) for node in self.kept) or "no more than the states"
        again = ", ".join(describe(node, self.kept) for node in self.recomputed)
        return f"keeps {kept}" + (f"; recomputes {again}" if again else "")


@lru_cache(maxsize=64)
def differentiate(cell: TracedCell) -> Derivative:
    """The derivative of a cell whose first stage multiplies its first state.

    Raises:
        NotImplementedError: If that has another operand, or the cell has a gate that leads nowhere.
    """
    if cell.stages[0].operand != State(cell.states[0]):
        raise NotImplementedError("the derivative of a cell whose recurrent GEMM has another operand than its output")
    roots = [*cell.outputs, *cell.operands]
    seeds: list[Expr] = [StateCotangent(name) for name in cell.states]
    seeds += [OperandCotangent(number) for number in range(1, len(cell.stages))]
    reaching = vjp(roots, seeds)
    found = [_of_stage(cell, stage, reaching) for stage in cell.stages]
    states = [reaching.get(State(name)) for name in cell.states]
    wanted = [slot for stage in found for slot in stage.slots]
    kept, recomputed = _choose(cell, [*wanted, *(state for state in states if state is not None)])
    places: dict[Expr, Expr] = {after: NewState(n) for n, after in zip(cell.states, cell.outputs, strict=True)}
    places.update({node: Saved(index) for index, node in enumerate(kept)})
    return Derivative(
        kept=tuple(kept),
        recomputed=tuple(substitute(recomputed, places.get)),
        stages=tuple(replace(one, slots=tuple(substitute(one.slots, places.get))) for one in found),
        states=tuple(None if state is None else substitute([state], places.get)[0] for state in states),
        names=cell.states,
    )


def _of_stage(cell: TracedCell, stage: Stage, reaching: Mapping[Leaf, Expr]) -> StageDerivative:
    """What reaches a stage's leaves."""
    if stage.projects:
        return StageDerivative((reaching[Projected()],), (), (0,))
    kinds = (PreSum, PreSum) if stage.merged else (PreX, PreH)
    if unused := [gate for gate in stage.gates for kind in kinds if kind(gate) not in reaching]:
        raise NotImplementedError(f"the derivative of a cell that does not use both parts of gate {unused[0]}")
    by_gate = [[reaching[kind(gate)] for gate in stage.gates] for kind in kinds]
    vectors = [reaching[Peephole(gate)] for gate in cell.peepholes if gate in stage.gates]
    slots = list(dict.fromkeys(by_gate[0] + by_gate[1] + vectors))
    places = (tuple(slots.index(gradient) for gradient in part) for part in (*by_gate, vectors))
    return StageDerivative(tuple(slots), *places)


def _choose(cell: TracedCell, wanted: list[Expr]) -> tuple[list[Expr], list[Expr]]:
    """What of the forward pass to keep for the ``wanted`` gradients, and what to compute again."""
    roots = [*cell.outputs, *cell.operands]
    forward = set(walk(roots))
    at_hand: dict[Expr, int] = dict.fromkeys(cell.outputs, 0)
    at_hand.update({State(name): 0 for name in cell.states})
    at_hand.update({Peephole(gate): 0 for gate in cell.peepholes})
    needed = {arg for node in walk(wanted) if node not in forward for arg in node.args if arg in forward}
    needed.update(node for node in wanted if node in forward)
    kept, recomputed = [], []
    for node in walk(roots):  # arguments first: what is kept for itself is there for what is made of it
        if node in needed and node not in at_hand and not isinstance(node, Constant):
            cost = _cost(node, at_hand)
            if cost > _FLOPS_WORTH_KEEPING:
                kept.append(node)
                at_hand[node] = 0
            else:
                recomputed.append(node)
    return kept, recomputed


def _cost(node: Expr, at_hand: Mapping[Expr, int]) -> int:
    """Operations to compute a node from what is at hand; more than is worth it if that is not possible."""
    if node in at_hand or isinstance(node, Constant):
        return 0
    if not isinstance(node, Operation):
        return _FLOPS_WORTH_KEEPING + 1
    return PRIMITIVES[node.op].flops + sum(_cost(arg, at_hand) for arg in node.args)


def describe(node: Expr, kept: Sequence[Expr] = ()) -> str:
    """A forward expression for people, such as ``sigmoid(x.r + h.r)`` or ``tanh(new c)``."""
    match node:
        case Saved(index):
            return describe(kept[index], kept)
        case PreX(gate):
            return f"x.{gate}"
        case PreH(gate):
            return f"h.{gate}"
        case PreSum(name) | Peephole(name) | State(name):
            return name
        case NewState(name):
            return f"new {name}"
        case Projected():
            return "h"
        case Constant(value):
            return f"{value:g}"
    assert isinstance(node, Operation)
    inside = [describe(arg, kept) for arg in node.args]
    sign = {"add": " + ", "sub": " - ", "mul": "·"}.get(node.op)
    if sign is None:
        return f"{node.op}({', '.join(inside)})"
    sums = [isinstance(arg, Operation) and arg.op in ("add", "sub") for arg in node.args]
    return sign.join(f"({text})" if is_sum else text for is_sum, text in zip(sums, inside, strict=True))
