"""A flat parameter vector from matrices whose columns are gates, and back.

Flax and Keras keep weights as (inputs, gates·units), the operator as (gates·units, inputs). A call in a compiled
function transposes them every time, which XLA does slowly on the CPU; machine code of ours takes a fraction of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from fusedrnn.engines.cpu.weights.transpose_kernel import Block
from fusedrnn.jax.calls import TransposeJob
from fusedrnn.jax.handler_kernel import MAX_BUFFERS
from fusedrnn.jax.lowering import define, lower_to_handler

Array = Any

flatten_p, unflatten_p = map(Primitive, ("fusedrnn_flatten", "fusedrnn_unflatten"))


class Piece(NamedTuple):
    """Some columns of an array, which follow one another in the vector, each contiguous.

    Attributes:
        array: The number of the array.
        column: The first column.
        columns: How many.
    """

    array: int
    column: int
    columns: int


def flatten(arrays: Sequence[Array], pieces: Sequence[Piece]) -> Array:
    """The columns of arrays, one after the other, as a vector.

    Args:
        arrays: Matrices, or vectors: their elements are columns of one row. All of one dtype, float32 or float64.
        pieces: The columns in the order of the vector: each column of each array once.
    """
    shapes = tuple(array.shape for array in arrays)
    assert len(shapes) < MAX_BUFFERS
    assert sum(piece.columns for piece in pieces) == sum(shape[-1] for shape in shapes)
    return flatten_p.bind(*arrays, pieces=tuple(pieces), shapes=shapes)


def _row_counts(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    return [shape[0] if len(shape) == 2 else 1 for shape in shapes]


def _size(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(rows * shape[-1] for rows, shape in zip(_row_counts(shapes), shapes, strict=True))


def _flatten_anywhere(*arrays: Array, pieces: Sequence[Piece], shapes: Any) -> Array:
    parts = [arrays[p.array][..., p.column : p.column + p.columns].T.reshape(-1) for p in pieces]
    return jnp.concatenate(parts)


def _unflatten_anywhere(flat: Array, *, pieces: Sequence[Piece], shapes: Any) -> list[Array]:
    parts: list[dict[int, Array]] = [{} for _ in shapes]
    rows, offset = _row_counts(shapes), 0
    for piece in pieces:
        size = piece.columns * rows[piece.array]
        part = flat[offset : offset + size].reshape(piece.columns, -1).T
        parts[piece.array][piece.column] = part.reshape(*shapes[piece.array][:-1], piece.columns)
        offset += size
    return [jnp.concatenate([own[column] for column in sorted(own)], axis=-1) for own in parts]


def _blocks(dtype: Any, pieces: Sequence[Piece], shapes: Any, is_inverse: bool) -> tuple[Block, ...]:
    """The blocks of the arrays, whose buffers come before or behind the vector's."""
    item, offset, rows = dtype.itemsize, 0, _row_counts(shapes)
    blocks = []
    for piece in pieces:
        number_of_rows, row = rows[piece.array], shapes[piece.array][-1] * item
        in_array = piece.array + is_inverse, piece.column * item, row
        in_vector = 0 if is_inverse else len(shapes), offset, number_of_rows * item
        if is_inverse:
            blocks.append(Block(*in_vector, *in_array, rows=piece.columns, columns=number_of_rows))
        else:
            blocks.append(Block(*in_array, *in_vector, rows=number_of_rows, columns=piece.columns))
        offset += number_of_rows * piece.columns * item
    return tuple(blocks)


def _lower_flatten(ctx: Any, *arrays: Any, pieces: Sequence[Piece], shapes: Any) -> Any:
    dtype = ctx.avals_in[0].dtype
    return lower_to_handler(ctx, *arrays, job=TransposeJob(dtype.name, _blocks(dtype, pieces, shapes, False)))


def _lower_unflatten(ctx: Any, flat: Any, *, pieces: Sequence[Piece], shapes: Any) -> Any:
    dtype = ctx.avals_in[0].dtype
    return lower_to_handler(ctx, flat, job=TransposeJob(dtype.name, _blocks(dtype, pieces, shapes, True)))


def _flatten_shape(*arrays: Any, pieces: Any, shapes: Any) -> Any:
    return jax.core.ShapedArray((_size(shapes),), arrays[0].dtype)


def _unflatten_shapes(flat: Any, *, pieces: Any, shapes: Any) -> list[Any]:
    return [jax.core.ShapedArray(shape, flat.dtype) for shape in shapes]


# Derivatives: both are linear, and each is the other's transpose.


def _transpose_flatten(cotangent: Any, *arrays: Any, pieces: Any, shapes: Any) -> list[Any]:
    if type(cotangent) is ad.Zero:
        return [ad.Zero(array.aval) if ad.is_undefined_primal(array) else None for array in arrays]
    parts = unflatten_p.bind(cotangent, pieces=pieces, shapes=shapes)
    return [part if ad.is_undefined_primal(array) else None for part, array in zip(parts, arrays, strict=True)]


def _transpose_unflatten(cotangents: Sequence[Any], flat: Any, *, pieces: Any, shapes: Any) -> list[Any]:
    return [flatten_p.bind(*map(ad.instantiate_zeros, cotangents), pieces=pieces, shapes=shapes)]


def _jvp(primitive: Primitive, primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    dense = map(ad.instantiate_zeros, tangents)
    return primitive.bind(*primals, **params), primitive.bind(*dense, **params)


def _batch(anywhere: Callable[..., Any], operands: Any, dims: Any, **params: Any) -> Any:
    results = jax.vmap(partial(anywhere, **params), in_axes=tuple(dims))(*operands)
    return results, [0] * len(results) if isinstance(results, list) else 0


define(flatten_p, _flatten_shape, partial(_batch, _flatten_anywhere), _flatten_anywhere, multiple_results=False)
define(unflatten_p, _unflatten_shapes, partial(_batch, _unflatten_anywhere), _unflatten_anywhere)
for _primitive, _lower, _transpose in (
    (flatten_p, _lower_flatten, _transpose_flatten),
    (unflatten_p, _lower_unflatten, _transpose_unflatten),
):
    mlir.register_lowering(_primitive, _lower, platform="cpu")
    ad.primitive_jvps[_primitive] = partial(_jvp, _primitive)
    ad.primitive_transposes[_primitive] = _transpose
