"""Vector arithmetic: exp, tanh and sigmoid on a register of float32 or float64, within 4 ulp over the whole range.

All three stand on one reduction: x = n·ln 2 + r with |r| ≤ ln 2 / 2, n rounded by adding and subtracting a number so
large that only integers remain, and ln 2 in two parts so that n times the first is exact. expm1(r) is its Taylor
series; the first term left out is below a quarter ulp (float32: r⁷/8!, float64: r¹³/14!, both relative to r).

tanh |x| = e / (e + 2) with e = expm1(2 |x|) = 2ⁿ·expm1(r) + (2ⁿ - 1), which needs no branch near zero: there n = 0
and e is the series itself, with its relative accuracy down to denormals. sigmoid x = (x < 0 ? e : 1) / (1 + e) with
e = exp(-|x|), which never overflows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from fusedrnn.codegen.build import I32, I64, Function, Value
from fusedrnn.codegen.target import Target

FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()


@dataclass(frozen=True)
class Format:
    """What the reduction must know of a floating-point format."""

    suffix: str
    scalar: ir.Type
    integer: ir.Type
    mantissa: int
    bias: int
    ln2_high: float
    ln2_low: float
    terms: int
    lowest: float
    highest: float
    tanh_is_one: float


FORMATS = {
    # ln2_high has so few bits that its product with any n in range is exact.
    "float32": Format(
        "f32", FLOAT, I32, 23, 127, 0.693145751953125, 1.4286068203094172321e-06, 7, -104.0, 89.0, 10.0
    ),
    "float64": Format(
        "f64", DOUBLE, I64, 52, 1023, 0.693147180369123816490, 1.90821492927058770002e-10, 13, -746.0, 710.0, 20.0
    ),
}  # fmt: skip


class Vectors:
    """Operations on vectors of one format in a function under construction; an Arithmetic for cells' maths."""

    def __init__(self, function: Function, target: Target, dtype: str) -> None:
        self.function, self.target, self.dtype = function, target, dtype
        self.format = FORMATS[dtype]
        self.lanes = target.lanes(dtype)
        self.item = 4 if dtype == "float32" else 8
        self.bytes = self.lanes * self.item
        self.type = ir.VectorType(self.format.scalar, self.lanes)
        self.itype = ir.VectorType(self.format.integer, self.lanes)

    def const(self, value: float) -> Value:
        """The number in every lane."""
        return self.function.constant(value, self.type)

    def iconst(self, value: int) -> Value:
        """The integer, as wide as the floats, in every lane."""
        return self.function.constant(value, self.itype)

    def load(self, address: Value, align: int | None = None) -> Value:
        """A vector from memory; by default aligned to its own size."""
        return self.function.load(address, self.type, align or self.bytes)

    def store(self, value: Value, address: Value, align: int | None = None) -> None:
        """A vector to memory; by default aligned to its own size."""
        self.function.store(value, address, align or self.bytes)

    def store_first(self, value: Value, address: Value, count: Value) -> None:
        """The first ``count`` lanes to memory of any alignment; the bytes behind them are not touched."""
        f = self.function
        arguments = [value, f.pointer(address), ir.Constant(I32, self.item), self._first(count)]
        f.intrinsic(f"llvm.masked.store.{self._suffix}.p0", ir.VoidType(), arguments)

    def load_first(self, address: Value, count: Value) -> Value:
        """The first ``count`` lanes from memory of any alignment, zeros behind them; nothing else is read."""
        f = self.function
        arguments = [f.pointer(address), ir.Constant(I32, self.item), self._first(count), self.const(0.0)]
        return f.intrinsic(f"llvm.masked.load.{self._suffix}.p0", self.type, arguments)

    def keep_first(self, value: Value, count: Value) -> Value:
        """The first ``count`` lanes of a vector, zeros behind them."""
        return self._first(count).select(value, 0.0)

    def _first(self, count: Value) -> Value:
        lane = Value(self.function, ir.Constant(ir.VectorType(I64, self.lanes), list(range(self.lanes))))
        return lane < self._splat(count, I64)

    @property
    def _suffix(self) -> str:
        return f"v{self.lanes}{self.format.suffix}"

    def broadcast(self, address: Value) -> Value:
        """A number from memory in every lane."""
        return self.splat(self.function.load(address, self.format.scalar, self.item))

    def gathered(self, addresses: Sequence[Value]) -> Value:
        """A number from each address."""
        f = self.function
        vector = ir.Constant(self.type, ir.Undefined)
        for lane, address in enumerate(addresses):
            scalar = f.load(address, self.format.scalar, self.item)
            vector = f.builder.insert_element(vector, scalar.ir, ir.Constant(I32, lane))
        return Value(f, vector)

    def turned(self, addresses: Sequence[Value]) -> list[Value]:
        """A square from memory of any alignment, turned: lane i of vector j is number j at address i.

        For each bit of a lane's number, it changes places with that bit of the row's: for the highest as halves of rows
        are loaded side by side, which takes no shuffle on most processors.
        """
        half = self.lanes // 2
        low, high = addresses[:half], addresses[half:]
        rows = [
            self._side_by_side(one + part * half * self.item, other + part * half * self.item)
            for part in (0, 1)
            for one, other in zip(low, high, strict=True)
        ]
        distance = 1
        while distance < half:
            lanes = range(self.lanes)
            kept = [lane if not lane & distance else self.lanes + lane - distance for lane in lanes]
            moved = [lane + distance if not lane & distance else self.lanes + lane for lane in lanes]
            for first in lanes:
                if not first & distance:
                    pair = rows[first], rows[first + distance]
                    rows[first], rows[first + distance] = (self._shuffled(*pair, places) for places in (kept, moved))
            distance *= 2
        return rows

    def _side_by_side(self, one: Value, other: Value) -> Value:
        """Half a vector from each of two addresses."""
        kind = ir.VectorType(self.format.scalar, self.lanes // 2)
        low, high = (self.function.load(at, kind, self.item) for at in (one, other))
        return self._shuffled(low, high, range(self.lanes))

    def _shuffled(self, one: Value, other: Value, places: Sequence[int]) -> Value:
        """Lanes of two vectors, those of the second behind those of the first, by their places."""
        order = ir.Constant(ir.VectorType(I32, len(places)), list(places))
        return Value(self.function, self.function.builder.shuffle_vector(one.ir, other.ir, order))

    def splat(self, scalar: Value) -> Value:
        """A number in every lane."""
        return self._splat(scalar, self.format.scalar)

    def _splat(self, scalar: Value, kind: ir.Type) -> Value:
        builder, wide = self.function.builder, ir.VectorType(kind, self.lanes)
        first = builder.insert_element(ir.Constant(wide, ir.Undefined), scalar.ir, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return Value(self.function, builder.shuffle_vector(first, ir.Constant(wide, ir.Undefined), zeros))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a·b + c, rounded once where the target can."""
        name = "fma" if self.target.fma else "fmuladd"
        return self.function.intrinsic(f"llvm.{name}.{self._suffix}", self.type, [a, b, c])

    def abs(self, x: Value) -> Value:
        """|x|."""
        return self.function.intrinsic(f"llvm.fabs.{self._suffix}", self.type, [x])

    def add(self, a: Value, b: Value) -> Value:
        """A + b."""
        return a + b

    def sub(self, a: Value, b: Value) -> Value:
        """A - b."""
        return a - b

    def mul(self, a: Value, b: Value) -> Value:
        """a·b."""
        return a * b

    def relu(self, x: Value) -> Value:
        """max(x, 0), NaN staying NaN."""
        return (x <= 0.0).select(0.0, x)

    def pass_positive(self, gate: Value, value: Value) -> Value:
        """``value`` where the gate is positive or NaN, else zero."""
        return (gate <= 0.0).select(0.0, value)

    def _reduce(self, x: Value) -> tuple[Value, Value, Value]:
        """N as integers (their low bits), expm1(r), and n as floats, for x in range."""
        form = self.format
        magic = 1.5 * 2.0**form.mantissa
        shifted = self.fma(x, self.const(math.log2(math.e)), self.const(magic))
        whole = shifted - magic
        r = self.fma(whole, self.const(-form.ln2_low), self.fma(whole, self.const(-form.ln2_high), x))
        series = self.const(1 / math.factorial(form.terms))
        for k in range(form.terms - 1, 1, -1):
            series = self.fma(series, r, self.const(1 / math.factorial(k)))
        return shifted.bitcast(self.itype), self.fma(series * r, r, r), whole

    def _power_of_two(self, n: Value) -> Value:
        """2ⁿ for integers whose low bits are n, where it is a normal number."""
        return ((n + self.format.bias) << self.format.mantissa).bitcast(self.type)

    def exp(self, x: Value) -> Value:
        """The exponential: overflow gives inf, underflow denormals and zero, NaN stays NaN."""
        x = (x > self.format.highest).select(self.format.highest, x)
        x = (x < self.format.lowest).select(self.format.lowest, x)
        n, expm1, _ = self._reduce(x)
        # n may be beyond the exponents of normal numbers: two factors, each half as large, reach everywhere. The
        # high bits of n, left by the rounding, fall out of the shift; its sign must be won back before halving.
        spare = self.iconst(8 * self.item - self.format.mantissa)
        signed = (n << spare) >> spare
        half = signed >> 1
        first, second = self._power_of_two(half), self._power_of_two(signed - half)
        return self.fma(expm1, first, first) * second

    def tanh(self, x: Value) -> Value:
        """The hyperbolic tangent."""
        limit = self.format.tanh_is_one
        size = self.abs(x)
        size = (size > limit).select(limit, size)
        n, expm1, _ = self._reduce(size + size)
        power = self._power_of_two(n)
        e = self.fma(expm1, power, power - 1.0)
        name = f"llvm.copysign.{self._suffix}"
        return self.function.intrinsic(name, self.type, [e / (e + 2.0), x])

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + exp(-x))."""
        e = self.exp(self.const(0.0) - self.abs(x))
        return (x < 0.0).select(e, 1.0) / (e + 1.0)
