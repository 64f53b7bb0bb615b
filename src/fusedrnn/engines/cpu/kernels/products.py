"""The innermost step of a GEMM in each number format: load operands, multiply, add to the accumulators.

The unit of k is a *group*: the adjacent elements that one step multiplies. For each group, a panel of B holds a slot of
``b_bytes`` for each vector of columns, and a row of A holds ``a_bytes``. The order of additions within a group is
fixed, so that every element of C is one chain whatever the tile.

- float32, float64: a group is one element. A, B and sums have that format.
- bfloat16: a group is two elements. A is float32 that was rounded; a slot of B holds two bfloat16 for each column, the
  first in the low half; sums are float32, over rising k.
- int8: a group is two elements. A is int16 that holds int8; a slot of B holds two int8 for each column; sums are int32,
  and exact.
- int8_weights: a group is one element. A is float32, B int8; sums are float32, over rising k, and scaled at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fusedrnn.engines.cpu.kernels.int8_weights import WidenedInt8Products
from fusedrnn.jit.builder import Value
from fusedrnn.jit.int_vector import int_vector, shuffle
from fusedrnn.jit.vector import Vectors

STORAGE = {"float64": "float64", **dict.fromkeys(("float32", "bfloat16", "int8", "int8_weights"), "float32")}
"""The dtype of C by the format of the operands."""
SCALE_BYTES = 4
"""A quantized row of A lies right behind its scale, a float32."""
_HALF_BITS, _LOW_HALF, _HIGH_HALF = 16, 0xFFFF, -(1 << 16)
_BELOW_HALF, _QUIET_NAN = 0x7FFF, 0x400000

Sums = list[list[Value]]
"""Accumulators by row and vector of columns."""


class Products(Protocol):
    """How a micro-kernel multiplies in one format.

    Attributes:
        group: Elements of k in a group.
        converts_rows: Whether rows of A are converted before a GEMM reads them.
        has_scales: Whether columns of B have scales; rows of A have one each if they are converted too.
        a_bytes, b_bytes: Bytes of a group in a row of A, and in a vector of columns of B.
    """

    group: int
    converts_rows: bool
    has_scales: bool
    a_bytes: int
    b_bytes: int

    def first_sum(self, c_in: Value, align: int) -> Value:
        """The accumulators of a vector of C, before any product."""

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Sums) -> Sums:
        """The sums plus the products of a group, by the group's address in each row of A and vector of B."""

    def last_sum(self, total: Value, scales: Sequence[Value], c_in: Value, align: int) -> Value:
        """A vector of C, from its accumulators and the addresses of the scales of its row and its columns."""

    def slot(self, elements: Sequence[Value]) -> Value:
        """What a slot of B holds, from the float vectors of its group."""


class FloatProducts:
    """float32 or float64: a group is one element. ``a_step`` is the distance of two elements of a row of A."""

    group, converts_rows, has_scales = 1, False, False

    def __init__(self, v: Vectors, a_step: int) -> None:
        self.v, self.a_step, self.b_bytes = v, a_step, v.bytes
        self.a_bytes = self.group * a_step

    def first_sum(self, c_in: Value, align: int) -> Value:
        """See :class:`Products`."""
        return self.v.load(c_in, align)

    def last_sum(self, total: Value, scales: Sequence[Value], c_in: Value, align: int) -> Value:
        """See :class:`Products`."""
        return total

    def slot(self, elements: Sequence[Value]) -> Value:
        """See :class:`Products`."""
        (element,) = elements
        return element

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Sums) -> Sums:
        """See :class:`Products`."""
        return self._add_element(a_rows, [self.v.load(slot) for slot in b_slots], sums)

    def _add_element(self, a_rows: Sequence[Value], b_vecs: Sequence[Value], sums: Sums) -> Sums:
        """The sums plus the products of one element of each row of A, by its address, and vectors of B."""
        result = []
        for address, row_sums in zip(a_rows, sums, strict=True):
            a_element = self.v.broadcast(address)
            result.append([self.v.fma(a_element, b_vec, total) for b_vec, total in zip(b_vecs, row_sums, strict=True)])
        return result


class WidenedBfloat16Products(FloatProducts):
    """bfloat16 in B, widened to float32 in registers; A has been rounded to bfloat16 and is stored as float32."""

    group, converts_rows = 2, True

    def slot(self, elements: Sequence[Value]) -> Value:
        """See :class:`Products`. Elements are rounded to nearest even."""
        low, high = (rounded_to_bfloat16(self.v, element).bitcast(self.v.itype) for element in elements)
        return ((low >> _HALF_BITS) & _LOW_HALF) | high

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Sums) -> Sums:
        """See :class:`Products`. The element in the low half is multiplied first."""
        v = self.v
        pairs = [v.function.load(slot, v.itype, v.bytes) for slot in b_slots]
        sums = self._add_element(a_rows, [(pair << _HALF_BITS).bitcast(v.type) for pair in pairs], sums)
        high = [(pair & _HIGH_HALF).bitcast(v.type) for pair in pairs]
        return self._add_element([row + self.a_step for row in a_rows], high, sums)


class Int8Products:
    """int8 in B, widened to int16 in registers; A is stored as int16. Sums of products of pairs are exact in int32."""

    group, converts_rows, has_scales = 2, True, True

    def __init__(self, v: Vectors, a_step: int = 0) -> None:
        self.v, self.a_bytes, self.b_bytes = v, 4, 2 * v.lanes

    def first_sum(self, c_in: Value, align: int) -> Value:
        """See :class:`Products`."""
        return self.v.function.constant(0, int_vector(32, self.v.lanes))

    def last_sum(self, total: Value, scales: Sequence[Value], c_in: Value, align: int) -> Value:
        """See :class:`Products`."""
        v, (row_scale, col_scales) = self.v, scales
        return v.fma(total.sitofp(v.type), v.load(col_scales) * v.broadcast(row_scale), v.load(c_in, align))

    def slot(self, elements: Sequence[Value]) -> Value:
        """See :class:`Products`. Elements are integers already."""
        low, high = (element.fptosi(self.v.itype) for element in elements)
        return ((low & 0xFF) | (high << 8)).trunc(int_vector(16, self.v.lanes))

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Sums) -> Sums:
        """See :class:`Products`. LLVM takes products and pairwise sums for one instruction where there is one."""
        f, pairs = self.v.function, 2 * self.v.lanes
        int8, int16, int32 = (int_vector(bits, pairs) for bits in (8, 16, 32))
        b_vecs = [f.load(slot, int8, self.b_bytes).sext(int16).sext(int32) for slot in b_slots]
        even, odd = range(0, pairs, 2), range(1, pairs, 2)
        result = []
        for address, row_sums in zip(a_rows, sums, strict=True):
            pair = self.v.splat_word(address).bitcast(int16).sext(int32)
            products = [pair * b_vec for b_vec in b_vecs]
            pair_sums = [shuffle(product, product, even) + shuffle(product, product, odd) for product in products]
            result.append([total + pair_sum for total, pair_sum in zip(row_sums, pair_sums, strict=True)])
        return result


ProductsClass = type[FloatProducts] | type[Int8Products] | type[WidenedInt8Products]
PRODUCTS: dict[str, ProductsClass] = {
    "float32": FloatProducts, "float64": FloatProducts, "bfloat16": WidenedBfloat16Products,
    "int8": Int8Products, "int8_weights": WidenedInt8Products,
}  # fmt: skip
"""By format of operands."""


def products_of(compute: str, v: Vectors, a_step: int = 0) -> Products:
    """The products of a format of operands; ``a_step`` is the distance of two elements of a row of A in bytes."""
    products: Products = PRODUCTS[compute](v, a_step)
    return products


def rounded_to_bfloat16(v: Vectors, x: Value) -> Value:
    """A float32 vector rounded to bfloat16, to nearest even, as float32; NaN stays NaN."""
    bits = x.bitcast(v.itype)
    lowest_kept_bit = (bits >> _HALF_BITS) & 1
    nearest = bits + (lowest_kept_bit + _BELOW_HALF)
    return (x.equals(x).select(nearest, bits | _QUIET_NAN) & _HIGH_HALF).bitcast(v.type)
