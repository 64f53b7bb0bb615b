"""Instructions that add the products of a group of small numbers to each lane of a vector.

An emulated target computes the same with instructions that every processor has.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fusedrnn.jit.builder import Function, Value
from fusedrnn.jit.int_vector import int_vector, shuffle
from fusedrnn.jit.vector import Vectors

_INT8_GROUP = 4
_HALF_BITS, _HIGH_HALF = 16, -(1 << 16)


class _Bfloat16(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's type of a bfloat16, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat16)

    def __hash__(self) -> int:
        return hash(_Bfloat16)


_BFLOAT16: ir.Type = _Bfloat16()


def add_int8_products(v: Vectors, unsigned: Value, signed: Value, total: Value) -> Value:
    """In each lane: ``total`` plus the four products of a uint8 and an int8.

    Args:
        v: Vectors of float32.
        unsigned: A vector of int32; each lane holds four uint8.
        signed: A vector of int32; each lane holds four int8.
        total: A vector of int32; sums wrap around.
    """
    if not v.target.emulated:
        return _call(v, "llvm.x86.avx512.vpdpbusd", total, (unsigned, signed), v.itype)
    arguments = [operand.ir for operand in (total, unsigned, signed)]
    return Value(v.function, v.function.builder.call(_emulated_int8_products(v), arguments))


def _emulated_int8_products(v: Vectors) -> Any:
    """A function that stands for the instruction: repeated in place, its code would be most of a kernel."""
    module, name = v.function.module, f"add_int8_products_{v.lanes}"
    if name not in module.globals:
        f = Function(module, name, ["total", "unsigned", "signed"], returns=True, kind=v.itype)
        total, unsigned, signed = f.arguments
        numbers = _INT8_GROUP * v.lanes
        int8, int32 = int_vector(8, numbers), int_vector(32, numbers)
        products = unsigned.bitcast(int8).zext(int32) * signed.bitcast(int8).sext(int32)
        f.ret(add_groups_of_products(products, total))
    return module.globals[name]


def add_groups_of_products(products: Value, total: Value) -> Value:
    """Each lane of ``total`` plus one group of four adjacent integers of ``products``."""
    for first in range(_INT8_GROUP):
        total = total + shuffle(products, products, range(first, products.type.count, _INT8_GROUP))
    return total


def add_bfloat16_products(v: Vectors, left: Value, right: Value, total: Value) -> Value:
    """In each lane: ``total`` plus the product of the high halves, then plus the product of the low halves.

    Each product and sum rounds once, to nearest even, as a fused multiply-add of float32 does. Denormals are zero.

    Args:
        v: Vectors of float32.
        left: A vector of int32; each lane holds two bfloat16.
        right: Like ``left``.
        total: A vector of float32.
    """
    if not v.target.emulated:
        pairs = ir.VectorType(_BFLOAT16, 2 * v.lanes)
        return _call(v, "llvm.x86.avx512bf16.dpbf16ps", total, (left, right), pairs)
    (left_low, left_high), (right_low, right_high) = halves_as_float(v, left), halves_as_float(v, right)
    return v.fma(left_low, right_low, v.fma(left_high, right_high, total))


def halves_as_float(v: Vectors, pairs: Value) -> tuple[Value, Value]:
    """The bfloat16 in the low and in the high half of each lane of a vector of int32, as float32."""
    return (pairs << _HALF_BITS).bitcast(v.type), (pairs & _HIGH_HALF).bitcast(v.type)


def _call(v: Vectors, name: str, total: Value, operands: tuple[Value, ...], kind: Any) -> Value:
    """Call the intrinsic for vectors of this length on operands of that type."""
    arguments = [total, *(operand.bitcast(kind) for operand in operands)]
    return v.function.intrinsic(f"{name}.{v.target.vector_bits}", total.type, arguments)
