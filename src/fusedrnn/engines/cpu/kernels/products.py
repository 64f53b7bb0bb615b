"""The innermost step of a GEMM in each number format: load operands, multiply, add to the accumulators.

The unit of k is a *group*: the adjacent elements that one step multiplies. For each group, a panel of B holds a slot of
``b_bytes`` for each vector of columns, and a row of A holds ``a_bytes``. The order of additions within a group is
fixed, so that every element of C is one chain whatever the tile.

- float32, float64: a group is one element. A, B and sums have that format.
- bfloat16: a group is two elements; a slot of B holds both of each column. Sums are float32, over rising k. A is
  float32 that was rounded, or bfloat16 where the target has a dot product of pairs. Where narrow weights do not pay, A
  and B are float32 that was rounded.
- int8: a group is two elements, of which a slot of B holds both of each column. A is int16 that holds int8; sums are
  int32, and exact. Where the target has a dot product of uint8 and int8, a group is four elements, and A holds them
  plus 128; a panel of B begins with initial accumulators that undo it.
- int8_weights: a group is one element. A is float32, B int8; sums are float32, over rising k, and scaled at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fusedrnn.engines.cpu.kernels.int8_weights import WidenedInt8Products
from fusedrnn.jit.builder import I16, I32, Value
from fusedrnn.jit.dot_products import add_bfloat16_products, add_int8_products
from fusedrnn.jit.int_vector import int_vector, shuffle
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import FLOAT, Vectors

STORAGE = {"float64": "float64", **dict.fromkeys(("float32", "bfloat16", "int8", "int8_weights"), "float32")}
"""The dtype of C by the format of the operands."""
SCALE_BYTES = 4
"""A quantized row of A lies right behind its scale, a float32."""
_HALF_BITS, _LOW_HALF, _HIGH_HALF = 16, 0xFFFF, -(1 << 16)
_BYTE_BITS, _BYTE, _OFFSET, _BYTES_OF_128 = 8, 0xFF, 128, 0x80808080
_BELOW_HALF, _QUIET_NAN = 0x7FFF, 0x400000

Sums = list[list[Value]]
"""Accumulators by row and vector of columns."""


class Products(Protocol):
    """How a micro-kernel multiplies in one format.

    Attributes:
        group: Elements of k in a group.
        unroll: Groups per iteration of the loop over k of whole panels; half as many for narrower tiles, which are many
            and do little of the work. Enough to hide the loop's own instructions, few enough for the registers.
        speedup: Products in the time of one of float32, for the cost model.
        converts_rows: Whether rows of A are converted before a GEMM reads them.
        reads_unpacked: Whether there are GEMMs on unpacked weights.
        has_scales: Whether columns of B have scales; rows of A have one each if they are converted too.
        head: Slots with which each vector of a panel begins, before those of the groups: initial accumulators.
        a_item: Bytes of an element of a converted row of A.
        a_bytes, b_bytes: Bytes of a group in a row of A, and in a vector of columns of B.
    """

    group: int
    unroll: int
    speedup: float
    converts_rows: bool
    reads_unpacked: bool
    has_scales: bool
    head: int
    a_item: int
    a_bytes: int
    b_bytes: int

    def first_sum(self, c_in: Value, head: Value, align: int) -> Value:
        """The accumulators of a vector of C before any product, by the addresses of C_in and of the panel's head."""

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Sums) -> Sums:
        """The sums plus the products of a group, by the group's address in each row of A and vector of B."""

    def last_sum(self, total: Value, scales: Sequence[Value], c_in: Value, align: int) -> Value:
        """A vector of C, from its accumulators and the addresses of the scales of its row and its columns."""

    def slot(self, elements: Sequence[Value]) -> Value:
        """What a slot of B holds, from the float vectors of its group."""

    def head_sum(self, total: Value, slot: Value) -> Value:
        """What the head of a vector of a panel holds, after another slot: it begins as zeros."""

    def a_elements(self, x: Value) -> Value:
        """What a row of A holds, from a float vector that was rounded or integers of a quantized row."""

    def unpacked_a(self, row: Value, index: Value) -> Value:
        """An element of a row of A in every lane, as float, for GEMMs on unpacked weights."""

    def unpacked_b(self, x: Value) -> Value:
        """A float vector of unpacked weights as it is multiplied."""


class FloatProducts:
    """float32 or float64: a group is one element. ``a_step`` is the distance of two elements of a row of A."""

    group, unroll, speedup, reads_unpacked, converts_rows, has_scales, head = 1, 4, 1.0, True, False, False, 0

    def __init__(self, v: Vectors, a_step: int) -> None:
        self.v, self.a_step, self.a_item, self.b_bytes = v, a_step, v.item, v.bytes
        self.a_bytes = self.group * a_step

    def first_sum(self, c_in: Value, head: Value, align: int) -> Value:
        """See :class:`Products`."""
        return self.v.load(c_in, align)

    def head_sum(self, total: Value, slot: Value) -> Value:
        """See :class:`Products`."""
        return total

    def a_elements(self, x: Value) -> Value:
        """See :class:`Products`."""
        return x

    def unpacked_a(self, row: Value, index: Value) -> Value:
        """See :class:`Products`."""
        return self.v.broadcast(row + index * self.v.item)

    def unpacked_b(self, x: Value) -> Value:
        """See :class:`Products`."""
        return x

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


class RoundedBfloat16Products(FloatProducts):
    """A and B have been rounded to bfloat16 and are stored as float32."""

    converts_rows = True

    def slot(self, elements: Sequence[Value]) -> Value:
        """See :class:`Products`. The element is rounded to nearest even."""
        return rounded_to_bfloat16(self.v, super().slot(elements))

    def unpacked_b(self, x: Value) -> Value:
        """See :class:`Products`. Weights are rounded to nearest even."""
        return rounded_to_bfloat16(self.v, x)


class WidenedBfloat16Products(RoundedBfloat16Products):
    """bfloat16 in B, widened to float32 in registers; A has been rounded to bfloat16 and is stored as float32."""

    group, unroll = 2, 2

    def slot(self, elements: Sequence[Value]) -> Value:
        """See :class:`Products`. Elements are rounded to nearest even."""
        return _pair_of_halves(self.v, [rounded_to_bfloat16(self.v, element) for element in elements])

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Sums) -> Sums:
        """See :class:`Products`. The element in the low half is multiplied first."""
        v = self.v
        pairs = [v.function.load(slot, v.itype, v.bytes) for slot in b_slots]
        sums = self._add_element(a_rows, [(pair << _HALF_BITS).bitcast(v.type) for pair in pairs], sums)
        high = [(pair & _HIGH_HALF).bitcast(v.type) for pair in pairs]
        return self._add_element([row + self.a_step for row in a_rows], high, sums)


class Bfloat16DotProducts(WidenedBfloat16Products):
    """Pairs of bfloat16, multiplied and added by one instruction, which takes the high half first."""

    group, unroll, speedup = 2, 2, 2.0

    def __init__(self, v: Vectors, a_step: int = 0) -> None:
        super().__init__(v, a_step)
        self.a_item, self.a_bytes = 2, 4

    def slot(self, elements: Sequence[Value]) -> Value:
        """See :class:`Products`. The first element is in the high half; both are rounded to nearest even."""
        return _pair_of_halves(self.v, [rounded_to_bfloat16(self.v, element) for element in reversed(elements)])

    def a_elements(self, x: Value) -> Value:
        """See :class:`Products`. The elements of each pair are exchanged, as in B."""
        halves = (x.bitcast(self.v.itype) >> _HALF_BITS).trunc(int_vector(16, self.v.lanes))
        return shuffle(halves, halves, [lane ^ 1 for lane in range(self.v.lanes)])

    def unpacked_a(self, row: Value, index: Value) -> Value:
        """See :class:`Products`."""
        v = self.v
        element = v.function.load(row + (index ^ 1) * self.a_item, I16, self.a_item)
        return v.splat((element.zext(I32) << _HALF_BITS).bitcast(FLOAT))

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Sums) -> Sums:
        """See :class:`Products`."""
        v = self.v
        b_vecs = [v.function.load(slot, v.itype, v.bytes) for slot in b_slots]
        result = []
        for address, row_sums in zip(a_rows, sums, strict=True):
            pair = v.splat_word(address)
            result.append(
                [add_bfloat16_products(v, total, pair, b_vec) for b_vec, total in zip(b_vecs, row_sums, strict=True)]
            )
        return result


class Int8Products:
    """int8 in B, widened to int16 in registers; A is stored as int16. Sums of products of pairs are exact in int32."""

    group, unroll, speedup, reads_unpacked, converts_rows, has_scales, head = 2, 1, 1.6, False, True, True, 0

    def __init__(self, v: Vectors, a_step: int = 0) -> None:
        self.v, self.a_item, self.a_bytes, self.b_bytes = v, 2, 4, self.group * v.lanes

    def first_sum(self, c_in: Value, head: Value, align: int) -> Value:
        """See :class:`Products`."""
        return self.v.function.constant(0, self.v.itype)

    def head_sum(self, total: Value, slot: Value) -> Value:
        """See :class:`Products`."""
        return total

    def a_elements(self, x: Value) -> Value:
        """See :class:`Products`."""
        return x.trunc(int_vector(16, self.v.lanes))

    def unpacked_a(self, row: Value, index: Value) -> Value:
        """See :class:`Products`. The scale of a row of weights needs the whole row."""
        raise NotImplementedError

    def unpacked_b(self, x: Value) -> Value:
        """See :class:`Products`."""
        raise NotImplementedError

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


class Int8DotProducts(Int8Products):
    """Groups of uint8 of A and int8 of B, multiplied and added by one instruction.

    A holds its elements plus 128, so that the head of a panel holds -128 times the sum of each column.
    """

    group, unroll, speedup, head = 4, 2, 4.0, 1

    def __init__(self, v: Vectors, a_step: int = 0) -> None:
        super().__init__(v, a_step)
        self.a_item = 1

    def first_sum(self, c_in: Value, head: Value, align: int) -> Value:
        """See :class:`Products`."""
        return self.v.function.load(head, self.v.itype, self.v.bytes)

    def slot(self, elements: Sequence[Value]) -> Value:
        """See :class:`Products`. Elements are integers already."""
        result = elements[0].fptosi(self.v.itype) & _BYTE
        for number, element in enumerate(elements[1:], 1):
            result = result | ((element.fptosi(self.v.itype) & _BYTE) << (_BYTE_BITS * number))
        return result

    def head_sum(self, total: Value, slot: Value) -> Value:
        """See :class:`Products`. Adds -128 times the elements of the slot."""
        v = self.v
        minus_128 = v.function.constant(_BYTES_OF_128, v.itype)
        return total - add_int8_products(v, v.function.constant(0, v.itype), minus_128, slot)

    def a_elements(self, x: Value) -> Value:
        """See :class:`Products`."""
        return (x + _OFFSET).trunc(int_vector(8, self.v.lanes))

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Sums) -> Sums:
        """See :class:`Products`."""
        v = self.v
        b_vecs = [v.function.load(slot, v.itype, v.bytes) for slot in b_slots]
        result = []
        for address, row_sums in zip(a_rows, sums, strict=True):
            group = v.splat_word(address)
            result.append(
                [add_int8_products(v, total, group, b_vec) for b_vec, total in zip(b_vecs, row_sums, strict=True)]
            )
        return result


ProductsClass = type[FloatProducts] | type[Int8Products] | type[WidenedInt8Products]
PRODUCTS: dict[str, ProductsClass] = {
    "float32": FloatProducts, "float64": FloatProducts, "bfloat16": WidenedBfloat16Products,
    "int8": Int8Products, "int8_weights": WidenedInt8Products,
}  # fmt: skip
"""By format of operands, on every target."""
_DOT_PRODUCTS: dict[str, ProductsClass] = {"bfloat16": Bfloat16DotProducts, "int8": Int8DotProducts}


def products_class(compute: str, target: Target) -> ProductsClass:
    """The products of a format of operands with a target's instructions."""
    if not target.narrow_weights:
        return RoundedBfloat16Products
    return (_DOT_PRODUCTS if compute in target.dot_products else PRODUCTS)[compute]


def products_of(compute: str, v: Vectors, a_step: int = 0) -> Products:
    """The products of a format of operands; ``a_step`` is the distance of two elements of a row of A in bytes."""
    products: Products = products_class(compute, v.target)(v, a_step)
    return products


def _pair_of_halves(v: Vectors, pair: Sequence[Value]) -> Value:
    """Vectors of two rounded numbers in one: the first in the low half of each lane."""
    low, high = (element.bitcast(v.itype) for element in pair)
    return ((low >> _HALF_BITS) & _LOW_HALF) | high


def rounded_to_bfloat16(v: Vectors, x: Value) -> Value:
    """A float32 vector rounded to bfloat16, to nearest even, as float32; NaN stays NaN."""
    bits = x.bitcast(v.itype)
    lowest_kept_bit = (bits >> _HALF_BITS) & 1
    nearest = bits + (lowest_kept_bit + _BELOW_HALF)
    return (x.equals(x).select(nearest, bits | _QUIET_NAN) & _HIGH_HALF).bitcast(v.type)
