"""Products of float32 rows and int8 weights, which are widened in registers: the format ``int8_weights``.

The methods are those of :class:`fusedrnn.engines.cpu.kernels.products.Products`.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusedrnn.jit.builder import Value
from fusedrnn.jit.int_vector import int_vector
from fusedrnn.jit.vector import Vectors


class WidenedInt8Products:
    """int8 in B, widened to float32 in registers; A is float32. Sums are float32, and scaled at the end."""

    group, unroll, speedup, reads_unpacked, converts_rows, has_scales, head = 1, 4, 0.8, False, False, True, 0

    def __init__(self, v: Vectors, a_step: int = 0) -> None:
        self.v, self.a_item, self.a_bytes, self.b_bytes = v, v.item, v.item, v.lanes

    def first_sum(self, c_in: Value, head: Value, align: int) -> Value:
        """Zeros: the initial accumulators are added after the sum is scaled."""
        return self.v.const(0.0)

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: list[list[Value]]) -> list[list[Value]]:
        """The sums plus the products of one element of each row."""
        v, int8 = self.v, int_vector(8, self.v.lanes)
        integers = [v.function.load(slot, int8, self.b_bytes).sext(v.itype) for slot in b_slots]
        b_vecs = [vector.sitofp(v.type) for vector in integers]
        result = []
        for address, row_sums in zip(a_rows, sums, strict=True):
            a_element = v.broadcast(address)
            result.append([v.fma(a_element, b_vec, total) for b_vec, total in zip(b_vecs, row_sums, strict=True)])
        return result

    def last_sum(self, total: Value, scales: Sequence[Value], c_in: Value, align: int) -> Value:
        """The sum times the scales of the columns, plus the initial accumulators. A row has no scale."""
        return self.v.fma(total, self.v.load(scales[1]), self.v.load(c_in, align))

    def slot(self, elements: Sequence[Value]) -> Value:
        """A vector of int8, from integers as float32."""
        (element,) = elements
        return element.fptosi(self.v.itype).trunc(int_vector(8, self.v.lanes))

    def head_sum(self, total: Value, slot: Value) -> Value:
        """There is no head."""
        return total

    def a_elements(self, x: Value) -> Value:
        """A row is not converted."""
        return x

    def unpacked_b(self, x: Value) -> Value:
        """Unpacked weights are not read."""
        return x

    def unpacked_a(self, row: Value, index: Value) -> Value:
        """An element of a row in every lane; unpacked weights are not read."""
        return self.v.broadcast(row + index * self.v.item)
