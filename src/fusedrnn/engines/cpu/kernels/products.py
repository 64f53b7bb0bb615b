"""The innermost step of a GEMM in each number format: load operands, multiply, add to the accumulators.

The unit of k is a *k-group*, here a group for short: the adjacent elements that one step multiplies. For each group, a
panel of B holds a slot of ``b_bytes`` for each vector of columns, and a row of A holds ``a_bytes``. The order of
additions within a group is fixed, so that every element of C is one chain whatever the tile.

- float32, float64: a group is one element. A, B and sums have that format.
- bfloat16: a group is two elements; a slot of B holds both of each column. Sums are float32, over rising k. A is
  float32 that was rounded, or bfloat16 where the target has a dot product of pairs. Where narrow weights do not pay, A
  and B are float32 that was rounded.
- int8: a group is two elements; a slot of B holds both of each column. A is int16 that holds int8; sums are int32, and
  exact. Where the target has a dot product of uint8 and int8, a group is four elements, and A holds them plus 128; a
  panel of B begins with initial accumulators that undo this.
- int8_weights: a group is one element. A is float32, B int8; sums are float32, over rising k, and scaled at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fusedrnn.engines.cpu.kernels.accumulators import Accumulators
from fusedrnn.engines.cpu.kernels.bfloat16_products import (
    Bfloat16DotProducts,
    Bfloat16TileProducts,
    RoundedBfloat16Products,
    WidenedBfloat16Products,
)
from fusedrnn.engines.cpu.kernels.float_products import FloatProducts
from fusedrnn.engines.cpu.kernels.int8_products import (
    Int8DotProducts,
    Int8Products,
    Int8TileProducts,
    WideInt8Products,
    WidenedInt8Products,
)
from fusedrnn.jit.builder import Value
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors

STORAGE = {"float64": "float64", **dict.fromkeys(("float32", "bfloat16", "int8", "int8_weights"), "float32")}
"""The dtype of C by the format of the operands."""
SCALE_BYTES = 4
"""Bytes of the scale of a quantized row of A, a float32, which is stored just before the row."""


class Products(Protocol):
    """How a micro-kernel multiplies in one format.

    Attributes:
        group: Elements of k in a group.
        unroll: Groups per iteration of the loop over k, for whole panels: enough to hide the loop's own instructions,
            few enough for the registers. Narrower tiles, which are many and do little of the work, take half as many.
        speedup: How many products take the time of one product of float32, for the cost model.
        reads_unpacked: Whether there are GEMMs on unpacked weights.
        converts_rows: Whether rows of A are converted before a GEMM reads them.
        tile_instruction: What multiplies tiles of A and B, see :mod:`fusedrnn.engines.cpu.kernels.tile_gemm`; empty if
            there is no such instruction.
        has_scales: Whether columns of B have scales; rows of A have one each if they are converted too.
        head: Slots at the start of each vector of a panel, before those of the groups: initial accumulators.
        a_item: Bytes of an element of a converted row of A.
        a_bytes, b_bytes: Bytes of a group in a row of A, and in a vector of columns of B.
    """

    group: int
    unroll: int
    speedup: float
    reads_unpacked: bool
    converts_rows: bool
    tile_instruction: str
    has_scales: bool
    head: int
    a_item: int
    a_bytes: int
    b_bytes: int

    def first_sum(self, c_in: Value, head: Value, align: int) -> Value:
        """The accumulators of a vector of C before any product, by the addresses of C_in and of the panel's head."""

    def add(self, a_rows: Sequence[Value], b_slots: Sequence[Value], sums: Accumulators) -> Accumulators:
        """The sums plus the products of a group, by the group's address in each row of A and vector of B."""

    def last_sum(self, total: Value, scales: Sequence[Value], c_in: Value, align: int) -> Value:
        """A vector of C, from its accumulators and the addresses of the scales of its row and its columns."""

    def slot(self, elements: Sequence[Value]) -> Value:
        """What a slot of B holds, from the float vectors of its group."""

    def head_sum(self, total: Value, slot: Value) -> Value:
        """The head of a vector of a panel after one more slot is counted in; it begins as zeros."""

    def a_elements(self, x: Value) -> Value:
        """What a row of A holds, from a float vector that was rounded or from the integers of a quantized row."""

    def unpacked_a(self, row: Value, index: Value) -> Value:
        """An element of a row of A in every lane, as float, for GEMMs on unpacked weights."""

    def unpacked_b(self, x: Value) -> Value:
        """A float vector of unpacked weights as it is multiplied."""


ProductsClass = type[FloatProducts] | type[Int8Products] | type[WidenedInt8Products]
PRODUCTS: dict[str, ProductsClass] = {
    "float32": FloatProducts, "float64": FloatProducts, "bfloat16": WidenedBfloat16Products,
    "int8": Int8Products, "int8_weights": WidenedInt8Products,
}  # fmt: skip
"""By format of operands, on every target."""
_DOT_PRODUCTS: dict[str, ProductsClass] = {"bfloat16": Bfloat16DotProducts, "int8": Int8DotProducts}
_TILE_PRODUCTS: dict[str, ProductsClass] = {"bfloat16": Bfloat16TileProducts, "int8": Int8TileProducts}

_WIDE: dict[str, ProductsClass] = {"bfloat16": RoundedBfloat16Products, "int8_weights": WideInt8Products}


def products_class(compute: str, target: Target) -> ProductsClass:
    """The products of a format of operands with a target's instructions."""
    if compute in _WIDE and not target.narrow_weights:
        return _WIDE[compute]
    if compute not in target.dot_products:
        return PRODUCTS[compute]
    return (_TILE_PRODUCTS if target.has_tiles else _DOT_PRODUCTS)[compute]


def gradient_format(compute: str, target: Target) -> str:
    """The format in which gradients of weights are multiplied: that of sums, or bfloat16 if the target multiplies it.

    Their operands are gate gradients, inputs and states, which were rounded to the format of operands.
    """
    return compute if compute == "bfloat16" and compute in target.dot_products else STORAGE[compute]


def products_of(compute: str, v: Vectors, a_step: int = 0) -> Products:
    """The products of a format of operands; ``a_step`` is the distance of two elements of a row of A in bytes."""
    products: Products = products_class(compute, v.target)(v, a_step)
    return products
