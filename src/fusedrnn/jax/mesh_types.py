"""What the types of arrays say about a mesh of devices, for primitives inside of ``jax.shard_map``.

The type of an array names the mesh axes along which its values vary. The cast of a parameter to a varying one is where
JAX sums the parameter's gradient over devices. So a primitive casts its operands, and its results vary as they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

Array = Any
Axes = frozenset[Any]


def result_type(operand: Any, shape: Sequence[Any], dtype: Any = None) -> Any:
    """The type of a result of a primitive, which varies as an operand does; the operand is given by its type."""
    dtype = operand.dtype if dtype is None else dtype
    if not _is_on_mesh(operand):
        return jax.core.ShapedArray(shape, dtype)
    unsharded = NamedSharding(operand.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return operand.update(shape=shape, dtype=dtype, weak_type=False, sharding=unsharded)


def are_on_mesh(operands: Sequence[Array]) -> bool:
    """Whether the type of one of the arrays has a mesh."""
    # JAX 0.5 has no such types; its shard_map refuses primitives that it does not know.
    return hasattr(jax, "typeof") and any(_is_on_mesh(jax.typeof(operand)) for operand in operands)


def _is_on_mesh(own: Any) -> bool:
    sharding = getattr(own, "sharding", None)
    return sharding is not None and not sharding.mesh.empty


def vary_alike(*operands: Array) -> list[Array]:
    """The operands, each cast to vary along all mesh axes along which one of them varies.

    Raises:
        ValueError: If an operand is the terms of a sum over devices that is not taken yet.
    """
    if not are_on_mesh(operands):
        return list(operands)
    types = list(map(jax.typeof, operands))
    if any(_axes(own, "unreduced") for own in types):
        raise ValueError("an operand is unreduced, but a network is not linear: take the sum over devices first")
    # A cast from reduced to varying makes the cotangent unreduced, as it must be.
    axes = Axes().union(*(_varying(own) | _axes(own, "reduced") for own in types))
    return [_vary(operand, axes - _varying(own)) for operand, own in zip(operands, types, strict=True)]


def vary_with(array: Array, tree: Any) -> Any:
    """The arrays of a tree, each cast to vary along all mesh axes along which an array varies."""
    return jax.tree.map(lambda leaf: vary_alike(leaf, array)[0], tree)


def zeros_that_vary(like: Array, shape: Sequence[Any]) -> Array:
    """Zeros of the dtype of an array, which vary as it does."""
    zeros: Array = vary_with(like, jnp.zeros(shape, like.dtype))
    return zeros


def _varying(own: Any) -> Axes:
    return _axes(own, "varying") if hasattr(own, "manual_axis_type") else getattr(own, "vma", Axes())


def _axes(own: Any, kind: str) -> Axes:
    """The mesh axes of that kind in the type of an array; older releases than JAX 0.10 have only varying ones."""
    return Axes(getattr(getattr(own, "manual_axis_type", None), kind, ()))


def _vary(operand: Array, axes: Axes) -> Array:
    # The older function has been removed from newer releases.
    cast: Any = partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else vars(jax.lax).get("pvary")
    return reduce(cast, sorted(axes, key=str), operand)
