"""Expressions of elementwise operations: build, traverse, rewrite and evaluate them.

Expressions are immutable and compare by structure: equal subexpressions count as one node, which :func:`evaluate`
computes once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol


class Expr:
    """A node: a :class:`Leaf`, a :class:`Constant`, or an :class:`Operation` on other nodes."""

    args: tuple[Expr, ...] = ()

    def __add__(self, other: Expr | float) -> Expr:
        return Operation("add", (self, as_expr(other)))

    def __radd__(self, other: float) -> Expr:
        return as_expr(other) + self

    def __sub__(self, other: Expr | float) -> Expr:
        return Operation("sub", (self, as_expr(other)))

    def __rsub__(self, other: float) -> Expr:
        return as_expr(other) - self

    def __mul__(self, other: Expr | float) -> Expr:
        return Operation("mul", (self, as_expr(other)))

    def __rmul__(self, other: float) -> Expr:
        return as_expr(other) * self

    def __truediv__(self, other: Expr | float) -> Expr:
        return Operation("div", (self, as_expr(other)))


class Leaf(Expr):
    """An input of an expression; the subclasses are in :mod:`fusedrnn.cell.leaves`."""


@dataclass(frozen=True)
class Constant(Expr):
    """A number."""

    value: float


@dataclass(frozen=True)
class Operation(Expr):
    """An operation on other nodes."""

    op: str
    args: tuple[Expr, ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.op, self.args))

    def __hash__(self) -> int:  # the dataclass's own would visit a shared node once for each path to it
        return self._hash


def as_expr(value: Expr | float) -> Expr:
    """A number as a :class:`Constant`; an expression unchanged."""
    return value if isinstance(value, Expr) else Constant(float(value))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x))."""
    return Operation("sigmoid", (x,))


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent."""
    return Operation("tanh", (x,))


def relu(x: Expr) -> Expr:
    """max(x, 0), NaN staying NaN."""
    return Operation("relu", (x,))


def pass_positive(gate: Expr, value: Expr) -> Expr:
    """``value`` where the gate is positive or NaN, else zero: the derivative of relu."""
    return Operation("pass_positive", (gate, value))


def absolute(x: Expr) -> Expr:
    """|x|."""
    return Operation("absolute", (x,))


def signed_by(x: Expr, value: Expr) -> Expr:
    """``value``, its sign changed where x is negative: the derivative of the absolute."""
    return Operation("signed_by", (x, value))


def expm1(x: Expr) -> Expr:
    """exp(x) - 1, for x of at most 0."""
    return Operation("expm1", (x,))


def softplus(x: Expr) -> Expr:
    """log(1 + exp(x))."""
    return Operation("softplus", (x,))


def clip(x: Expr, low: float, high: float) -> Expr:
    """The number, or the limit that it is beyond; NaN stays NaN."""
    return Operation("clip", (x, as_expr(low), as_expr(high)))


def clip_nan(x: Expr, low: float, high: float) -> Expr:
    """The same with the lower limit for NaN."""
    return Operation("clip_nan", (x, as_expr(low), as_expr(high)))


def pass_between(x: Expr, low: Expr, high: Expr, value: Expr) -> Expr:
    """``value`` where x is within the limits, else zero, also where it is NaN: the derivative of clipping."""
    return Operation("pass_between", (x, low, high, value))


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
        if isinstance(node, Operation):
            values[node] = getattr(on, node.op)(*(values[arg] for arg in node.args))
        elif isinstance(node, Constant):
            values[node] = on.const(node.value)
        else:
            assert isinstance(node, Leaf)
            values[node] = lookup(node)
    return [values[root] for root in roots]


def substitute(roots: Sequence[Expr], replace: Callable[[Expr], Expr | None]) -> list[Expr]:
    """``roots`` with every node for which ``replace`` gives another one exchanged for it, outermost first."""
    done: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in done:
            other = replace(node)
            if other is None:
                other = Operation(node.op, tuple(map(visit, node.args))) if isinstance(node, Operation) else node
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
        if isinstance(node, Operation) and node in reaching:
            for arg, gradient in zip(node.args, _to_arguments(node, reaching[node]), strict=True):
                if gradient is not None and not isinstance(arg, Constant):
                    add(arg, gradient)
    return {node: gradient for node, gradient in reaching.items() if isinstance(node, Leaf)}


def _to_arguments(node: Operation, reaching: Expr) -> tuple[Expr | None, ...]:
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
