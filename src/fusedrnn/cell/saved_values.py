"""Which forward values a cell's backward needs saved in the reserve, and which it recomputes from others."""

from __future__ import annotations

from fusedrnn.cell.expr import Constant, Expr, Operation
from fusedrnn.cell.primitives import PRIMITIVES
from fusedrnn.cell.trace import TracedCell
from fusedrnn.cell.traversal import walk

# Saving an element moves 12 bytes in float32, 24 in float64: its cache line is fetched, written and read again. For
# each byte, a core at its peak that shares the memory bandwidth with others does 8 or 4 operations in the same time.
_MAX_RECOMPUTE_FLOPS = 96


def choose_saved(cell: TracedCell, targets: list[Expr], available: set[Expr]) -> tuple[list[Expr], list[Expr]]:
    """The forward values to save for the gradients ``targets``, and those to recompute."""
    roots = [*cell.outputs, *cell.operands]
    forward = set(walk(roots))
    needed = {arg for node in walk(targets) if node not in forward for arg in node.args if arg in forward}
    needed.update(node for node in targets if node in forward)
    saved, recomputed = [], []
    for node in walk(roots):  # arguments first, because a saved value is available to values computed from it
        if node in needed and node not in available and not isinstance(node, Constant):
            if _recompute_flops(node, available) > _MAX_RECOMPUTE_FLOPS:
                saved.append(node)
                available.add(node)
            else:
                recomputed.append(node)
    return saved, recomputed


def _recompute_flops(node: Expr, available: set[Expr]) -> int:
    """Operations to compute a node from available nodes; some number above the limit if it is exceeded."""
    flops, pending = 0, [node]
    while pending and flops <= _MAX_RECOMPUTE_FLOPS:  # the paths to shared parts may be countless
        node = pending.pop()
        if node not in available and not isinstance(node, Constant):
            flops += PRIMITIVES[node.op].flops if isinstance(node, Operation) else _MAX_RECOMPUTE_FLOPS + 1
            pending += node.args
    return flops
