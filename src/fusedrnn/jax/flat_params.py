"""The flat parameter vector from the arrays of a parameter tree."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fusedrnn.layout import Kind
from fusedrnn.spec import RNNSpec

Array = Any
ByKind = Mapping[Kind, Array]
"""The parameters of one layer in one direction."""

_cache: dict[tuple[Any, ...], tuple[list[Any], Array]] = {}
"""Vectors by spec and by the identities of their arrays, each with the weak references that remove it."""


def flat_params(
    spec: RNNSpec, arrays: Sequence[Array], arrange: Callable[[RNNSpec, Sequence[Array]], Sequence[ByKind]]
) -> Array:
    """The parameters of a network of one layer as one vector of ``spec.dtype``.

    Outside of JAX's transforms a vector is kept as long as all of its arrays live: inference does not build it again.

    Args:
        spec: The network.
        arrays: The arrays of the parameter tree. They may be traced.
        arrange: Makes of them the parameters of each direction by kind, each of the size that ``spec.layout`` says. It
            must be the same function in each call with the same arrays.

    Returns:
        The vector (``spec.layout.size``,).
    """
    if not all(isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) for array in arrays):
        return _join(spec, arrange(spec, arrays))
    key = spec, *map(id, arrays)
    if (cached := _cache.get(key)) is not None:
        return cached[1]
    flat = _join(spec, arrange(spec, arrays))
    # Inside of jit even operations on constants are traced.
    if not isinstance(flat, jax.core.Tracer):
        _cache[key] = [weakref.ref(array, lambda _: _cache.pop(key, None)) for array in arrays], flat
    return flat


def _join(spec: RNNSpec, directions: Sequence[ByKind]) -> Array:
    pieces = [directions[entry.direction][entry.kind].reshape(-1) for entry in spec.layout]
    return jnp.concatenate([piece.astype(spec.dtype) for piece in pieces])
