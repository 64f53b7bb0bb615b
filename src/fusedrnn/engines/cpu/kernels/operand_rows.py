"""Rows of GEMM operands in the formats that are not float32: rounded to bfloat16, or quantized to int8.

They compute what :mod:`fusedrnn.number_formats` defines, bit for bit. A row is padded with zeros to whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.engines.cpu.kernels.products import SCALE_BYTES, Products, products_of, rounded_to_bfloat16
from fusedrnn.jit.builder import Function, Module, Signature, Value
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors
from fusedrnn.number_formats import INT8_MAX

CONVERT_ROW = Signature("convert_row", ("source", "into", "size"))
"""Convert ``size`` float32 at ``source``, of any alignment, to whole vectors in the format of a module's operands.

int8 puts the scale of the row before it. How elements are stored is said by :class:`Products`.
"""

_LARGEST_FLOAT32 = 3.4028234663852886e38
_MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = 0x4B400000


def emit_convert_row(module: Module, target: Target, compute: str) -> Function:
    """The function ``CONVERT_ROW``."""
    f = Function.of(module, CONVERT_ROW)
    v = Vectors(f, target, "float32")
    convert = {"bfloat16": _round_row, "int8": _quantize_row}[compute]
    convert(v, products_of(compute, v), *f.arguments)
    f.ret()
    return f


def _round_row(v: Vectors, products: Products, source: Value, into: Value, size: Value) -> None:
    def round_vector(x: Value, first: Value) -> None:
        _store(v, products, rounded_to_bfloat16(v, x), into, first)

    _each_vector(v, source, size, round_vector)


def _quantize_row(v: Vectors, products: Products, source: Value, into: Value, size: Value) -> None:
    f = v.function
    largest, not_finite = f.var(v.const(0.0)), f.var(v.const(0.0))

    def find_largest(x: Value, first: Value) -> None:
        magnitude = v.abs(x)
        largest.set((magnitude > largest.get()).select(magnitude, largest.get()))
        not_finite.set(not_finite.get() + (x - x))  # NaN if x is NaN or infinite, else zero

    _each_vector(v, source, size, find_largest)
    maximum = v.reduce(largest.get(), lambda a, b: (a > b).select(a, b))
    inverse = float(INT8_MAX) / maximum
    is_usable = inverse <= _LARGEST_FLOAT32
    scale = is_usable.select(maximum / float(INT8_MAX), 0.0) + v.reduce(not_finite.get(), lambda a, b: a + b)
    v.store_first(scale, into - SCALE_BYTES)
    factor = is_usable.select(inverse, 0.0)

    def quantize(x: Value, first: Value) -> None:
        _store(v, products, (x * factor + _MAGIC).bitcast(v.itype) - _MAGIC_BITS, into, first)

    _each_vector(v, source, size, quantize)


def _store(v: Vectors, products: Products, x: Value, into: Value, first: Value) -> None:
    """Store a vector of a row whose first element has that number."""
    v.function.store(products.a_elements(x), into + first * products.a_item, v.lanes * products.a_item)


def _each_vector(v: Vectors, source: Value, size: Value, visit: Callable[[Value, Value], None]) -> None:
    """Call ``visit`` with each vector of a row, the last one padded with zeros, and the number of its first element."""
    f = v.function
    whole = size - size % v.lanes
    with f.loop(0, whole, v.lanes) as first:
        visit(v.load(source + first * v.item, v.item), first)
    with f.if_(whole < size):
        visit(v.load_masked(source + whole * v.item, size - whole), whole)
