"""How the GEMMs of the weights' gradients group the rows of a block of steps, which they sum over.

A *group* is what one product of a GEMM sums over: one row, or a pair of rows where the target multiplies bfloat16. The
groups of an element's sum do not depend on how steps are divided into blocks.

Rows are numbered as in the table of their positions and in the transposed gradients.
"""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.bfloat16_products import Bfloat16DotProducts
from fusedrnn.engines.cpu.kernels.products import Products, gradient_format
from fusedrnn.engines.cpu.kernels.tile_gemm import GROUPS
from fusedrnn.engines.cpu.kernels.workspace import ROW_PAIR
from fusedrnn.jit.builder import Value
from fusedrnn.jit.target import Target
from fusedrnn.jit.tiles import ROW_BYTES, TILE_BYTES
from fusedrnn.jit.vector import Vectors

_PAIR = Bfloat16DotProducts.group
K_BLOCK_ROWS = GROUPS * _PAIR
"""Rows that an instruction of a target with tiles multiplies."""


def first_row_number(compute: str, target: Target) -> int:
    """The number of a block's first row. The rows that the block before it left have lower numbers."""
    return K_BLOCK_ROWS if target.multiplies_tiles(gradient_format(compute, target)) else 0


class RowGroups:
    """The groups of a block of steps. Here a group is one row."""

    def __init__(self, num_rows: Value) -> None:
        self._num_rows = num_rows

    @property
    def count(self) -> Value:
        """Groups that the GEMMs of this block multiply."""
        return self._num_rows

    def add_step(self, num_rows: Value) -> None:
        """Add the rows of a step; emitted in the loop over the block's steps."""

    def rows_of(self, group: Value) -> tuple[Value, Value]:
        """The first row of a group, and the number of its rows; if it is less than two, the others are zeros."""
        return group, group.function.constant(1)

    def join(self, vectors: Value) -> None:
        """Replace the vectors of a transposed gradient by groups, in place; the first group replaces vector 0."""

    def keep_rest(self, rows: Value, row_bytes: int) -> None:
        """Keep what an array has for the rows that are left for the next block; emitted after this block's GEMMs."""


class _Pairs(RowGroups):
    """A group is a pair of rows."""

    def __init__(self, num_rows: Value, v: Vectors, products: Products, zeros: Value) -> None:
        super().__init__(num_rows)
        self._v, self._products, self._zeros = v, products, zeros

    def join(self, vectors: Value) -> None:
        """See :class:`RowGroups`. A pair replaces its first row or an earlier one: all of them have been read."""
        v = self._v
        f = v.function
        with f.loop(0, self.count) as pair:
            row, num_rows = self.rows_of(pair)
            addresses = [vectors + (row + number) * v.bytes for number in range(_PAIR)]
            elements = [
                v.load((num_rows > number).select(address, self._zeros)) for number, address in enumerate(addresses)
            ]
            f.store(self._products.slot(elements), vectors + pair * v.bytes, v.bytes)


class StepPairs(_Pairs):
    """A group is a pair of rows of one step, or the last one and zeros. A table holds the pairs."""

    def __init__(self, num_rows: Value, v: Vectors, products: Products, zeros: Value, table: Value) -> None:
        super().__init__(num_rows, v, products, zeros)
        self._table = table
        self._next_row, self._num_pairs = v.function.var(0), v.function.var(0)

    @property
    def count(self) -> Value:
        """See :class:`RowGroups`."""
        return self._num_pairs.get()

    def add_step(self, num_rows: Value) -> None:
        """See :class:`RowGroups`."""
        f, first_row, num_pairs = self._v.function, self._next_row.get(), self._num_pairs
        with f.loop(0, num_rows, _PAIR) as row:
            pair = self._table + num_pairs.get() * ROW_PAIR.size
            f.store(first_row + row, pair + ROW_PAIR.offset("first_row"))
            f.store((num_rows - row).at_most(_PAIR), pair + ROW_PAIR.offset("num_rows"))
            num_pairs.set(num_pairs.get() + 1)
        self._next_row.set(first_row + num_rows)

    def rows_of(self, group: Value) -> tuple[Value, Value]:
        """See :class:`RowGroups`."""
        fields = ROW_PAIR.read(self._v.function, self._table + group * ROW_PAIR.size)
        return fields.first_row, fields.num_rows


class TilePairs(_Pairs):
    """A group is a pair of rows, and a *K-block* 32 rows, whatever their steps: as many as tiles multiply at once.

    Rows after the last whole K-block are left for the next block of steps; the last K-block of the sequence is filled
    up with zeros. The joined pairs of a K-block are a tile: a row for each unit.
    """

    def __init__(
        self, num_rows: Value, v: Vectors, products: Products, zeros: Value, rows_before: Value, is_last: Value
    ) -> None:
        super().__init__(num_rows, v, products, zeros)
        self._begin, self._end = K_BLOCK_ROWS - rows_before % K_BLOCK_ROWS, num_rows + K_BLOCK_ROWS
        rows = self._end - self._begin
        self._num_blocks = is_last.select(rows + (K_BLOCK_ROWS - 1), rows) // K_BLOCK_ROWS

    @property
    def count(self) -> Value:
        """See :class:`RowGroups`."""
        return self._num_blocks * GROUPS

    def rows_of(self, group: Value) -> tuple[Value, Value]:
        """See :class:`RowGroups`."""
        row = self._begin + group * _PAIR
        return row, (self._end - row).at_most(_PAIR)

    def join(self, vectors: Value) -> None:
        """See :class:`RowGroups`."""
        super().join(vectors)
        v = self._v
        with v.function.loop(0, self._num_blocks) as block:
            rows = [vectors + block * TILE_BYTES + unit * ROW_BYTES for unit in range(v.lanes)]
            for row, transposed in zip(rows, v.transpose_square(rows), strict=True):
                v.store(transposed, row)

    def keep_rest(self, rows: Value, row_bytes: int) -> None:
        """See :class:`RowGroups`. They end where the rows of the next block begin."""
        f = self._v.function
        begin = self._begin + self._num_blocks * K_BLOCK_ROWS
        into = rows + (begin - self._end + K_BLOCK_ROWS) * row_bytes
        with f.loop(begin, self._end) as row:
            f.copy(into + (row - begin) * row_bytes, rows + row * row_bytes, f.constant(row_bytes))
