"""Expressions of elementwise operations: build, traverse, rewrite and evaluate them.

The operations are in the table of :mod:`fusedrnn.cell.primitives`.
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
    """What :func:`evaluate` computes with."""

    def const(self, value: float) -> Any:
        """A constant."""

    def apply(self, op: str, *args: Any) -> Any:
        """The operation of that name in the table of primitives."""


def evaluate(roots: Sequence[Expr], leaves: Mapping[Leaf, Any] | Callable[[Leaf], Any], on: Arithmetic) -> list[Any]:
    """The values of ``roots``, with ``leaves`` giving those of the leaves, in the arithmetic ``on``."""
    lookup = leaves if callable(leaves) else leaves.__getitem__
    values: dict[Expr, Any] = {}
    for node in walk(roots):
        if isinstance(node, Operation):
            values[node] = on.apply(node.op, *(values[arg] for arg in node.args))
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
