"""Products of bfloat16, with float32 sums.

The methods are those of :class:`fusedrnn.engines.cpu.kernels.products.Products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fusedrnn.engines.cpu.kernels.accumulators import Accumulators, add_products
from fusedrnn.engines.cpu.kernels.float_products import FloatProducts
from fusedrnn.jit.builder import Value
from fusedrnn.jit.dot_products import add_bfloat16_products
from fusedrnn.jit.int_vector import int_vector, shuffle
from fusedrnn.jit.vector import Vectors

_HALF_BITS, _LOW_HALF, _HIGH_HALF = 16, 0xFFFF, -(1 << 16)
_BELOW_HALF, _QUIET_NAN = 0x7FFF, 0x400000


class RoundedBfloat16Products(FloatProducts):
    """A and B have been rounded to bfloat16 and are stored as float32."""

    converts_rows = True

    def slot(self, elements: Sequence[Value]) -> Value:
        """See ``Products``. The element is rounded to nearest even."""
        return rounded_to_bfloat16(self.v, super().slot(elements))

    def unpacked_b(self, x: Value) -> Value:
        """See ``Products``. Weights are rounded to nearest even."""
        return rounded_to_bfloat16(self.v, x)


class WidenedBfloat16Products(RoundedBfloat16Products):
    """bfloat16 in B, widened to float32 in registers; A has been rounded to bfloat16 and is stored as float32."""

    group, unroll = 2, 2

    def slot(self, elements: Sequence[Value]) -> Value:
        """See ``Products``. Elements are rounded to nearest even."""
        return _pair_of_halves(self.v, [rounded_to_bfloat16(self.v, element) for element in elements])

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Accumulators) -> Accumulators:
        """See ``Products``. The element in the low half is multiplied first."""
        v = self.v
        pairs = [v.function.load(slot, v.itype, v.bytes) for slot in b_slots]
        sums = self._add_element(a_rows, [(pair << _HALF_BITS).bitcast(v.type) for pair in pairs], sums)
        high = [(pair & _HIGH_HALF).bitcast(v.type) for pair in pairs]
        return self._add_element([row + self.a_step for row in a_rows], high, sums)


class Bfloat16DotProducts(WidenedBfloat16Products):
    """Pairs of bfloat16, multiplied and added by one instruction, which takes the high half first.

    There are no GEMMs on unpacked weights: processors may differ in how they round within the instruction, and the bits
    of short calls must be those of long ones.
    """

    group, unroll, speedup, reads_unpacked = 2, 2, 2.0, False

    def __init__(self, v: Vectors, a_step: int = 0) -> None:
        super().__init__(v, a_step)
        # Pairs are as far apart as float32 elements.
        self.a_item, self.a_bytes = 2, a_step or v.item

    def slot(self, elements: Sequence[Value]) -> Value:
        """See ``Products``. The first element is in the high half; both are rounded to nearest even."""
        return _pair_of_halves(self.v, [rounded_to_bfloat16(self.v, element) for element in reversed(elements)])

    def a_elements(self, x: Value) -> Value:
        """See ``Products``. The elements of each pair are exchanged, as in B."""
        halves = (x.bitcast(self.v.itype) >> _HALF_BITS).trunc(int_vector(16, self.v.lanes))
        return shuffle(halves, halves, [lane ^ 1 for lane in range(self.v.lanes)])

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Accumulators) -> Accumulators:
        """See ``Products``."""
        v = self.v
        b_vecs = [v.function.load(slot, v.itype, v.bytes) for slot in b_slots]
        pairs = map(v.splat_word, a_rows)
        return add_products(pairs, b_vecs, sums, partial(add_bfloat16_products, v))


class Bfloat16TileProducts(Bfloat16DotProducts):
    """The same pairs, multiplied by tiles, which sum the low halves of the pairs and the high halves separately."""

    speedup, tile_instruction = 16.0, "tdpbf16ps"


def rounded_to_bfloat16(v: Vectors, x: Value) -> Value:
    """A float32 vector rounded to bfloat16, to nearest even, as float32; NaN stays NaN."""
    bits = x.bitcast(v.itype)
    lowest_kept_bit = (bits >> _HALF_BITS) & 1
    nearest = bits + (lowest_kept_bit + _BELOW_HALF)
    return (x.equals(x).select(nearest, bits | _QUIET_NAN) & _HIGH_HALF).bitcast(v.type)


def _pair_of_halves(v: Vectors, pair: Sequence[Value]) -> Value:
    """Two vectors of rounded numbers in one vector: the first in the low half of each lane."""
    low, high = (element.bitcast(v.itype) for element in pair)
    return ((low >> _HALF_BITS) & _LOW_HALF) | high
