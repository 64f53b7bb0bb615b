"""Flax's scan, with our rules for ``seq_lengths``: it computes after the end of a sequence too."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fusedrnn.jax.rnn import check_range

Array = Any
Carry = Any


def run_scan(
    layer: Any, inputs: Array, *, initial_carry: Carry, seq_lengths: Array | None, return_carry: bool,
    time_major: bool, **options: Any,
) -> Any:  # fmt: skip
    """Run flax's scan of a layer of the class ``nnx.RNN`` or ours; with ``seq_lengths``, by our rules.

    Outputs after the end of a sequence are zero, and the final carry of a length of 0 is the initial carry, which these
    rules need. ``options`` are the other arguments of the layer's call.

    Raises:
        ValueError: If a length is known and not from 0 to T.
    """
    options |= {"return_carry": return_carry, "time_major": time_major}
    if seq_lengths is None:
        return _flax_call(layer, inputs, initial_carry, None, **options)
    time_axis, shape = without_time(layer, inputs, time_major)
    check_range(seq_lengths, inputs.shape[time_axis])
    batch = shape[: -layer.cell.num_feature_axes]
    lengths = jnp.broadcast_to(seq_lengths, batch)
    if return_carry and len(batch) > 1:
        result = _with_one_batch_axis(layer, inputs, initial_carry, lengths, **options)
    else:
        result = _flax_call(layer, inputs, initial_carry, seq_lengths, **options)

    def end(y: Array) -> Array:
        steps = jnp.arange(y.shape[time_axis])
        valid = jnp.expand_dims(steps, range(1, 1 + lengths.ndim)) < lengths[None]
        return _select(jnp.moveaxis(valid, 0, time_axis), y, 0)

    if not return_carry:
        return jax.tree.map(end, result)
    carry, outputs = result
    carry = jax.tree.map(lambda final, before: _select(lengths > 0, final, before), carry, initial_carry)
    return carry, jax.tree.map(end, outputs)


def _flax_call(layer: Any, inputs: Array, initial_carry: Carry, seq_lengths: Array | None, **options: Any) -> Any:
    # Not by super(), as Bidirectional passes layers of flax's class too.
    return nnx.RNN.__call__(layer, inputs, initial_carry=initial_carry, seq_lengths=seq_lengths, **options)


def _with_one_batch_axis(
    layer: Any, inputs: Array, initial_carry: Carry, lengths: Array, *, time_major: bool, **options: Any
) -> tuple[Carry, Any]:
    """Flax's call with the batch axes joined to one, as flax takes the final carry of each length along one axis."""
    size, ndim, batch_axis = math.prod(lengths.shape), lengths.ndim, int(time_major)

    def join(array: Array, axis: int = 0) -> Array:
        return array.reshape(*array.shape[:axis], size, *array.shape[axis + ndim :])

    def split(array: Array, axis: int = 0) -> Array:
        return array.reshape(*array.shape[:axis], *lengths.shape, *array.shape[axis + 1 :])

    carry, outputs = _flax_call(
        layer, join(inputs, batch_axis), jax.tree.map(join, initial_carry), join(lengths), time_major=time_major,
        **options,
    )  # fmt: skip
    return jax.tree.map(split, carry), jax.tree.map(lambda y: split(y, batch_axis), outputs)


def without_time(layer: Any, inputs: Array, time_major: bool) -> tuple[int, tuple[int, ...]]:
    """The axis of the time in the inputs of a layer, and their shape without it: batch axes, then feature axes."""
    time_axis = 0 if time_major else inputs.ndim - 1 - layer.cell.num_feature_axes
    return time_axis, inputs.shape[:time_axis] + inputs.shape[time_axis + 1 :]


def _select(mask: Array, chosen: Array, other: Any) -> Array:
    """By a mask of the first axes."""
    mask = mask.reshape(*mask.shape, *[1] * (chosen.ndim - mask.ndim))
    return jnp.where(mask, chosen, jnp.asarray(other, chosen.dtype))
