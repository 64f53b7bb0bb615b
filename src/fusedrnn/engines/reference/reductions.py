"""Means and variances over the units of a row, and their gradients, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.cell.expr import Leaf
from fusedrnn.cell.stage import Stage


def moments(stage: Stage, values: Sequence[Array]) -> dict[Leaf, Array]:
    """The means and variances of a stage of reductions, from its values: all (N, H)."""
    results: dict[Leaf, Array] = {}
    rest = iter(values)
    for reduction in stage.reductions:
        row = np.concatenate([next(rest) for _ in reduction.values], axis=1)
        results[reduction.mean] = np.broadcast_to(row.mean(axis=1, keepdims=True), values[0].shape)
        if reduction.variance is not None:
            results[reduction.variance] = np.broadcast_to(row.var(axis=1, keepdims=True), values[0].shape)
    return results


def moment_cotangents(stage: Stage, grads: Mapping[Leaf, Array]) -> dict[Leaf, Array]:
    """The gradients of means and variances, divided by the number of values: each (N, H), the same for all units."""
    cotangents: dict[Leaf, Array] = {}
    for reduction in stage.reductions:
        for leaf, cotangent in zip(reduction.leaves, reduction.cotangents, strict=True):
            of_units = grads[leaf]
            total = of_units.mean(axis=1, keepdims=True) / len(reduction.values)
            cotangents[cotangent] = np.broadcast_to(total, of_units.shape)
    return cotangents
