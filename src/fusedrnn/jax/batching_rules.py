"""The rules by which ``vmap`` maps the operator's primitives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive

from fusedrnn.jax.calls import Call
from fusedrnn.jax.explicit_sharding import bind, map_rows

Array = Any


def join_batches(
    primitive: Primitive, operands: Sequence[Array], dims: Sequence[int | None], *, call: Call
) -> tuple[list[Array], list[int]]:
    """Join the mapped axis with the batch: one call.

    Mapped parameters need one call after the other, and so does dropout, whose masks depend on the index in a batch.
    An axis of size 0 needs no call, as a batch of the kernels has at least one sequence.
    """
    by_name = dict(zip(call.operand_names, dims, strict=True))
    size = next(operand.shape[dim] for operand, dim in zip(operands, dims, strict=True) if dim is not None)
    params_are_mapped = any(by_name[name] is not None for name in call.param_names)
    if params_are_mapped or "seed" in call.options or size == 0:
        return call_one_by_one(primitive, operands, dims, call=call)
    x_axis = 0 if call.batch_first else 1
    axes = {"x": x_axis, "lengths": 0}  # the batch is the second axis of all others: states and resets
    joined = [
        operand if name in call.param_names else _join(operand, dim, axes.get(name, 1), size)
        for (name, dim), operand in zip(by_name.items(), operands, strict=True)
    ]
    results = bind(primitive, joined, call)
    result_axes = [x_axis, *[1] * (len(results) - 1)]
    split = [
        result.reshape(*result.shape[:axis], size, -1, *result.shape[axis + 1 :])
        for result, axis in zip(results, result_axes, strict=True)
    ]
    return split, result_axes


def _join(operand: Array, dim: int | None, axis: int, size: int) -> Array:
    """Join the mapped axis with the batch axis; ``axis`` is the number of the latter without the mapped axis."""
    moved = jnp.expand_dims(operand, axis) if dim is None else jnp.moveaxis(operand, dim, axis)
    shape = moved.shape
    moved = jnp.broadcast_to(moved, (*shape[:axis], size, *shape[axis + 1 :]))
    return moved.reshape(*shape[:axis], size * shape[axis + 1], *shape[axis + 2 :])


def call_one_by_one(
    primitive: Primitive, operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[list[Array], list[int]]:
    """A loop over the mapped axis."""
    mapped = [index for index, dim in enumerate(dims) if dim is not None]

    def run(some: list[Array]) -> Any:
        own = list(operands)
        for index, value in zip(mapped, some, strict=True):
            own[index] = value
        return primitive.bind(*own, **params)

    rows = [jnp.moveaxis(operand, dim, 0) for operand, dim in zip(operands, dims, strict=True) if dim is not None]
    results = map_rows(run, rows)
    return results, [0] * len(results)
