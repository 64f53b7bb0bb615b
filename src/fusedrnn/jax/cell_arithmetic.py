"""The operations of cells on JAX's arrays, with the derivatives that the kernels have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fusedrnn.cell.primitives import ArrayArithmetic

Array = Any


def _clip(x: Array, low: float, high: float) -> Array:
    return _between(x, low, high, jnp.clip(x, low, high))


def _clip_nan(x: Array, low: float, high: float) -> Array:
    return _between(x, low, high, jnp.where(jnp.isnan(x), low, jnp.clip(x, low, high)))


def _between(x: Array, low: float, high: float, clipped: Array) -> Array:
    """``clipped``, whose derivative is 1 at the bounds too, where that of JAX's clip is 1/2."""
    return jnp.where((low <= x) & (x <= high), x, jax.lax.stop_gradient(clipped))


def _absolute(x: Array) -> Array:
    """The absolute value, whose derivative at 0 is 0, where that of JAX's is 1."""
    return jnp.where(x < 0, -x, jnp.where(x == 0, 0, x))


@jax.custom_jvp
def _softplus(x: Array) -> Array:
    return jax.nn.softplus(x)


# In a scan, the second derivative of JAX's softplus at 0 is 1/2 instead of 1/4.
_softplus.defjvps(lambda tangent, y, x: tangent * jax.nn.sigmoid(x))

ARITHMETIC = ArrayArithmetic(
    jnp,
    {
        "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu, "softplus": _softplus, "abs": _absolute,
        "clip": _clip, "clip_nan": _clip_nan,
        # Where the operands are equal, each has half of the derivative.
        "maximum": jnp.maximum, "minimum": jnp.minimum,
    },
)  # fmt: skip
"""Evaluates expressions on JAX's arrays."""
