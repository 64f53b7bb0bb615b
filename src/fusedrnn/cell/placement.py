"""The stages of a step in order: products in the order of the equations, and stages for reductions between them."""

from __future__ import annotations

from dataclasses import replace

from fusedrnn.cell.expr import Expr, Operation
from fusedrnn.cell.leaves import PreH, RowMean, RowVariance
from fusedrnn.cell.reductions import NAMES, Reduction, reductions_in, with_leaves
from fusedrnn.cell.stage import Stage
from fusedrnn.cell.traversal import walk


def place_stages(
    first_state: Expr, products: tuple[Stage, ...], outputs: tuple[Expr, ...]
) -> tuple[tuple[Stage, ...], tuple[Expr, ...]]:
    """All stages, and the outputs with leaves in place of reductions.

    Reductions that can be computed at the same time share a stage.

    A step begins with a product of the previous first state, or else with a stage of maths alone, which computes the
    values of all units that the next stage reads. A cell without products and reductions has no stages.

    Raises:
        ValueError: If the operand of a product uses a reduction of what the product computes.
    """
    waiting = [*products]
    roots = [*outputs, *(stage.operand for stage in waiting)]
    if not waiting and not reductions_in(roots):
        return (), outputs
    begins_with_product = bool(waiting) and waiting[0].operand == first_state
    placed = [waiting.pop(0) if begins_with_product else Stage(first_state, (), multiplies=False)]
    while waiting or reductions_in(roots):
        gates = {gate for stage in placed for gate in stage.gates}
        ready = [values for values in reductions_in(roots) if _is_ready(values, gates)]
        if ready:
            index, nodes = len(placed), set(walk(roots))
            reductions = tuple(
                Reduction(
                    values, RowMean(index, number),
                    RowVariance(index, number) if Operation(NAMES[1], values) in nodes else None,
                )
                for number, values in enumerate(ready)
            )  # fmt: skip
            for number, values in enumerate(ready):
                roots = with_leaves(roots, values, index, number)
            placed.append(Stage(ready[0][0], (), reductions=reductions, multiplies=False))
        elif waiting:
            placed.append(waiting.pop(0))
        else:
            raise ValueError("a mean or variance of what is computed from it")
    operands = iter(roots[len(outputs) :])
    placed = [replace(stage, operand=next(operands)) if stage.multiplies else stage for stage in placed]
    return tuple(placed), tuple(roots[: len(outputs)])


def _is_ready(values: tuple[Expr, ...], gates: set[str]) -> bool:
    """Whether values to reduce contain no reductions, and no products other than those of these gates."""
    products = {node.gate for node in walk(values) if isinstance(node, PreH)}
    return products <= gates and not reductions_in(values)
