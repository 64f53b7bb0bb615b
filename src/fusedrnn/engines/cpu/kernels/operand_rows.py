"""Rows of GEMM operands in the formats that are not float32: rounded to bfloat16, or quantized to int8.

They compute what :mod:`fusedrnn.number_formats` defines, bit for bit. A row is padded with zeros to whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.engines.cpu.kernels.products import SCALE_BYTES, rounded_to_bfloat16
from fusedrnn.engines.cpu.kernels.scratch import round_up_to_cache_line
from fusedrnn.jit.builder import Function, Module, Signature, Value
from fusedrnn.jit.int_vector import int_vector
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors
from fusedrnn.number_formats import INT8_MAX

_ROW = "source", "into", "size"
ROUND_ROW = Signature("round_row", _ROW)
"""Round ``size`` float32 at ``source``, of any alignment, to bfloat16. The result is float32 in whole vectors."""
QUANTIZE_ROW = Signature("quantize_row", _ROW)
"""Quantize ``size`` float32 at ``source``, of any alignment: int16 in whole vectors, behind the scale of the row."""

CONVERT_ROW = {"bfloat16": ROUND_ROW, "int8": QUANTIZE_ROW}
"""The function that converts a row, by format."""
ROW_OFFSET = 64
"""Where in its memory a row begins: whole cache lines behind the scale."""

_INT16_BYTES = 2
_LARGEST_FLOAT32 = 3.4028234663852886e38
_MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = 0x4B400000


def converted_row_bytes(size: int) -> int:
    """Bytes of memory for a converted row of so many elements, in any format and for any length of vectors."""
    return ROW_OFFSET + round_up_to_cache_line(4 * size)


def emit_convert_row(module: Module, target: Target, compute: str) -> Function:
    """The function of :data:`CONVERT_ROW`."""
    return emit_round_row(module, target) if compute == "bfloat16" else emit_quantize_row(module, target)


def emit_round_row(module: Module, target: Target) -> Function:
    """The function ``ROUND_ROW``."""
    f = Function.of(module, ROUND_ROW)
    source, into, size = f.arguments
    v = Vectors(f, target, "float32")
    _each_vector(v, source, size, lambda x, first: v.store(rounded_to_bfloat16(v, x), into + first * v.item))
    f.ret()
    return f


def emit_quantize_row(module: Module, target: Target) -> Function:
    """The function ``QUANTIZE_ROW``."""
    f = Function.of(module, QUANTIZE_ROW)
    source, into, size = f.arguments
    v = Vectors(f, target, "float32")
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
    f.ret()
    return f


def _each_vector(v: Vectors, source: Value, size: Value, visit: Callable[[Value, Value], None]) -> None:
    """Call ``visit`` with each vector of a row, the last one padded with zeros, and the number of its first element."""
    f = v.function
    whole = size - size % v.lanes
    with f.loop(0, whole, v.lanes) as first:
        visit(v.load(source + first * v.item, v.item), first)
    with f.if_(whole < size):
        visit(v.load_masked(source + whole * v.item, size - whole), whole)
