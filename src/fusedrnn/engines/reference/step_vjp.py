"""The derivative of one step of a cell, for cells with any stages: forward saves every value that it uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from fusedrnn.cell.derivative import available_leaves, value_cotangents, vjp
from fusedrnn.cell.expr import Constant, Expr, Leaf
from fusedrnn.cell.leaves import Saved
from fusedrnn.cell.trace import TracedCell
from fusedrnn.cell.traversal import substitute, walk


@dataclass(frozen=True)
class StepVjp:
    """The vector-Jacobian product of a step of a cell.

    Expressions have the leaves of :class:`fusedrnn.cell.derivative.Derivative`.

    Attributes:
        saved: What forward saves of each step besides the states: all other forward values that the rest uses.
        operands: The operand of each stage; for a stage of reductions, the first value that they read.
        from_outputs: The cotangents of the cell's leaves, from those of the new states and of the output.
        from_operands: For each stage, the cotangents of the cell's leaves, from that of the stage's operand, or from
            those of its means and variances.
    """

    saved: tuple[Expr, ...]
    operands: tuple[Expr, ...]
    from_outputs: Mapping[Leaf, Expr]
    from_operands: tuple[Mapping[Leaf, Expr], ...]


@lru_cache(maxsize=64)
def step_vjp(cell: TracedCell) -> StepVjp:
    """Differentiate a cell with any number of stages."""
    operands = [stage.operand for stage in cell.stages]
    grads = [vjp(cell.outputs, cell.output_cotangents)]
    values = [value for stage in cell.stages for value in stage.values]
    grads += [vjp(stage.values, value_cotangents(index, stage)) for index, stage in enumerate(cell.stages)]
    moments = [leaf for stage in cell.stages for reduction in stage.reductions for leaf in reduction.leaves]
    forward = dict.fromkeys(walk([*cell.outputs, *values, *moments]))
    cotangents = [cotangent for by_leaf in grads for cotangent in by_leaf.values()]
    used = {arg for node in walk(cotangents) if node not in forward for arg in node.args}
    used.update(stage.operand for stage in cell.products)
    available = available_leaves(cell)
    # A tape has no other place for means and variances.
    available = {node: leaf for node, leaf in available.items() if node not in moments}
    saved = [node for node in forward if node in used and node not in available and not isinstance(node, Constant)]
    available.update({node: Saved(index) for index, node in enumerate(saved)})

    def of_available(by_leaf: Mapping[Leaf, Expr]) -> dict[Leaf, Expr]:
        return dict(zip(by_leaf, substitute(list(by_leaf.values()), available.get), strict=True))

    return StepVjp(
        saved=tuple(saved),
        operands=tuple(substitute(operands, available.get)),
        from_outputs=of_available(grads[0]),
        from_operands=tuple(map(of_available, grads[1:])),
    )
