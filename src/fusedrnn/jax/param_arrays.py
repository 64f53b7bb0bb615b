"""A flat parameter vector from arrays of another layout, and back, as operations of JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from fusedrnn.jax.array_layout import ArrayLayout, Piece
from fusedrnn.jax.calls import TransposeJob
from fusedrnn.jax.lowering import define, lower_to_handler
from fusedrnn.jax.mesh_types import result_type, vary_alike

Array = Any

flatten_p, unflatten_p = map(Primitive, ("fusedrnn_flatten", "fusedrnn_unflatten"))


class ParamArrays(NamedTuple):
    """The parameters of a network as arrays of another layout; :func:`fusedrnn.jax.rnn` takes them instead of a vector.

    The vector is made together with packed weights, and only if the content of the arrays has changed.

    Attributes:
        arrays: The arrays, all of the dtype of the network.
        layout: The layout of the vector in the arrays; None if the only array is the vector.
    """

    arrays: tuple[Array, ...]
    layout: ArrayLayout | None

    @classmethod
    def of(cls, arrays: Sequence[Array], pieces: Sequence[Piece]) -> ParamArrays:
        """Make it from arrays and the pieces of them that follow one another in the vector."""
        return cls(tuple(arrays), ArrayLayout(tuple(array.shape for array in arrays), tuple(pieces)))


def flatten(arrays: Sequence[Array], layout: ArrayLayout) -> Array:
    """The vector of arrays of a layout."""
    return flatten_p.bind(*vary_alike(*arrays), layout=layout)


def unflatten(flat: Array, layout: ArrayLayout) -> list[Array]:
    """The arrays of a vector."""
    arrays: list[Array] = unflatten_p.bind(flat, layout=layout)
    return arrays


def _flatten_anywhere(*arrays: Array, layout: ArrayLayout) -> Array:
    return jnp.concatenate([
        arrays[array][..., column : column + columns].T.reshape(-1) for array, column, columns in layout.pieces
    ])  # fmt: skip


def _unflatten_anywhere(flat: Array, *, layout: ArrayLayout) -> list[Array]:
    parts: list[dict[int, Array]] = [{} for _ in layout.shapes]
    rows, offset = layout.rows, 0
    for array, column, columns in layout.pieces:
        end = offset + columns * rows[array]
        part = flat[offset:end].reshape(columns, -1).T
        parts[array][column] = part.reshape(*layout.shapes[array][:-1], columns)
        offset = end
    return [jnp.concatenate([own[column] for column in sorted(own)], axis=-1) for own in parts]


def _lower_flatten(ctx: Any, *arrays: Any, layout: ArrayLayout) -> Any:
    dtype = ctx.avals_in[0].dtype.name
    return lower_to_handler(ctx, *arrays, job=TransposeJob(dtype, layout.to_vector(dtype)))


def _lower_unflatten(ctx: Any, flat: Any, *, layout: ArrayLayout) -> Any:
    dtype = ctx.avals_in[0].dtype.name
    return lower_to_handler(ctx, flat, job=TransposeJob(dtype, layout.from_vector(dtype)))


def _flatten_shape(*arrays: Any, layout: ArrayLayout) -> Any:
    return result_type(arrays[0], (layout.size,))


def _unflatten_shapes(flat: Any, *, layout: ArrayLayout) -> list[Any]:
    return [result_type(flat, shape) for shape in layout.shapes]


# Both are linear, and each is the other's transpose.


def _transpose_flatten(cotangent: Any, *arrays: Any, layout: ArrayLayout) -> list[Any]:
    if type(cotangent) is ad.Zero:
        return [ad.Zero(array.aval) if ad.is_undefined_primal(array) else None for array in arrays]
    parts = unflatten(cotangent, layout)
    return [part if ad.is_undefined_primal(array) else None for part, array in zip(parts, arrays, strict=True)]


def _transpose_unflatten(cotangents: Sequence[Any], flat: Any, *, layout: ArrayLayout) -> list[Any]:
    return [flatten(tuple(map(ad.instantiate_zeros, cotangents)), layout)]


def _jvp(primitive: Primitive, primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    dense = vary_alike(*map(ad.instantiate_zeros, tangents))
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
