"""A cell's maths behind the tile: the traced expressions evaluated in vector registers."""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.codegen.build import Value
from fusedrnn.codegen.vector import Vectors
from fusedrnn.symbolic import Leaf, TracedCell, evaluate


def new_states(vectors: Vectors, cell: TracedCell, leaf: Callable[[Leaf], Value]) -> list[Value]:
    """The new states of one vector of units, the output first; ``leaf`` loads what the equations read."""
    return list(evaluate(cell.outputs, leaf, vectors))
