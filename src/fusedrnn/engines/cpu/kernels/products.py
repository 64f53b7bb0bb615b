"""The innermost step of a GEMM in each number format: load operands, multiply, add to the accumulators.

The unit of k is a *group*: the adjacent elements that one step multiplies. For each group, a panel of B holds a slot of
``b_bytes`` for each vector of columns, and a row of A holds ``a_bytes``. The order of additions within a group is fixed,
so that every element of C is one chain whatever the tile.

| format | group | A | B | sums |
|---|---|---|---|---|
| float32, float64 | 1 | the same | the same | the same, one fused multiply-add |
| bfloat16 | 2 | float32 that was rounded | two bfloat16 for each column, the first in the low half | float32, rising k |
| int8 | 2 | int16 that holds int8 | two int8 for each column | int32, exact |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llvmlite import ir

from fusedrnn.jit.builder import I32, Value
from fusedrnn.jit.int_vector import shuffle
from fusedrnn.jit.vector import Vectors

_I8, _I16 = ir.IntType(8), ir.IntType(16)
_HALF_BITS, _HIGH_HALF = 16, -(1 << 16)


class Products(Protocol):
    """How a micro-kernel multiplies in one format.

    Attributes:
        group: Elements of k in a group.
        a_bytes, b_bytes: Bytes of a group in a row of A, and in a vector of columns of B.
        sum_type: The type of a vector of accumulators.
    """

    group: int
    a_bytes: int
    b_bytes: int
    sum_type: ir.Type

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: list[list[Value]]) -> list[list[Value]]:
        """The sums plus the products of a group.

        Args:
            a_rows: The address of the group in each row of A.
            b_slots: The address of the group in each vector of columns of B.
            sums: Accumulators by row and vector of columns.
        """


class FloatProducts:
    """float32 or float64: a group is one element."""

    group = 1

    def __init__(self, v: Vectors) -> None:
        self.v, self.a_bytes, self.b_bytes, self.sum_type = v, v.item, v.bytes, v.type

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: list[list[Value]]) -> list[list[Value]]:
        """See :class:`Products`."""
        v = self.v
        b_vecs = [v.load(slot) for slot in b_slots]
        return _add_outer_product(v, a_rows, b_vecs, sums)


class WidenedBfloat16Products:
    """bfloat16 in B, widened to float32 in registers; A has been rounded to bfloat16 and is stored as float32."""

    group = 2

    def __init__(self, v: Vectors) -> None:
        self.v, self.a_bytes, self.b_bytes, self.sum_type = v, 2 * v.item, v.bytes, v.type

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: list[list[Value]]) -> list[list[Value]]:
        """See :class:`Products`. The element in the low half is multiplied first."""
        v = self.v
        pairs = [v.function.load(slot, v.itype, v.bytes) for slot in b_slots]
        low = [(pair << _HALF_BITS).bitcast(v.type) for pair in pairs]
        sums = _add_outer_product(v, a_rows, low, sums)
        high = [(pair & _HIGH_HALF).bitcast(v.type) for pair in pairs]
        return _add_outer_product(v, [row + v.item for row in a_rows], high, sums)


class Int8Products:
    """int8 in B, widened to int16 in registers; A is stored as int16. Sums of products of pairs are exact in int32."""

    group = 2

    def __init__(self, v: Vectors) -> None:
        self.v, self.a_bytes, self.b_bytes = v, 4, 2 * v.lanes
        self.sum_type = ir.VectorType(I32, v.lanes)
        self._int16 = ir.VectorType(_I16, 2 * v.lanes)
        self._int32 = ir.VectorType(I32, 2 * v.lanes)

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: list[list[Value]]) -> list[list[Value]]:
        """See :class:`Products`. LLVM takes products and pairwise sums for one instruction where there is one."""
        f, lanes = self.v.function, self.v.lanes
        int8 = ir.VectorType(_I8, 2 * lanes)
        b_vecs = [f.load(slot, int8, self.b_bytes).sext(self._int16).sext(self._int32) for slot in b_slots]
        even, odd = range(0, 2 * lanes, 2), range(1, 2 * lanes, 2)
        result = []
        for a_row, row_sums in zip(a_rows, sums, strict=True):
            pair = self.v.splat_word(f.load(a_row, I32, 4)).bitcast(self._int16).sext(self._int32)
            products = [pair * b_vec for b_vec in b_vecs]
            result.append(
                [
                    total + (shuffle(product, product, even) + shuffle(product, product, odd))
                    for product, total in zip(products, row_sums, strict=True)
                ]
            )
        return result


def _add_outer_product(
    v: Vectors, a_elements: Sequence[Value], b_vecs: Sequence[Value], sums: list[list[Value]]
) -> list[list[Value]]:
    """The sums plus the products of one element of each row of A, by its address, and vectors of B."""
    result = []
    for address, row_sums in zip(a_elements, sums, strict=True):
        a_element = v.broadcast(address)
        result.append([v.fma(a_element, b_vec, total) for b_vec, total in zip(b_vecs, row_sums, strict=True)])
    return result
