"""The dropout mask, from counter-based random numbers.

An element's random number depends only on the seed and on the element's position. So forward and backward, any number
of threads and any partition of a batch have the same mask, and no mask is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusedrnn.arrays import Array

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""Increments of the two words of the key from one round to the next."""
WORDS = 4
"""The number of random words of a counter: one for each of four features."""
INPUT_STREAM = 0xFFFF
"""The word of the counter for the mask of the network's input; for a layer's output it is the layer's index."""
_MAX_WORD = 0xFFFFFFFF


def philox(counter: Sequence[Array], key: Sequence[int]) -> tuple[Array, ...]:
    """Philox4x32 with ten rounds: four random words for each counter of four words, under a key of two.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.

    Args:
        counter: Four arrays of uint32, each of at least one dimension, that broadcast with each other.
        key: Two numbers below 2**32.

    Returns:
        Four arrays of uint32.
    """
    a, b, c, d = counter
    for number in range(ROUNDS):
        k0, k1 = (np.uint32((word + number * weyl) & _MAX_WORD) for word, weyl in zip(key, WEYL, strict=True))
        high_a, low_a = _multiply(a, MULTIPLIERS[0])
        high_c, low_c = _multiply(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
    return a, b, c, d


def _multiply(words: Array, factor: int) -> tuple[Array, Array]:
    """The high and the low words of the products."""
    product = words.astype(np.uint64) * np.uint64(factor)
    return (product >> np.uint64(32)).astype(np.uint32), product.astype(np.uint32)


def threshold(p: float) -> int:
    """The smallest random word for which an element is kept, where ``p`` is the probability to drop it.

    For p > 0, at least one word drops the element and at least one keeps it.
    """
    return min(max(round(p * 2**32), 1 if p > 0 else 0), _MAX_WORD)


def scale(p: float) -> float:
    """The factor of the elements that are kept, which preserves the expected value: 1 / (1 - p)."""
    return 1.0 / (1.0 - p)


def mask(seed: int, p: float, layer: int, steps: int, batch: int, size: int) -> Array:
    """The mask of the input of a layer: booleans (T, N, size), True for elements that are kept.

    Feature j of sequence n at step t uses word j % 4 of a Philox block. The counter of the block is (j // 4, n, t,
    layer), and the key is the seed's low and high words. The feature is kept if that word is at least
    :func:`threshold`.

    Args:
        seed: A number from 0 to 2**64 - 1.
        p: Probability in [0, 1) with which an element is dropped.
        layer: The index of the layer whose output is masked; :data:`INPUT_STREAM` for the network's input.
        steps: T.
        batch: N.
        size: The number of features of the input, or of the output of both directions together.

    Raises:
        ValueError: If the seed is out of range.
    """
    key = _key(seed)
    blocks = np.arange(-(-size // WORDS), dtype=np.uint32)[None, :]
    sequences = np.arange(batch, dtype=np.uint32)[:, None]
    layers = np.full((1, 1), layer, np.uint32)
    first_kept = np.uint32(threshold(p))
    kept = np.empty((steps, batch, size), np.bool_)
    for t in range(steps):  # step by step, since the words take ten times the memory of the mask
        words = philox((blocks, sequences, np.full((1, 1), t, np.uint32), layers), key)
        kept[t] = (np.stack(words, axis=-1) >= first_kept).reshape(batch, WORDS * blocks.size)[:, :size]
    return kept


def step_mask(seed: int, keep: float, number: int, layer_dir: int, time: int | None, batch: int, size: int) -> Array:
    """A mask inside a step of a cell: booleans (N, size), True with probability ``keep``.

    Unit j of sequence n at step t uses word j % 4 of a Philox block. The counter of the block is (j // 4, n, t, s),
    where s is (number + 1) · 65536 + layer_dir, and the key is the seed's low and high words. A mask of whole sequences
    has 2**32 - 1 for t. An element is True if its word is at least the :func:`threshold` of 1 - ``keep``.

    Args:
        seed: A number from 0 to 2**64 - 1.
        keep: Probability in (0, 1] of True.
        number: The number of the mask among the masks of its cell, in the order of their names.
        layer_dir: layer · D + direction.
        time: The step; None for a mask of whole sequences.
        batch: N.
        size: H.

    Raises:
        ValueError: If the seed is out of range.
    """
    words = [np.full((1, 1), word, np.uint32) for word in (step_word(time), step_stream(number, layer_dir))]
    blocks = np.arange(-(-size // WORDS), dtype=np.uint32)[None, :]
    drawn = philox((blocks, np.arange(batch, dtype=np.uint32)[:, None], *words), _key(seed))
    kept: Array = np.stack(drawn, axis=-1) >= np.uint32(threshold(1.0 - keep))
    return kept.reshape(batch, WORDS * blocks.size)[:, :size]


def input_stream(layer: int) -> int:
    """The word of the counter for the mask of a layer's input."""
    return layer - 1 if layer else INPUT_STREAM


def step_word(time: int | None) -> int:
    """The word of the counter for a step; None stands for a mask of whole sequences."""
    return _MAX_WORD if time is None else time


def step_stream(number: int, layer_dir: int) -> int:
    """The word of the counter for a cell's mask in a layer-direction; masks between layers have lower words."""
    return (number + 1 << 16) + layer_dir


def _key(seed: int) -> tuple[int, int]:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1; got {seed}")
    return int(seed) & _MAX_WORD, int(seed) >> 32
