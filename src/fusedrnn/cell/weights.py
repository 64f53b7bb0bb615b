"""Which parts of a layer-direction's weights a cell reads by which leaf, for arrays of any library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusedrnn.cell.expr import Leaf
from fusedrnn.cell.leaves import ParamVector
from fusedrnn.cell.trace import TracedCell


def parameter_leaves(cell: TracedCell, weights: Mapping[str, Any]) -> dict[Leaf, Any]:
    """The parameters of the cell by leaf: vectors (H,), such as peephole weights, and scalars (1,).

    They are views of the weights, which may be arrays of another library than NumPy.
    """
    if "peephole_weight" in weights:
        peepholes = weights["peephole_weight"].reshape(len(cell.param_vectors), -1)
        return {ParamVector(gate): weight for gate, weight in zip(cell.param_vectors, peepholes, strict=True)}
    return {leaf: weights[leaf.name] for leaf in cell.parameters}


def gate_rows(cell: TracedCell, x_count: int, h_count: int) -> tuple[dict[str, slice], dict[str, slice]]:
    """The rows of each gate in the input weights, of ``x_count`` rows, and in the recurrent weights, of ``h_count``."""
    size = x_count // len(cell.x_gates) if cell.x_gates else h_count // len(cell.h_gates)

    def rows(gates: Sequence[str]) -> dict[str, slice]:
        return {gate: slice(index * size, (index + 1) * size) for index, gate in enumerate(gates)}

    return rows(cell.x_gates), rows(cell.h_gates)
