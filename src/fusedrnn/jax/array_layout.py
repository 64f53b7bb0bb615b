"""The order in which the elements of a flat parameter vector are stored in arrays such as those of Flax and Keras.

These frameworks store weights as (inputs, gates·units), the operator stores them as (gates·units, inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fusedrnn.engines.cpu.weights.transpose_kernel import Block


class Piece(NamedTuple):
    """Adjacent columns of an array. In the vector they follow one another, each contiguous.

    Attributes:
        array: The number of the array.
        column: The first column.
        columns: The number of columns.
    """

    array: int
    column: int
    columns: int


class ArrayLayout(NamedTuple):
    """Arrays whose columns make up a flat vector.

    Attributes:
        shapes: The shapes of the arrays, which are matrices or vectors; a vector counts as a matrix of one row.
        pieces: All columns of all arrays, each once, in the order of the vector.
    """

    shapes: tuple[tuple[int, ...], ...]
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> list[int]:
        """The rows of each array."""
        return [shape[0] if len(shape) == 2 else 1 for shape in self.shapes]

    @property
    def size(self) -> int:
        """The number of elements of the vector."""
        return sum(rows * shape[-1] for rows, shape in zip(self.rows, self.shapes, strict=True))

    def to_vector(self, dtype: str) -> tuple[Block, ...]:
        """The transposes from the arrays, which are buffers 0, 1, ..., to the vector, which is the last buffer."""
        item, vector = np.dtype(dtype).itemsize, len(self.shapes)
        return tuple(
            Block(
                p.array, p.column * item, self.shapes[p.array][-1] * item, vector, begin, rows * item, rows, p.columns
            )
            for p, rows, begin in self._places(item)
        )  # fmt: skip

    def from_vector(self, dtype: str) -> tuple[Block, ...]:
        """The transposes from the vector, which is buffer 0, to the arrays, which are the buffers after it."""
        item = np.dtype(dtype).itemsize
        return tuple(
            Block(
                0, begin, rows * item, 1 + p.array, p.column * item, self.shapes[p.array][-1] * item, p.columns, rows
            )
            for p, rows, begin in self._places(item)
        )  # fmt: skip

    def _places(self, item: int) -> Iterator[tuple[Piece, int, int]]:
        """Each piece, the number of rows of its array, and its offset in the vector in bytes."""
        begin, all_rows = 0, self.rows
        for piece in self.pieces:
            rows = all_rows[piece.array]
            yield piece, rows, begin
            begin += rows * piece.columns * item
