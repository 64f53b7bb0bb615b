"""The flat parameter vector from the arrays of a parameter tree."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fusedrnn.spec import RNNSpec

Array = Any

_cache: dict[tuple[Any, ...], tuple[list[Any], Array]] = {}
"""Vectors by spec and by the identities of their arrays, each with the weak references that remove it."""


def flat_params(
    spec: RNNSpec, arrays: Sequence[Array], join: Callable[[RNNSpec, Sequence[Array]], Array]
) -> Array:
    """The parameters of a network of one layer as one vector of ``spec.dtype``.

    Outside of JAX's transforms a vector is kept as long as all of its arrays live: inference does not build it again.

    Args:
        spec: The network.
        arrays: The arrays of the parameter tree. They may be traced.
        join: Makes the vector of them, of ``spec.dtype``. It must be the same function in each call with the same
            arrays.

    Returns:
        The vector (``spec.layout.size``,).
    """
    if not all(isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) for array in arrays):
        return join(spec, arrays)
    key = spec, *map(id, arrays)
    if (cached := _cache.get(key)) is not None:
        return cached[1]
    flat = join(spec, arrays)
    # Inside of jit even operations on constants are traced.
    if not isinstance(flat, jax.core.Tracer):
        _cache[key] = [weakref.ref(array, lambda _: _cache.pop(key, None)) for array in arrays], flat
    return flat
