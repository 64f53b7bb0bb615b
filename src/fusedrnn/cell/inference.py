"""A cell as it infers: without random masks."""

from __future__ import annotations

from dataclasses import replace

from fusedrnn.cell.cells import Cell
from fusedrnn.cell.expr import Constant, Expr, Operation
from fusedrnn.cell.language import UserCell
from fusedrnn.cell.leaves import Mask
from fusedrnn.cell.primitives import PRIMITIVES

INFERENCE = "?inference"
"""The end of the reference of such a cell."""
_FOLDED = ("add", "sub", "mul", "div")


def in_inference(cell: Cell) -> Cell:
    """The cell with each mask replaced by its expectation; the cell itself if it has none.

    It is a cell of its own, because its gradients are those of the expectation.
    """
    if not isinstance(cell, UserCell) or not cell.traced.masks:
        return cell
    traced, known = cell.traced, dict[Expr, Expr]()
    stages = [stage.with_values([_expected(value, known) for value in stage.values]) for stage in traced.stages]
    outputs = tuple([_expected(output, known) for output in traced.outputs])
    expected = replace(cell)
    vars(expected).update(vars(cell))
    vars(expected).pop("_equations_digest", None)
    vars(expected)["traced"] = replace(traced, stages=tuple(stages), outputs=outputs)
    vars(expected)["reference"] = cell.reference + INFERENCE
    return expected


def _expected(node: Expr, known: dict[Expr, Expr]) -> Expr:
    if isinstance(node, Mask):
        return Constant(node.keep)
    if not isinstance(node, Operation):
        return node
    if node not in known:
        args = tuple([_expected(arg, known) for arg in node.args])
        numbers = [arg.value for arg in args if isinstance(arg, Constant)]
        if node.op in _FOLDED and len(numbers) == len(args):
            known[node] = Constant(PRIMITIVES[node.op].array(None, *numbers))
        elif node.op == "mul" and Constant(1.0) in args:
            known[node] = args[0] if args[1] == Constant(1.0) else args[1]
        else:
            known[node] = Operation(node.op, args)
    return known[node]
