"""Which elements dropout keeps: random numbers by counter, so that each element's is known from where it lies.

An element's number depends on the seed and its place alone, not on what was drawn before. Forward and backward, any
number of threads and any split of a batch therefore see the same mask, and none needs to be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""What is added to each word of the key from one round to the next."""
WORDS = 4
"""Random words for each counter, one for each of as many features."""
_LARGEST_WORD = 0xFFFFFFFF


def philox(counter: Sequence[Array], key: Sequence[int]) -> tuple[Array, ...]:
    """Philox4x32 with ten rounds: four random words for each counter of four words, under a key of two.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.

    Args:
        counter: Four arrays of uint32, none of no dimension, that broadcast with one another.
        key: Two numbers below 2**32.

    Returns:
        Four arrays of uint32.
    """
    a, b, c, d = counter
    for turn in range(ROUNDS):
        k0, k1 = (np.uint32((word + turn * weyl) & _LARGEST_WORD) for word, weyl in zip(key, WEYL, strict=True))
        high_a, low_a = _multiply(a, MULTIPLIERS[0])
        high_c, low_c = _multiply(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
    return a, b, c, d


def _multiply(words: Array, by: int) -> tuple[Array, Array]:
    """The high and the low word of the products."""
    product = words.astype(np.uint64) * np.uint64(by)
    return (product >> np.uint64(32)).astype(np.uint32), product.astype(np.uint32)


def threshold(p: float) -> int:
    """The random word from which on an element is kept, if it is dropped with probability ``p``.

    Whoever drops at all drops one word at least, and keeps one.
    """
    return min(max(round(p * 2**32), 1 if p > 0 else 0), _LARGEST_WORD)


def scale(p: float) -> float:
    """What the elements that are kept are multiplied by, so that the expected value stays: 1 / (1 - p)."""
    return 1.0 / (1.0 - p)


def mask(seed: int, p: float, layer: int, steps: int, batch: int, size: int) -> Array:
    """What is kept of a layer's output: booleans (T, N, size), True for kept.

    Feature j of sequence n at step t takes word j % 4 of the Philox block with the counter (j // 4, n, t, layer) and
    the seed's low and high word as key, and is kept if that is at least :func:`threshold`.

    Args:
        seed: Any number from 0 to 2**64 - 1.
        p: Probability in [0, 1) with which an element is dropped.
        layer: The layer whose output it is, from 0.
        steps: T.
        batch: N.
        size: Features of the output, both directions together.

    Raises:
        ValueError: If the seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1; got {seed}")
    key = (int(seed) & _LARGEST_WORD, int(seed) >> 32)
    blocks = np.arange(-(-size // WORDS), dtype=np.uint32)[None, :]
    sequences = np.arange(batch, dtype=np.uint32)[:, None]
    place = np.full((1, 1), layer, np.uint32)
    least = np.uint32(threshold(p))
    kept = np.empty((steps, batch, size), np.bool_)
    for t in range(steps):  # a step at a time: the words take ten times the memory of what comes of them
        words = philox((blocks, sequences, np.full((1, 1), t, np.uint32), place), key)
        kept[t] = (np.stack(words, axis=-1) >= least).reshape(batch, WORDS * blocks.size)[:, :size]
    return kept
