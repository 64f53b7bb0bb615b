"""Traverse, evaluate and rewrite expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from fusedrnn.cell.expr import Constant, Expr, Leaf, Operation


def walk(roots: Sequence[Expr]) -> Iterator[Expr]:
    """Every distinct node once, arguments before the nodes that use them."""
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
    """The values of ``roots`` computed with ``on``; ``leaves`` maps each leaf to its value."""
    lookup = leaves if callable(leaves) else leaves.__getitem__
    nodes, args, results = _program(tuple(roots))
    values: list[Any] = []
    for node, places in zip(nodes, args, strict=True):
        if isinstance(node, Operation):
            values.append(on.apply(node.op, *[values[place] for place in places]))
        elif isinstance(node, Constant):
            values.append(on.const(node.value))
        else:
            assert isinstance(node, Leaf)
            values.append(lookup(node))
    return [values[place] for place in results]


@lru_cache(maxsize=256)
def _program(roots: tuple[Expr, ...]) -> tuple[list[Expr], list[list[int]], list[int]]:
    """The nodes in the order of their computation; the places in it of each node's arguments, and of the roots."""
    nodes = list(walk(roots))
    places = {node: place for place, node in enumerate(nodes)}
    return nodes, [[places[arg] for arg in node.args] for node in nodes], [places[root] for root in roots]


def substitute(roots: Sequence[Expr], replace: Callable[[Expr], Expr | None]) -> list[Expr]:
    """``roots`` with each node replaced by ``replace(node)`` unless that is None; replacements are not visited."""
    done: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in done:
            replacement = replace(node)
            if replacement is None:
                replacement = Operation(node.op, tuple(map(visit, node.args))) if isinstance(node, Operation) else node
            done[node] = replacement
        return done[node]

    return [visit(root) for root in roots]
