"""A cell's derivative: the gradients of its gates and previous states, and what forward must keep for them.

Everything comes from the traced equations. What the gradients use of the forward pass is either kept in the reserve
or computed again from what is there anyway: the states before and after the step, and whatever else is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fusedrnn.symbolic import Expr, TracedCell, gradients, leaf, substitute, walk

# Floating-point operations for an element, as the kernels do them; what is not named takes one.
_FLOPS = {"sigmoid": 50, "tanh": 45}
# Keeping an element means to fetch its cache line, write it and read it again: 12 bytes in float32, 24 in float64,
# at some 8 or 4 operations a byte for a core that is at its peak while it shares the memory with others.
_FLOPS_WORTH_KEEPING = 96


@dataclass(frozen=True)
class Derivative:
    """The pointwise part of a step's backward pass.

    Expressions have the leaves ``("gradient", state)`` for what reaches a new state, ``("state", s)`` and
    ``("after", s)`` for a state before and after the step, and ``("kept", str(place))`` for ``kept[place]``.

    Attributes:
        kept: What the reserve keeps of each step, in its order.
        recomputed: What backward computes again although forward had it, of what is kept.
        slots: The distinct gradients of pre-activations.
        from_input: The slot of each gate's gradient towards the input weights.
        from_state: The slot of each gate's gradient towards the recurrent weights.
        states: The gradient of each previous state, without what comes through the recurrent weights; None for zero.
    """

    kept: tuple[Expr, ...]
    recomputed: tuple[Expr, ...]
    slots: tuple[Expr, ...]
    from_input: tuple[int, ...]
    from_state: tuple[int, ...]
    states: tuple[Expr | None, ...]

    def __str__(self) -> str:
        kept = ", ".join(describe(node) for node in self.kept) or "no more than the states"
        again = ", ".join(describe(node, self.kept) for node in self.recomputed)
        return f"keeps {kept}" + (f"; recomputes {again}" if again else "")


@lru_cache(maxsize=64)
def differentiate(cell: TracedCell) -> Derivative:
    """The derivative of a cell of one stage, whose operand is its first state.

    Raises:
        NotImplementedError: If the cell has more stages, or another operand, or a gate that leads nowhere.
    """
    if len(cell.stages) != 1:
        raise NotImplementedError("the derivative of a cell of more than one recurrent GEMM a step")
    if cell.stages[0].operand != leaf("state", cell.states[0]):
        raise NotImplementedError("the derivative of a cell whose recurrent GEMM has another operand than its output")
    reaching = gradients(cell.outputs, [leaf("gradient", name) for name in cell.states])
    kinds = ("sum", "sum") if cell.merged else ("x", "h")
    if unused := [gate for gate in cell.gates for kind in kinds if (kind, gate) not in reaching]:
        raise NotImplementedError(f"the derivative of a cell that does not use both parts of gate {unused[0]}")
    by_gate = [[reaching[kind, gate] for gate in cell.gates] for kind in kinds]
    states = [reaching.get(("state", name)) for name in cell.states]
    slots = list(dict.fromkeys(by_gate[0] + by_gate[1]))
    kept, recomputed = _choose(cell, [*slots, *(state for state in states if state is not None)])
    places: dict[Expr, Expr] = {after: leaf("after", n) for n, after in zip(cell.states, cell.outputs, strict=True)}
    places.update({node: leaf("kept", str(place)) for place, node in enumerate(kept)})
    return Derivative(
        kept=tuple(kept),
        recomputed=tuple(substitute(recomputed, places.get)),
        slots=tuple(substitute(slots, places.get)),
        from_input=tuple(slots.index(gradient) for gradient in by_gate[0]),
        from_state=tuple(slots.index(gradient) for gradient in by_gate[1]),
        states=tuple(None if state is None else substitute([state], places.get)[0] for state in states),
    )


def _choose(cell: TracedCell, wanted: list[Expr]) -> tuple[list[Expr], list[Expr]]:
    """What of the forward pass to keep for the ``wanted`` gradients, and what to compute again."""
    forward = set(walk(cell.outputs))
    at_hand: dict[Expr, int] = dict.fromkeys(cell.outputs, 0)
    at_hand.update({leaf("state", name): 0 for name in cell.states})
    needed = {arg for node in walk(wanted) if node not in forward for arg in node.args if arg in forward}
    kept, recomputed = [], []
    for node in walk(cell.outputs):  # arguments first: what is kept for itself is there for what is made of it
        if node in needed and node not in at_hand and node.op != "const":
            cost = _cost(node, at_hand)
            if cost > _FLOPS_WORTH_KEEPING:
                kept.append(node)
                at_hand[node] = 0
            else:
                recomputed.append(node)
    return kept, recomputed


def _cost(node: Expr, at_hand: Mapping[Expr, int]) -> int:
    """Operations to compute a node from what is at hand; more than is worth it if that is not possible."""
    if node in at_hand or node.op == "const":
        return 0
    if node.op == "leaf":
        return _FLOPS_WORTH_KEEPING + 1
    return _FLOPS.get(node.op, 1) + sum(_cost(arg, at_hand) for arg in node.args)


def describe(node: Expr, kept: Sequence[Expr] = ()) -> str:
    """A forward expression for people, such as ``sigmoid(x.r + h.r)`` or ``tanh(new c)``."""
    if node.op == "leaf":
        kind, name = node.leaf
        if kind == "kept":
            return describe(kept[int(name)], kept)
        return {"x": f"x.{name}", "h": f"h.{name}", "after": f"new {name}"}.get(kind, name)
    if node.op == "const":
        return f"{node.value:g}"
    inside = [describe(arg, kept) for arg in node.args]
    sign = {"add": " + ", "sub": " - ", "mul": "·"}.get(node.op)
    if sign is None:
        return f"{node.op}({', '.join(inside)})"
    terms = zip(node.args, inside, strict=True)
    return sign.join(f"({text})" if arg.op in ("add", "sub") else text for arg, text in terms)
