"""The dropout masks of :mod:`fusedrnn.dropout` as JAX arrays: the same elements for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from fusedrnn import dropout

Array = Any


def input_mask(seed: Array, p: float, layer: int, steps: int, batch: int, size: int) -> Array:
    """:func:`fusedrnn.dropout.mask` for the input of a layer; ``seed`` is its low and its high word, uint32 (2,)."""
    time = jnp.arange(steps, dtype=jnp.uint32)[:, None, None]
    return _mask(seed, p, time, dropout.input_stream(layer), batch, size)


def step_masks(
    seed: Array, keep: float, number: int, layer_dir: int, per_sequence: bool, steps: int, batch: int, size: int
) -> Array:
    """:func:`fusedrnn.dropout.step_mask` for every step, (T, N, size)."""
    time = jnp.arange(steps, dtype=jnp.uint32)[:, None, None]
    if per_sequence:
        time = jnp.full_like(time, dropout.step_word(None))
    return _mask(seed, 1.0 - keep, time, dropout.step_stream(number, layer_dir), batch, size)


def _mask(seed: Array, p: float, time: Array, stream: int, batch: int, size: int) -> Array:
    num_blocks = -(-size // dropout.WORDS)
    blocks = jnp.arange(num_blocks, dtype=jnp.uint32)[None, None, :]
    sequences = jnp.arange(batch, dtype=jnp.uint32)[None, :, None]
    counter = blocks, sequences, time, jnp.full((1, 1, 1), stream, jnp.uint32)
    words = jnp.stack(_philox(jnp.broadcast_arrays(*counter), (seed[0], seed[1])), axis=-1)
    kept = words >= jnp.uint32(dropout.threshold(p))
    return kept.reshape(*kept.shape[:2], dropout.WORDS * num_blocks)[:, :, :size]


def _philox(counter: Sequence[Array], key: Sequence[Array]) -> tuple[Array, ...]:
    a, b, c, d = counter
    for number in range(dropout.ROUNDS):
        weyl = [jnp.uint32(number * step & 0xFFFFFFFF) for step in dropout.WEYL]
        k0, k1 = (word + increment for word, increment in zip(key, weyl, strict=True))
        high_a, low_a = _multiply(a, dropout.MULTIPLIERS[0])
        high_c, low_c = _multiply(c, dropout.MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
    return a, b, c, d


def _multiply(words: Array, factor: int) -> tuple[Array, Array]:
    """The high and the low words of the products, computed by halves: JAX has 64-bit integers only on request."""
    half, low = jnp.uint32(16), jnp.uint32(0xFFFF)
    word_high, word_low = words >> half, words & low
    factor_high, factor_low = jnp.uint32(factor >> 16), jnp.uint32(factor & 0xFFFF)
    lowest = word_low * factor_low
    middle = word_high * factor_low + (lowest >> half)
    carried = word_low * factor_high + (middle & low)
    return word_high * factor_high + (middle >> half) + (carried >> half), words * jnp.uint32(factor)
