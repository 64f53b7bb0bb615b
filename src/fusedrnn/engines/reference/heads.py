"""Block-diagonal recurrent weights (G·H, H / heads) as full matrices (G·H, H), and back.

Row u of a gate has the columns of the head that unit u belongs to.
"""

from __future__ import annotations

import numpy as np

from fusedrnn.arrays import Array


def to_full(blocks: Array, hidden_size: int) -> Array:
    """The full matrix, with zeros beside the blocks."""
    size = blocks.shape[1]
    heads = hidden_size // size
    diagonal = np.eye(heads, dtype=blocks.dtype).reshape(heads, 1, heads, 1)
    full: Array = (blocks.reshape(-1, heads, size, 1, size) * diagonal).reshape(-1, hidden_size)
    return full


def to_blocks(full: Array, heads: int) -> Array:
    """The blocks of a full matrix."""
    size = full.shape[1] // heads
    by_head = full.reshape(-1, heads, size, heads, size)
    return np.stack([by_head[:, head, :, head] for head in range(heads)], axis=1).reshape(-1, size)
