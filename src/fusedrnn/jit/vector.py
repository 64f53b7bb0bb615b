"""Vector arithmetic: tanh, sigmoid and their like on a register of float32 or float64.

tanh and sigmoid are within 4 ulp over the whole range. Both stand on one reduction: s·x = n·ln 2 + s·r with |s·r| ≤ ln
2 / 2, n rounded by adding and subtracting a number so large that only integers remain. With C = r·coth(s·r / 2), an
even function of r, e^(s·x) = 2ⁿ·(C + r) / (C - r): two sums instead of a longer series, and one division serves both
this quotient and the function's own. C is a polynomial in r² whose coefficients make the greatest relative error of
the exponential least: 5e-10 for float32 (0.009 of half an ulp), 2e-19 for float64 (0.002).

tanh x = ((2ⁿ - 1)·C + (2ⁿ + 1)·r) / ((2ⁿ + 1)·C + (2ⁿ - 1)·r) with s = 2, which needs no branch near zero: there n = 0
and the quotient is r / C, with its relative accuracy down to denormals. sigmoid x = (C - r) / ((C - r) + 2ⁿ·(C + r))
with s = -1; what is less than the smallest normal number may come out as zero, as kernels flush denormals anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from fusedrnn.jit.builder import I32, I64, Function, Value
from fusedrnn.jit.int_vector import shuffle
from fusedrnn.jit.target import Target

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
    coth: tuple[float, ...]
    sigmoid_is_zero: float
    sigmoid_is_one: float
    tanh_is_one: float
    artanh_terms: int


FORMATS = {
    # ln2_high has so few bits that its product with any n in range is exact; coth: z·coth z by powers of z².
    "float32": Format(
        "f32", FLOAT, I32, 23, 127, 0.693145751953125, 1.4286068203094172321e-06,
        (1.0, 0.333332359790802, -0.0221279114484787),
        -89.0, 80.0, 10.0, 8,
    ),
    "float64": Format(
        "f64", DOUBLE, I64, 52, 1023, 0.693147180369123816490, 1.90821492927058770002e-10,
        (
            1.0, 0.3333333333333311, -0.02222222222135762, 0.002116402000055367, -0.00021163311499383436,
            2.117653889417742e-05,
        ),
        -710.0, 700.0, 20.0, 17,
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

    def store_masked(self, value: Value, address: Value, count: Value) -> None:
        """The first ``count`` lanes to memory of any alignment; the bytes behind them are not touched."""
        f = self.function
        arguments = [value, f.pointer(address), ir.Constant(I32, self.item), self._first(count)]
        f.intrinsic(f"llvm.masked.store.{self._suffix}.p0", ir.VoidType(), arguments)

    def load_masked(self, address: Value, count: Value) -> Value:
        """The first ``count`` lanes from memory of any alignment, zeros behind them; nothing else is read."""
        f = self.function
        arguments = [f.pointer(address), ir.Constant(I32, self.item), self._first(count), self.const(0.0)]
        return f.intrinsic(f"llvm.masked.load.{self._suffix}.p0", self.type, arguments)

    def zero_tail(self, value: Value, count: Value) -> Value:
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

    def gather(self, addresses: Sequence[Value]) -> Value:
        """A number from each address."""
        f = self.function
        vector = ir.Constant(self.type, ir.Undefined)
        for lane, address in enumerate(addresses):
            scalar = f.load(address, self.format.scalar, self.item)
            vector = f.builder.insert_element(vector, scalar.ir, ir.Constant(I32, lane))
        return Value(f, vector)

    def transpose_square(self, addresses: Sequence[Value]) -> list[Value]:
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
                    rows[first], rows[first + distance] = (shuffle(*pair, places) for places in (kept, moved))
            distance *= 2
        return rows

    def _side_by_side(self, one: Value, other: Value) -> Value:
        """Half a vector from each of two addresses."""
        kind = ir.VectorType(self.format.scalar, self.lanes // 2)
        low, high = (self.function.load(at, kind, self.item) for at in (one, other))
        return shuffle(low, high, range(self.lanes))

    def splat(self, scalar: Value) -> Value:
        """A number in every lane."""
        return self._splat(scalar, self.format.scalar)

    def splat_float64(self, bits: Value) -> Value:
        """A float64, given by its bits and rounded to this format, in every lane."""
        number = bits.bitcast(DOUBLE)
        if self.format.scalar is not DOUBLE:
            number = Value(self.function, self.function.builder.fptrunc(number.ir, self.format.scalar))
        return self.splat(number)

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

    def apply(self, op: str, *args: Value) -> Value:
        """Emit the operation of that name, which is a method of this class."""
        result: Value = getattr(self, op)(*args)
        return result

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

    def relu_grad(self, x: Value, value: Value) -> Value:
        """``value`` where x is positive or NaN, else zero."""
        return (x <= 0.0).select(0.0, value)

    def div(self, a: Value, b: Value) -> Value:
        """A / b."""
        return a / b

    def abs_grad(self, x: Value, value: Value) -> Value:
        """``value``, its sign changed where x is negative."""
        return (x < 0.0).select(0.0 - value, value)

    def clip(self, x: Value, low: Value, high: Value) -> Value:
        """The number, or the limit that it is beyond; NaN stays NaN."""
        x = (x > high).select(high, x)
        return (x < low).select(low, x)

    def clip_nan(self, x: Value, low: Value, high: Value) -> Value:
        """The same with the lower limit for NaN, which is at least as large as nothing."""
        x = (x >= low).select(x, low)
        return (x > high).select(high, x)

    def clip_grad(self, x: Value, low: Value, high: Value, value: Value) -> Value:
        """``value`` where x is within the limits, else zero."""
        return ((x >= low) & (x <= high)).select(value, 0.0)

    def _exponential(self, x: Value, scale: float, ln2: Sequence[float]) -> tuple[Value, Value, Value]:
        """2ⁿ, C and r of exp(scale·x), for x in range; ``ln2`` in parts, the first of which counts most."""
        form = self.format
        # The exponent's bias is part of the large number: the last bits of the sum are those of 2ⁿ, to be moved.
        magic = 1.5 * 2.0**form.mantissa + form.bias
        shifted = self.fma(x, self.const(scale * math.log2(math.e)), self.const(magic))
        power = (shifted.bitcast(self.itype) << form.mantissa).bitcast(self.type)
        whole, r = shifted - magic, x
        for part in ln2:
            r = self.fma(whole, self.const(-part / scale), r)
        square = r * r
        factors = [2 / scale * (scale / 2) ** (2 * k) * c for k, c in enumerate(form.coth)]
        coth = self.const(factors[-1])
        for factor in reversed(factors[:-1]):
            coth = self.fma(coth, square, self.const(factor))
        return power, coth, r

    def _clamp(self, x: Value, lowest: float, highest: float) -> Value:
        """The number, or the limit that it is beyond; NaN stays NaN."""
        x = (x > highest).select(highest, x)
        return (x < lowest).select(lowest, x)

    def tanh(self, x: Value) -> Value:
        """The hyperbolic tangent."""
        size = self.abs(x)
        limit = self.format.tanh_is_one
        # The error of ln 2 as one number, at most 30 times (float64: 60) 2⁻²⁹ (2⁻⁵⁵), fades as tanh flattens.
        power, coth, r = self._exponential((size > limit).select(limit, size), 2.0, [math.log(2)])
        above = self.fma(power - 1.0, coth, (power + 1.0) * r)
        name = f"llvm.copysign.{self._suffix}"
        return self.function.intrinsic(name, self.type, [above / self.fma(coth - r, self.const(2.0), above), x])

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + exp(-x))."""
        form = self.format
        x = self._clamp(x, form.sigmoid_is_zero, form.sigmoid_is_one)
        # Where 2ⁿ is too large for the format it is inf by its bits, and the quotient zero.
        power, coth, r = self._exponential(x, -1.0, [form.ln2_high, form.ln2_low])
        one = coth - r
        return one / self.fma(power, coth + r, one)

    def expm1(self, x: Value) -> Value:
        """exp(x) - 1, for x of at most 0: as tanh from the quotient, with no difference of what is nearly the same."""
        form = self.format
        lowest = -2 * form.tanh_is_one
        power, coth, r = self._exponential((x < lowest).select(lowest, x), 1.0, [form.ln2_high, form.ln2_low])
        return self.fma(power - 1.0, coth, (power + 1.0) * r) / (coth - r)

    def softplus(self, x: Value) -> Value:
        """log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|), and log(1 + e) = 2·artanh(e / (2 + e)).

        Where e is less than any normal number it is taken for zero.
        """
        form = self.format
        size, limit = self.abs(x), (form.bias - 1) * math.log(2)
        beyond = size > limit
        power, coth, r = self._exponential(beyond.select(limit, size), -1.0, [form.ln2_high, form.ln2_low])
        above = power * (coth + r)
        t = above / self.fma(coth - r, self.const(2.0), above)
        square = t * t
        series = self.const(2 / (2 * form.artanh_terms - 1))
        for term in reversed(range(form.artanh_terms - 1)):
            series = self.fma(series, square, self.const(2 / (2 * term + 1)))
        return self.relu(x) + beyond.select(0.0, series * t)
