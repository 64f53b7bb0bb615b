"""Vectors of unsigned 32-bit integers; sums and products wrap around."""

from __future__ import annotations

from collections.abc import Iterable

from llvmlite import ir

from fusedrnn.jit.builder import I32, I64, Function, Value

_WORD_BITS = 32
_WORD_MASK = 0xFFFFFFFF


class IntVectors:
    """Operations on vectors of ``lanes`` words in a function under construction."""

    def __init__(self, function: Function, lanes: int) -> None:
        self.function, self.lanes = function, lanes
        self.type = ir.VectorType(I32, lanes)
        self._wide = ir.VectorType(I64, lanes)

    def const(self, value: int) -> Value:
        """The integer in every lane."""
        return self.function.constant(value & _WORD_MASK, self.type)

    def lane_numbers(self) -> Value:
        """0, 1, 2 and so on."""
        return Value(self.function, ir.Constant(self.type, list(range(self.lanes))))

    def splat(self, scalar: Value) -> Value:
        """The low 32 bits of a 64-bit integer in every lane."""
        builder = self.function.builder
        word = builder.trunc(scalar.ir, I32)
        first = Value(self.function, builder.insert_element(ir.Constant(self.type, ir.Undefined), word, I32(0)))
        return shuffle(first, first, [0] * self.lanes)

    def wide_mul(self, vector: Value, factor: int) -> tuple[Value, Value]:
        """The high and the low 32 bits of each 64-bit product."""
        f, builder = self.function, self.function.builder
        product = builder.mul(builder.zext(vector.ir, self._wide), f.constant(factor, self._wide).ir)
        high = builder.lshr(product, f.constant(_WORD_BITS, self._wide).ir)
        return Value(f, builder.trunc(high, self.type)), Value(f, builder.trunc(product, self.type))

    def at_least(self, vector: Value, limit: Value) -> Value:
        """Which lanes are at least as large as those of the limit; both are unsigned."""
        return Value(self.function, self.function.builder.icmp_unsigned(">=", vector.ir, limit.ir))


def int_vector(bits: int, lanes: int) -> ir.Type:
    """The type of a vector of integers."""
    return ir.VectorType(ir.IntType(bits), lanes)


def shuffle(low: Value, high: Value, lanes: Iterable[int]) -> Value:
    """A vector of lanes of two others, by number; the numbers of ``high`` follow those of ``low``."""
    numbers = list(lanes)
    mask = ir.Constant(ir.VectorType(I32, len(numbers)), numbers)
    return Value(low.function, low.function.builder.shuffle_vector(low.ir, high.ir, mask))
