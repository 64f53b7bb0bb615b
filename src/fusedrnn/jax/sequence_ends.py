"""Our rules for ``seq_lengths``, applied to results of flax's scan, which computes after the end of a sequence too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = Any
Carry = Any


def end_sequences(carry: Carry, outputs: Any, initial: Carry, lengths: Array, time_axis: int) -> tuple[Carry, Any]:
    """Make outputs after the end of a sequence zero, and the final carry of a length of 0 the initial carry.

    Args:
        carry: The final carry.
        outputs: The outputs (..., T, ...), an array or a tree of arrays.
        initial: The initial carry.
        lengths: The lengths, of the shape of the batch axes, which are the first axes of outputs without the time.
        time_axis: The axis of the time in outputs.
    """

    def end(y: Array) -> Array:
        steps = jnp.arange(y.shape[time_axis])
        valid = jnp.expand_dims(steps, range(1, 1 + lengths.ndim)) < lengths
        return _select(jnp.moveaxis(valid, 0, time_axis), y, 0)

    carry = jax.tree.map(lambda final, before: _select(lengths > 0, final, before), carry, initial)
    return carry, jax.tree.map(end, outputs)


def _select(mask: Array, chosen: Array, other: Any) -> Array:
    """By a mask of the first axes."""
    mask = mask.reshape(*mask.shape, *[1] * (chosen.ndim - mask.ndim))
    return jnp.where(mask, chosen, jnp.asarray(other, chosen.dtype))
