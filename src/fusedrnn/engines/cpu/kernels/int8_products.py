"""Products of int8, with exact int32 sums, and of float32 rows and int8 weights.

The methods are those of :class:`fusedrnn.engines.cpu.kernels.products.Products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fusedrnn.engines.cpu.kernels.accumulators import Accumulators, add_products
from fusedrnn.jit.builder import Value
from fusedrnn.jit.dot_products import add_int8_products
from fusedrnn.jit.int_vector import int_vector, shuffle
from fusedrnn.jit.vector import Vectors

_BYTE_BITS, _BYTE, _OFFSET, _BYTES_OF_128 = 8, 0xFF, 128, 0x80808080


class _QuantizedProducts:
    """int8 in B. There are no GEMMs on unpacked weights: the scale of a row of weights needs the whole row."""

    reads_unpacked, has_scales, head, tile_instruction = False, True, 0, ""

    def head_sum(self, total: Value, slot: Value) -> Value:
        """See ``Products``."""
        return total

    def unpacked_a(self, row: Value, index: Value) -> Value:
        """See ``Products``."""
        raise NotImplementedError

    def unpacked_b(self, x: Value) -> Value:
        """See ``Products``."""
        raise NotImplementedError


class Int8Products(_QuantizedProducts):
    """int8 in B, widened to int16 in registers; A is stored as int16. Sums of products of pairs are exact in int32."""

    group, unroll, speedup, converts_rows = 2, 1, 1.6, True

    def __init__(self, v: Vectors, a_step: int = 0) -> None:
        self.v, self.a_item, self.a_bytes, self.b_bytes = v, 2, 4, self.group * v.lanes

    def first_sum(self, c_in: Value, head: Value, align: int) -> Value:
        """See ``Products``."""
        return self.v.function.constant(0, self.v.itype)

    def a_elements(self, x: Value) -> Value:
        """See ``Products``."""
        return x.trunc(int_vector(16, self.v.lanes))

    def last_sum(self, total: Value, scales: Sequence[Value], c_in: Value, align: int) -> Value:
        """See ``Products``."""
        v, (row_scale, col_scales) = self.v, scales
        return v.fma(total.sitofp(v.type), v.load(col_scales) * v.broadcast(row_scale), v.load(c_in, align))

    def slot(self, elements: Sequence[Value]) -> Value:
        """See ``Products``. Elements are integers already."""
        low, high = (element.fptosi(self.v.itype) for element in elements)
        return ((low & 0xFF) | (high << 8)).trunc(int_vector(16, self.v.lanes))

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Accumulators) -> Accumulators:
        """See ``Products``. LLVM makes products and pairwise sums one instruction if the target has such a one."""
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

    A holds its elements plus 128. To undo this, the head of a panel holds -128 times the sum of each column.
    """

    group, unroll, speedup, head = 4, 2, 4.0, 1

    def __init__(self, v: Vectors, a_step: int = 0) -> None:
        super().__init__(v, a_step)
        self.a_item = 1

    def first_sum(self, c_in: Value, head: Value, align: int) -> Value:
        """See ``Products``."""
        return self.v.function.load(head, self.v.itype, self.v.bytes)

    def slot(self, elements: Sequence[Value]) -> Value:
        """See ``Products``. Elements are integers already."""
        result = elements[0].fptosi(self.v.itype) & _BYTE
        for number, element in enumerate(elements[1:], 1):
            result = result | ((element.fptosi(self.v.itype) & _BYTE) << (_BYTE_BITS * number))
        return result

    def head_sum(self, total: Value, slot: Value) -> Value:
        """See ``Products``. Adds -128 times the elements of the slot."""
        v = self.v
        minus_128 = v.function.constant(_BYTES_OF_128, v.itype)
        return total - add_int8_products(v, minus_128, slot, v.function.constant(0, v.itype))

    def a_elements(self, x: Value) -> Value:
        """See ``Products``."""
        return (x + _OFFSET).trunc(int_vector(8, self.v.lanes))

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Accumulators) -> Accumulators:
        """See ``Products``."""
        v = self.v
        b_vecs = [v.function.load(slot, v.itype, v.bytes) for slot in b_slots]
        groups = map(v.splat_word, a_rows)
        return add_products(groups, b_vecs, sums, partial(add_int8_products, v))


class Int8TileProducts(Int8DotProducts):
    """The same groups, multiplied by tiles."""

    speedup, tile_instruction = 32.0, "tdpbusd"


class WidenedInt8Products(_QuantizedProducts):
    """int8 in B, widened to float32 in registers; A is float32. Sums are float32, and scaled at the end."""

    group, unroll, speedup, converts_rows = 1, 4, 0.8, False

    def __init__(self, v: Vectors, a_step: int = 0) -> None:
        self.v, self.a_item, self.a_bytes, self.b_bytes = v, v.item, v.item, v.lanes

    def first_sum(self, c_in: Value, head: Value, align: int) -> Value:
        """Zeros: the initial accumulators are added after the sum is scaled."""
        return self.v.const(0.0)

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Accumulators) -> Accumulators:
        """The sums plus the products of one element of each row."""
        v, int8 = self.v, int_vector(8, self.v.lanes)
        integers = [v.function.load(slot, int8, self.b_bytes).sext(v.itype) for slot in b_slots]
        b_vecs = [vector.sitofp(v.type) for vector in integers]
        return add_products(map(v.broadcast, a_rows), b_vecs, sums, v.fma)

    def last_sum(self, total: Value, scales: Sequence[Value], c_in: Value, align: int) -> Value:
        """The sum times the scales of the columns, plus the initial accumulators. A row has no scale."""
        return self.v.fma(total, self.v.load(scales[1]), self.v.load(c_in, align))

    def slot(self, elements: Sequence[Value]) -> Value:
        """A vector of int8, from integers as float32."""
        (element,) = elements
        return element.fptosi(self.v.itype).trunc(int_vector(8, self.v.lanes))

    def a_elements(self, x: Value) -> Value:
        """A row is not converted."""
        return x


class WideInt8Products(WidenedInt8Products):
    """B holds integers as float32: results have the bits of :class:`WidenedInt8Products`, without conversions."""

    speedup = 1.0

    def __init__(self, v: Vectors, a_step: int = 0) -> None:
        super().__init__(v, a_step)
        self.b_bytes = v.bytes

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Accumulators) -> Accumulators:
        """The sums plus the products of one element of each row."""
        v = self.v
        return add_products(map(v.broadcast, a_rows), [v.load(slot) for slot in b_slots], sums, v.fma)

    def slot(self, elements: Sequence[Value]) -> Value:
        """A vector of integers as float32."""
        (element,) = elements
        return element
