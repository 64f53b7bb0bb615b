"""Expressions over symbols: trace a cell's equations, see its stages, differentiate and evaluate them.

Expressions are immutable, compare by structure and form a graph in which equal parts are one object's worth of work:
:func:`evaluate` computes each distinct node once. The leaves of a traced cell are named by (kind, name): ``("x", g)``
and ``("h", g)`` for the pre-activations of gate g from input and recurrent weights, ``("state", s)`` for a previous
state, and, after :func:`merge`, ``("sum", g)`` for x + h.
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
                if arg.op != "const":
                    add(arg, gradient)
    return {node.leaf: gradient for node, gradient in reaching.items() if node.op == "leaf"}


def _to_arguments(node: Expr, reaching: Expr) -> tuple[Expr, ...]:
    """The gradient that each argument of a node gets from the one that reaches the node."""
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
    raise NotImplementedError(f"the derivative of {node.op!r}")


@dataclass(frozen=True)
class Stage:
    """One recurrent GEMM of a step: its operand, and the gates whose rows of the recurrent weights it uses."""

    operand: Expr
    gates: tuple[str, ...]


@dataclass(frozen=True)
class TracedCell:
    """A cell as expressions: its stages in order and its new states, the output first."""

    gates: tuple[str, ...]
    states: tuple[str, ...]
    stages: tuple[Stage, ...]
    outputs: tuple[Expr, ...]
    merged: bool = False


class _Gates:
    """``x.i`` or ``h.i``: the leaf of a gate by attribute, noting which were asked for."""

    def __init__(self, kind: str, gates: Sequence[str], used: set[str]) -> None:
        self._kind, self._gates, self._used = kind, gates, used

    def __getattr__(self, gate: str) -> Expr:
        if gate not in self._gates:
            raise AttributeError(f"the cell has no gate {gate!r}; its gates are {', '.join(self._gates)}")
        self._used.add(gate)
        return leaf(self._kind, gate)


@lru_cache(maxsize=64)
def trace(cell: Cell) -> TracedCell:
    """Run a cell's equations on symbols."""
    stages: list[tuple[Expr, set[str]]] = []

    def recur(operand: Expr) -> _Gates:
        stages.append((operand, set()))
        return _Gates("h", cell.gates, stages[-1][1])

    result = cell.equations(_Gates("x", cell.gates, set()), recur, _Gates("state", cell.states, set()))
    outputs = result if isinstance(result, tuple) else (result,)
    found = tuple(Stage(operand, tuple(g for g in cell.gates if g in used)) for operand, used in stages)
    asked = [gate for stage in found for gate in stage.gates]
    if repeated := {gate for gate in asked if asked.count(gate) > 1}:
        raise ValueError(f"cell {cell.name!r} takes gate {', '.join(sorted(repeated))} from more than one stage")
    return TracedCell(cell.gates, cell.states, found, outputs)


@lru_cache(maxsize=64)
def merge(traced: TracedCell) -> TracedCell:
    """Exchange x + h for one leaf ``("sum", gate)``, if no gate's two parts are ever needed apart.

    A kernel then lets the recurrent GEMM accumulate onto the input's pre-activations. Only the GRU is left as it was:
    its r multiplies the recurrent part of n alone.
    """
    sums = {leaf("x", gate) + leaf("h", gate): gate for gate in traced.gates}
    # What a later stage multiplies may be made of gates too.
    roots = (*traced.outputs, *(stage.operand for stage in traced.stages))
    merged = substitute(roots, lambda node: leaf("sum", sums[node]) if node in sums else None)
    if any(node.op == "leaf" and node.leaf[0] in ("x", "h") for node in walk(merged)):
        return traced
    outputs, operands = merged[: len(traced.outputs)], merged[len(traced.outputs) :]
    stages = tuple(Stage(operand, stage.gates) for operand, stage in zip(operands, traced.stages, strict=True))
    return replace(traced, stages=stages, outputs=tuple(outputs), merged=True)
