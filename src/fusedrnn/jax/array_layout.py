"""How a flat parameter vector lies in arrays of other layouts, such as those of Flax and Keras.

These keep weights as (inputs, gates·units), the operator as (gates·units, inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fusedrnn.engines.cpu.weights.transpose_kernel import Block


class Piece(NamedTuple):
    """Some columns of an array. They follow one another in the vector, each contiguous.

    Attributes:
        array: The number of the array.
        column: The first column.
        columns: How many.
    """

    array: int
    column: int
    columns: int


class ArrayLayout(NamedTuple):
    """Arrays whose columns are a flat vector.

    Attributes:
        shapes: The shapes of the arrays: matrices, or vectors, whose elements are columns of one row.
        pieces: Their columns in the order of the vector: each column of each array once.
    """

    shapes: tuple[tuple[int, ...], ...]
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> list[int]:
        """The rows of each array."""
        return [shape[0] if len(shape) == 2 else 1 for shape in self.shapes]

    @property
    def size(self) -> int:
        """Elements of the vector."""
        return sum(rows * shape[-1] for rows, shape in zip(self.rows, self.shapes, strict=True))

    def to_vector(self, dtype: str) -> tuple[Block, ...]:
        """The transposes of the arrays, buffers 0, 1, ..., into the vector, the buffer behind them."""
        item, vector = np.dtype(dtype).itemsize, len(self.shapes)
        return tuple(
            Block(
                p.array, p.column * item, self.shapes[p.array][-1] * item, vector, begin, rows * item, rows, p.columns
            )
            for p, rows, begin in self._places(item)
        )  # fmt: skip

    def from_vector(self, dtype: str) -> tuple[Block, ...]:
        """The transposes of the vector, buffer 0, into the arrays, the buffers behind it."""
        item = np.dtype(dtype).itemsize
        return tuple(
            Block(
                0, begin, rows * item, 1 + p.array, p.column * item, self.shapes[p.array][-1] * item, p.columns, rows
            )
            for p, rows, begin in self._places(item)
        )  # fmt: skip

    def _places(self, item: int) -> Iterator[tuple[Piece, int, int]]:
        """Each piece, the rows of its array, and where it begins in the vector, in bytes."""
        begin, all_rows = 0, self.rows
        for piece in self.pieces:
            rows = all_rows[piece.array]
            yield piece, rows, begin
            begin += rows * piece.columns * item
