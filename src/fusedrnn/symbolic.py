"""Expressions over symbols: trace a cell's equations, see its stages, differentiate and evaluate them.

Expressions are immutable, compare by structure and form a graph in which equal parts are one object's worth of work:
:func:`evaluate` computes each distinct node once. The leaves of a traced cell are named by (kind, name): ``("x", g)``
and ``("h", g)`` for the pre-activations of gate g from input and recurrent weights, ``("state", s)`` for a previous
state, ``("vector", v)`` for an element of a weight that multiplies element by element, ``("projected", "h")`` for what
a projection made, and, after :func:`merge`, ``("sum", g)`` for x + h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fusedrnn.cells import Cell

Leaf = tuple[str, str]


@dataclass(frozen=True, eq=True)
class Expr:
    """A node: a leaf (op ``"leaf"``, its name in ``leaf``), a constant, or an operation on other nodes."""

    op: str
    args: tuple[Expr, ...] = ()
    leaf: Leaf = ("", "")
    value: float = 0.0

    @cached_property
    def _hash(self) -> int:
        return hash((self.op, self.args, self.leaf, self.value))

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: Expr | float) -> Expr:
        return Expr("add", (self, lift(other)))

    def __radd__(self, other: float) -> Expr:
        return lift(other) + self

    def __sub__(self, other: Expr | float) -> Expr:
        return Expr("sub", (self, lift(other)))

    def __rsub__(self, other: float) -> Expr:
        return lift(other) - self

    def __mul__(self, other: Expr | float) -> Expr:
        return Expr("mul", (self, lift(other)))

    def __rmul__(self, other: float) -> Expr:
        return lift(other) * self

    def __truediv__(self, other: Expr | float) -> Expr:
        return Expr("div", (self, lift(other)))


def lift(value: Expr | float) -> Expr:
    """A number as an expression; an expression as it is."""
    return value if isinstance(value, Expr) else Expr("const", value=float(value))


def leaf(kind: str, name: str) -> Expr:
    """The leaf of that kind and name."""
    return Expr("leaf", leaf=(kind, name))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x))."""
    return Expr("sigmoid", (x,))


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent."""
    return Expr("tanh", (x,))


def relu(x: Expr) -> Expr:
    """max(x, 0), NaN staying NaN."""
    return Expr("relu", (x,))


def pass_positive(gate: Expr, value: Expr) -> Expr:
    """``value`` where the gate is positive or NaN, else zero: the derivative of relu."""
    return Expr("pass_positive", (gate, value))


def absolute(x: Expr) -> Expr:
    """|x|."""
    return Expr("absolute", (x,))


def signed_by(x: Expr, value: Expr) -> Expr:
    """``value``, its sign changed where x is negative: the derivative of the absolute."""
    return Expr("signed_by", (x, value))


def expm1(x: Expr) -> Expr:
    """exp(x) - 1, for x of at most 0."""
    return Expr("expm1", (x,))


def softplus(x: Expr) -> Expr:
    """log(1 + exp(x))."""
    return Expr("softplus", (x,))


def clip(x: Expr, low: float, high: float) -> Expr:
    """The number, or the limit that it is beyond; NaN stays NaN."""
    return Expr("clip", (x, lift(low), lift(high)))


def clip_nan(x: Expr, low: float, high: float) -> Expr:
    """The same with the lower limit for NaN."""
    return Expr("clip_nan", (x, lift(low), lift(high)))


def pass_between(x: Expr, low: Expr, high: Expr, value: Expr) -> Expr:
    """``value`` where x is within the limits, else zero, also where it is NaN: the derivative of clipping."""
    return Expr("pass_between", (x, low, high, value))


def walk(roots: Sequence[Expr]) -> Iterator[Expr]:
    """Each distinct node once, arguments before what uses them."""
    seen: set[Expr] = set()

    def visit(node: Expr) -> Iterator[Expr]:
        if node not in seen:
            seen.add(node)
            for arg in node.args:
                yield from visit(arg)
            yield node

    for root in roots:
        yield from visit(root)


class Arithmetic(Protocol):
    """What :func:`evaluate` needs: a constant, and a method for every operation a cell may use."""

    def const(self, value: float) -> Any:
        """A constant."""

    def add(self, a: Any, b: Any) -> Any:
        """Sum."""

    def sub(self, a: Any, b: Any) -> Any:
        """Difference."""

    def mul(self, a: Any, b: Any) -> Any:
        """Product."""

    def sigmoid(self, x: Any) -> Any:
        """1 / (1 + exp(-x))."""

    def tanh(self, x: Any) -> Any:
        """Hyperbolic tangent."""

    def relu(self, x: Any) -> Any:
        """max(x, 0), NaN staying NaN."""

    def pass_positive(self, gate: Any, value: Any) -> Any:
        """``value`` where the gate is positive or NaN, else zero."""

    def div(self, a: Any, b: Any) -> Any:
        """Quotient."""

    def absolute(self, x: Any) -> Any:
        """|x|."""

    def signed_by(self, x: Any, value: Any) -> Any:
        """``value``, its sign changed where x is negative."""

    def expm1(self, x: Any) -> Any:
        """exp(x) - 1, for x of at most 0."""

    def softplus(self, x: Any) -> Any:
        """log(1 + exp(x))."""

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        """The number, or the limit that it is beyond; NaN stays NaN."""

    def clip_nan(self, x: Any, low: Any, high: Any) -> Any:
        """The same with the lower limit for NaN."""

    def pass_between(self, x: Any, low: Any, high: Any, value: Any) -> Any:
        """``value`` where x is within the limits, else zero."""


def evaluate(roots: Sequence[Expr], leaves: Mapping[Leaf, Any] | Callable[[Leaf], Any], on: Arithmetic) -> list[Any]:
    """The values of ``roots``, with ``leaves`` giving those of the leaves, in the arithmetic ``on``."""
    lookup = leaves if callable(leaves) else leaves.__getitem__
    values: dict[Expr, Any] = {}
    for node in walk(roots):
        if node.op == "leaf":
            values[node] = lookup(node.leaf)
        elif node.op == "const":
            values[node] = on.const(node.value)
        else:
            values[node] = getattr(on, node.op)(*(values[arg] for arg in node.args))
    return [values[root] for root in roots]


def substitute(roots: Sequence[Expr], replace: Callable[[Expr], Expr | None]) -> list[Expr]:
    """``roots`` with every node for which ``replace`` gives another one exchanged for it, outermost first."""
    done: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in done:
            other = replace(node)
            if other is None:
                other = Expr(node.op, tuple(visit(arg) for arg in node.args), node.leaf, node.value)
            done[node] = other
        return done[node]

    return [visit(root) for root in roots]


def gradients(roots: Sequence[Expr], seeds: Sequence[Expr]) -> dict[Leaf, Expr]:
    """What reaches each leaf if ``seeds`` are the gradients that reach ``roots``: reverse-mode differentiation."""
    reaching: dict[Expr, Expr] = {}

    def add(node: Expr, gradient: Expr) -> None:
        reaching[node] = reaching[node] + gradient if node in reaching else gradient

    for root, seed in zip(roots, seeds, strict=True):
        add(root, seed)
    for node in reversed(list(walk(roots))):
        if node.args and node in reaching:
            for arg, gradient in zip(node.args, _to_arguments(node, reaching[node]), strict=True):
                if gradient is not None and arg.op != "const":
                    add(arg, gradient)
    return {node.leaf: gradient for node, gradient in reaching.items() if node.op == "leaf"}


def _to_arguments(node: Expr, reaching: Expr) -> tuple[Expr | None, ...]:
    """The gradient that each argument of a node gets from the one that reaches the node; None for nothing."""
    if node.op == "add":
        return reaching, reaching
    if node.op == "sub":
        return reaching, 0.0 - reaching
    if node.op == "mul":
        left, right = node.args
        return reaching * right, reaching * left
    if node.op == "sigmoid":
        return (reaching * (node * (1.0 - node)),)
    if node.op == "tanh":
        return (reaching * (1.0 - node * node),)
    if node.op == "relu":
        return (pass_positive(node, reaching),)
    if node.op == "pass_positive":
        return None, pass_positive(node.args[0], reaching)
    if node.op == "div":
        quotient = reaching / node.args[1]
        return quotient, 0.0 - quotient * node
    if node.op == "absolute":
        return (signed_by(node.args[0], reaching),)
    if node.op == "expm1":
        return (reaching * (node + 1.0),)
    if node.op == "softplus":
        return (reaching * sigmoid(node.args[0]),)
    if node.op in ("clip", "clip_nan"):
        x, low, high = node.args
        return pass_between(x, low, high, reaching), None, None
    raise NotImplementedError(f"the derivative of {node.op!r}")


@dataclass(frozen=True)
class Stage:
    """One GEMM of a step: its operand, and the gates whose rows of the recurrent weights it uses.

    Attributes:
        operand: What is multiplied: the output of the step before, or something that an earlier stage made.
        gates: Those gates, neighbours in the weights; none in a projection.
        projects: Whether this is the projection, whose weights are its own and whose result is the leaf
            ``("projected", "h")``.
        merged: Whether the gates' two parts are only ever added, so that a kernel can accumulate onto the input's.
    """

    operand: Expr
    gates: tuple[str, ...]
    projects: bool = False
    merged: bool = False


@dataclass(frozen=True)
class TracedCell:
    """A cell as expressions: its stages in order and its new states, the output first."""

    gates: tuple[str, ...]
    states: tuple[str, ...]
    stages: tuple[Stage, ...]
    outputs: tuple[Expr, ...]

    @property
    def merged(self) -> bool:
        """Whether those of all gates are."""
        return all(stage.merged or stage.projects for stage in self.stages)

    @cached_property
    def vectors(self) -> tuple[str, ...]:
        """The gates that have a weight for each unit, in the order of the gates."""
        roots = (*self.outputs, *self.operands)
        found = {node.leaf[1] for node in walk(roots) if node.op == "leaf" and node.leaf[0] == "vector"}
        return tuple(gate for gate in self.gates if gate in found)

    @property
    def operands(self) -> tuple[Expr, ...]:
        """What the stages behind the first multiply."""
        return tuple(stage.operand for stage in self.stages[1:])

    @cached_property
    def projects(self) -> bool:
        """Whether there is a projection."""
        return any(stage.projects for stage in self.stages)

    def known_after(self, node: Expr) -> int:
        """The number of the stage after whose GEMM a node can be computed."""
        last = 0
        for one in walk([node]):
            for number, stage in enumerate(self.stages):
                made = one.leaf == ("projected", "h") if stage.projects else one.leaf[1] in stage.gates
                if one.op == "leaf" and one.leaf[0] in ("h", "sum", "projected") and made:
                    last = max(last, number)
        return last


class _Gates:
    """``x.i`` or ``h.i``: the leaf of a gate by attribute, noting which were asked for."""

    def __init__(self, kind: str, gates: Sequence[str], used: set[str]) -> None:
        self._kind, self._gates, self._used = kind, gates, used

    def __getattr__(self, gate: str) -> Expr:
        if gate not in self._gates:
            raise AttributeError(f"the cell has no gate {gate!r}; its gates are {', '.join(self._gates)}")
        self._used.add(gate)
        return leaf(self._kind, gate)


class _Recurrence:
    """What equations call to have something multiplied by the recurrent weights, or projected."""

    def __init__(self, gates: Sequence[str]) -> None:
        self._gates = gates
        self._stages: list[tuple[Expr, set[str], bool]] = []

    def __call__(self, operand: Expr) -> _Gates:
        self._stages.append((operand, set(), False))
        return _Gates("h", self._gates, self._stages[-1][1])

    def project(self, operand: Expr) -> Expr:
        self._stages.append((operand, set(), True))
        return leaf("projected", "h")

    def stages(self) -> tuple[Stage, ...]:
        return tuple(
            Stage(operand, tuple(gate for gate in self._gates if gate in used), projects)
            for operand, used, projects in self._stages
        )


@lru_cache(maxsize=64)
def trace(cell: Cell) -> TracedCell:
    """Run a cell's equations on symbols.

    Raises:
        ValueError: If a gate comes from more than one stage, or those of a stage are no neighbours.
    """
    recurrence = _Recurrence(cell.gates)
    result = cell.equations(_Gates("x", cell.gates, set()), recurrence, _Gates("state", cell.states, set()))
    outputs = result if isinstance(result, tuple) else (result,)
    stages = recurrence.stages()
    asked = [gate for stage in stages for gate in stage.gates]
    if repeated := {gate for gate in asked if asked.count(gate) > 1}:
        raise ValueError(f"cell {cell.name!r} takes gate {', '.join(sorted(repeated))} from more than one stage")
    return TracedCell(cell.gates, cell.states, stages, outputs)


@lru_cache(maxsize=64)
def merge(traced: TracedCell) -> TracedCell:
    """Exchange x + h for one leaf ``("sum", gate)``, in each stage whose gates' two parts are never needed apart.

    A kernel then lets the recurrent GEMM accumulate onto the input's pre-activations. Only the reset-after GRU is left
    as it was: its r multiplies the recurrent part of n alone.
    """
    # What a later stage multiplies may be made of gates too.
    roots = [*traced.outputs, *(stage.operand for stage in traced.stages)]
    stages = []
    for stage in traced.stages:
        sums = {leaf("x", gate) + leaf("h", gate): gate for gate in stage.gates}
        merged = substitute(roots, _to_sums(sums))
        apart = {(kind, gate) for kind in ("x", "h") for gate in stage.gates}
        mergeable = bool(stage.gates) and not any(node.op == "leaf" and node.leaf in apart for node in walk(merged))
        roots = merged if mergeable else roots
        stages.append(replace(stage, merged=mergeable))
    outputs, operands = roots[: len(traced.outputs)], roots[len(traced.outputs) :]
    if not any(stage.merged for stage in stages):
        return traced
    done = (replace(stage, operand=operand) for operand, stage in zip(operands, stages, strict=True))
    return replace(traced, stages=tuple(done), outputs=tuple(outputs))


def _to_sums(sums: Mapping[Expr, str]) -> Callable[[Expr], Expr | None]:
    return lambda node: leaf("sum", sums[node]) if node in sums else None
