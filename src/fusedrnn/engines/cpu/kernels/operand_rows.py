"""Rows of GEMM operands in the formats that are not float32: rounded to bfloat16, or quantized to int8.

The results are those that :mod:`fusedrnn.number_formats` defines, bit for bit. A row is padded with zeros to whole
vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fusedrnn.engines.cpu.kernels.bfloat16_products import rounded_to_bfloat16
from fusedrnn.engines.cpu.kernels.products import SCALE_BYTES, Products, products_of
from fusedrnn.jit.builder import I32, I64, Function, Module, Signature, Value
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors
from fusedrnn.number_formats import INT8_MAX

CONVERT_ROW = Signature("convert_row", ("source", "into", "size", "range"))
"""Convert ``size`` float32 at ``source``, of any alignment, to whole vectors in the format of a module's operands.

In int8, the scale of a row is stored just before it. ``range`` is the address of a float32: the magnitude that becomes
127 in every row, or :data:`OWN_RANGE` if the largest magnitude of each row does. Other formats do not read ``range``.
:class:`Products` says how elements are stored.
"""

OWN_RANGE = -1.0
"""The range of operands in which each row has a scale of its own."""
RANGE_BYTES = 4
"""Bytes of a range. Those of a layer-direction follow one another: of the input, then of the operand of each stage."""
_LARGEST_FLOAT32 = 3.4028234663852886e38
_MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = 0x4B400000


def emit_convert_row(module: Module, target: Target, compute: str) -> Function:
    """The function ``CONVERT_ROW``."""
    f = Function.of(module, CONVERT_ROW)
    v = Vectors(f, target, "float32")
    convert = {"bfloat16": _round_row, "int8": _quantize_row}[compute]
    convert(_Row(v, products_of(compute, v), *f.arguments[:3]), f.arguments[3])
    f.ret()
    return f


class _Row(NamedTuple):
    """A row that is converted."""

    v: Vectors
    products: Products
    source: Value
    into: Value
    size: Value

    def store(self, x: Value, first: Value) -> None:
        """Store a vector of the row whose first element has that number."""
        item = self.products.a_item
        self.v.function.store(self.products.a_elements(x), self.into + first * item, self.v.lanes * item)

    def each_vector(self, visit: Callable[[Value, Value], None]) -> None:
        """Call ``visit`` with each vector, the last one padded with zeros, and the number of its first element."""
        f, v = self.v.function, self.v
        whole = self.size - self.size % v.lanes
        with f.loop(0, whole, v.lanes) as first:
            visit(v.load(self.source + first * v.item, v.item), first)
        with f.if_(whole < self.size):
            visit(v.load_masked(self.source + whole * v.item, self.size - whole), whole)


def _round_row(row: _Row, range_address: Value) -> None:
    row.each_vector(lambda x, first: row.store(rounded_to_bfloat16(row.v, x), first))


def _quantize_row(row: _Row, range_address: Value) -> None:
    f = row.v.function
    # The sign of a float32 is that of its bits as an integer.
    with f.if_else(f.load(range_address, I32, 4).sext(I64) < 0) as (own, fixed):
        with own:
            _quantize_by_own_range(row)
        with fixed:
            _quantize_by_range(row, row.v.broadcast(range_address))


def _quantize_by_own_range(row: _Row) -> None:
    v, f = row.v, row.v.function
    largest, not_finite = f.var(v.const(0.0)), f.var(v.const(0.0))

    def find_largest(x: Value, first: Value) -> None:
        magnitude = v.abs(x)
        largest.set((magnitude > largest.get()).select(magnitude, largest.get()))
        not_finite.set(not_finite.get() + (x - x))  # NaN if x is NaN or infinite, else zero

    row.each_vector(find_largest)
    factor, scale = _factor_and_scale(v.reduce(largest.get(), lambda a, b: (a > b).select(a, b)))
    _store_scale(row, scale, not_finite.get())
    row.each_vector(lambda x, first: row.store(_nearest(v, x * factor), first))


def _quantize_by_range(row: _Row, largest: Value) -> None:
    v, f = row.v, row.v.function
    not_finite, most = f.var(v.const(0.0)), float(INT8_MAX)
    factor, scale = _factor_and_scale(largest)

    def quantize(x: Value, first: Value) -> None:
        scaled = x * factor
        scaled = (scaled > most).select(v.const(most), scaled)
        scaled = (scaled < -most).select(v.const(-most), scaled)
        row.store(_nearest(v, scaled), first)
        not_finite.set(not_finite.get() + (x - x))

    row.each_vector(quantize)
    _store_scale(row, scale, not_finite.get())


def _factor_and_scale(largest: Value) -> tuple[Value, Value]:
    """What elements are multiplied by, and the scale of the result; both zero if the factor would not be finite."""
    inverse = float(INT8_MAX) / largest
    is_usable = inverse <= _LARGEST_FLOAT32
    return is_usable.select(inverse, 0.0), is_usable.select(largest / float(INT8_MAX), 0.0)


def _store_scale(row: _Row, scale: Value, not_finite: Value) -> None:
    """Store the scale of a row: NaN if one of the lanes of ``not_finite`` is NaN."""
    row.v.store_first(scale + row.v.reduce(not_finite, lambda a, b: a + b), row.into - SCALE_BYTES)


def _nearest(v: Vectors, x: Value) -> Value:
    """The nearest integers of small floats; of two that are equally near, the even one."""
    return (x + _MAGIC).bitcast(v.itype) - _MAGIC_BITS
