"""Rows of GEMM operands in the formats that are not float32: rounded to bfloat16, or quantized to int8.

They compute what :mod:`fusedrnn.number_formats` defines, bit for bit. A row is padded with zeros to whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.engines.cpu.kernels.products import SCALE_BYTES, rounded_to_bfloat16
from fusedrnn.jit.builder import Function, Module, Signature, Value
from fusedrnn.jit.int_vector import int_vector
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors
from fusedrnn.number_formats import INT8_MAX

CONVERT_ROW = Signature("convert_row", ("source", "into", "size"))
"""Convert ``size`` float32 at ``source``, of any alignment, to whole vectors in the format of a module's operands.

bfloat16 gives rounded float32; int8 gives int16 behind the scale of the row.
"""

_INT16_BYTES = 2
_LARGEST_FLOAT32 = 3.4028234663852886e38
_MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = 0x4B400000


def emit_convert_row(module: Module, target: Target, compute: str) -> Function:
    """The function ``CONVERT_ROW``."""
    f = Function.of(module, CONVERT_ROW)
    v = Vectors(f, target, "float32")
    convert = {"bfloat16": _round_row, "int8": _quantize_row}[compute]
    convert(v, *f.arguments)
    f.ret()
    return f


def _round_row(v: Vectors, source: Value, into: Value, size: Value) -> None:
    _each_vector(v, source, size, lambda x, first: v.store(rounded_to_bfloat16(v, x), into + first * v.item))


def _quantize_row(v: Vectors, source: Value, into: Value, size: Value) -> None:
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
    int16 = int_vector(16, v.lanes)

    def quantize(x: Value, first: Value) -> None:
        integers = (x * factor + _MAGIC).bitcast(v.itype) - _MAGIC_BITS
        f.store(integers.trunc(int16), into + first * _INT16_BYTES, v.lanes * _INT16_BYTES)

    _each_vector(v, source, size, quantize)


def _each_vector(v: Vectors, source: Value, size: Value, visit: Callable[[Value, Value], None]) -> None:
    """Call ``visit`` with each vector of a row, the last one padded with zeros, and the number of its first element."""
    f = v.function
    whole = size - size % v.lanes
    with f.loop(0, whole, v.lanes) as first:
        visit(v.load(source + first * v.item, v.item), first)
    with f.if_(whole < size):
        visit(v.load_masked(source + whole * v.item, size - whole), whole)
