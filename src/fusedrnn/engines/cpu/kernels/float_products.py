"""Products of float32 or float64. The methods are those of :class:`fusedrnn.engines.cpu.kernels.products.Products`."""

from __future__ import annotations

from collections.abc import Sequence

from fusedrnn.engines.cpu.kernels.accumulators import Accumulators, add_products
from fusedrnn.jit.builder import Value
from fusedrnn.jit.vector import Vectors


class FloatProducts:
    """float32 or float64: a group is one element. ``a_step`` is the distance of two elements of a row of A."""

    group, unroll, speedup, head = 1, 4, 1.0, 0
    reads_unpacked, converts_rows, has_scales = True, False, False
    tile_instruction = ""

    def __init__(self, v: Vectors, a_step: int) -> None:
        self.v, self.a_step, self.a_item, self.b_bytes = v, a_step, v.item, v.bytes
        self.a_bytes = self.group * a_step

    def first_sum(self, c_in: Value, head: Value, align: int) -> Value:
        """See ``Products``."""
        return self.v.load(c_in, align)

    def head_sum(self, total: Value, slot: Value) -> Value:
        """See ``Products``."""
        return total

    def a_elements(self, x: Value) -> Value:
        """See ``Products``."""
        return x

    def unpacked_a(self, row: Value, index: Value) -> Value:
        """See ``Products``."""
        return self.v.broadcast(row + index * self.v.item)

    def unpacked_b(self, x: Value) -> Value:
        """See ``Products``."""
        return x

    def last_sum(self, total: Value, scales: Sequence[Value], c_in: Value, align: int) -> Value:
        """See ``Products``."""
        return total

    def slot(self, elements: Sequence[Value]) -> Value:
        """See ``Products``."""
        (element,) = elements
        return element

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Accumulators) -> Accumulators:
        """See ``Products``."""
        return self._add_element(a_rows, [self.v.load(slot) for slot in b_slots], sums)

    def _add_element(self, a_rows: Sequence[Value], b_vecs: Sequence[Value], sums: Accumulators) -> Accumulators:
        """The sums plus the products of one element of each row of A, by its address, and vectors of B."""
        return add_products(map(self.v.broadcast, a_rows), b_vecs, sums, self.v.fma)
