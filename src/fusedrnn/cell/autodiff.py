"""Reverse-mode differentiation of expressions, by the rules of the table of primitives."""

from __future__ import annotations

from collections.abc import Sequence

from fusedrnn.cell.expr import Constant, Expr, Leaf, Operation, walk
from fusedrnn.cell.primitives import PRIMITIVES


def vjp(roots: Sequence[Expr], cotangents: Sequence[Expr]) -> dict[Leaf, Expr]:
    """The cotangent of each leaf that ``roots`` depend on, given the cotangents of ``roots``.

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
            for arg, share in zip(node.args, _arg_cotangents(node, accumulated[node]), strict=True):
                if share is not None and not isinstance(arg, Constant):
                    accumulate(arg, share)
    return {node: cotangent for node, cotangent in accumulated.items() if isinstance(node, Leaf)}


def _arg_cotangents(node: Operation, cotangent: Expr) -> tuple[Expr | None, ...]:
    primitive = PRIMITIVES.get(node.op)
    if primitive is None or primitive.vjp is None:
        raise NotImplementedError(f"the derivative of {node.op!r}")
    return primitive.vjp(cotangent, node, *node.args)
