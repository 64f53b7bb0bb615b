"""Vector arithmetic on registers of float32 or float64, with tanh, sigmoid and other functions.

tanh and sigmoid are within 4 ulp over the whole range. Both use one range reduction: s·x = n·ln 2 + s·r with |s·r| ≤
ln 2 / 2, where n is rounded by adding and subtracting a number so large that no fraction bits remain. With C =
r·coth(s·r / 2), an even function of r, e^(s·x) = 2ⁿ·(C + r) / (C - r): two sums replace a longer series, and one
division computes both this quotient and that of the function. C is a polynomial in r² whose coefficients minimise the
largest relative error of the exponential: 5e-10 for float32 (0.009 of half an ulp), 2e-19 for float64 (0.002).

tanh x = ((2ⁿ - 1)·C + (2ⁿ + 1)·r) / ((2ⁿ + 1)·C + (2ⁿ - 1)·r) with s = 2. It needs no branch near zero: there n = 0 and
the quotient is r / C, accurate down to denormals. sigmoid x = (C - r) / ((C - r) + 2ⁿ·(C + r)) with s = -1. Results
below the smallest normal number may be zero, as kernels flush denormals anyway.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from fusedrnn.jit.builder import I32, I64, Function, Operand, Value
from fusedrnn.jit.int_vector import shuffle
from fusedrnn.jit.target import ITEM_SIZE, Target

FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()


@dataclass(frozen=True)
class Format:
    """A floating-point format, and the constants of the range reduction in it."""

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
    # ln2_high has few enough bits that its product with any n in range is exact. coth: z·coth z in powers of z².
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
    """Operations on vectors of one format in a function under construction; also the emitters of cells' operations."""

    def __init__(self, function: Function, target: Target, dtype: str) -> None:
        self.function, self.target, self.dtype = function, target, dtype
        self.format = FORMATS[dtype]
        self.lanes = target.lanes(dtype)
        self.item = ITEM_SIZE[dtype]
        self.bytes = self.lanes * self.item
        self.type = ir.VectorType(self.format.scalar, self.lanes)
        self.itype = ir.VectorType(self.format.integer, self.lanes)
        self._suffix = f"v{self.lanes}{self.format.suffix}"

    def const(self, value: float) -> Value:
        """The number in every lane."""
        return self.function.constant(value, self.type)

    def load(self, address: Value, align: int | None = None) -> Value:
        """Load a vector; by default aligned to its own size."""
        return self.function.load(address, self.type, align or self.bytes)

    def store(self, value: Value, address: Value, align: int | None = None) -> None:
        """Store a vector; by default aligned to its own size."""
        self.function.store(value, address, align or self.bytes)

    def store_masked(self, value: Value, address: Value, count: Value) -> None:
        """Store the first ``count`` lanes at any alignment; nothing else is written."""
        f = self.function
        arguments = [value, f.pointer(address), ir.Constant(I32, self.item), self._mask(count)]
        f.intrinsic(f"llvm.masked.store.{self._suffix}.p0", ir.VoidType(), arguments)

    def load_masked(self, address: Value, count: Value) -> Value:
        """Load the first ``count`` lanes at any alignment, with zeros in the others; nothing else is read."""
        f = self.function
        arguments = [f.pointer(address), ir.Constant(I32, self.item), self._mask(count), self.const(0.0)]
        return f.intrinsic(f"llvm.masked.load.{self._suffix}.p0", self.type, arguments)

    def zero_tail(self, value: Value, count: Value) -> Value:
        """The first ``count`` lanes of a vector, with zeros in the others."""
        return self._mask(count).select(value, 0.0)

    def _mask(self, count: Value) -> Value:
        lane = Value(self.function, ir.Constant(ir.VectorType(I64, self.lanes), list(range(self.lanes))))
        return lane < self._splat(count, I64)

    def _intrinsic(self, name: str, *arguments: Value) -> Value:
        """An LLVM intrinsic whose arguments and result are vectors of this type."""
        return self.function.intrinsic(f"llvm.{name}.{self._suffix}", self.type, arguments)

    def broadcast(self, address: Value) -> Value:
        """Load a number into every lane."""
        return self.splat(self.function.load(address, self.format.scalar, self.item))

    def gather(self, addresses: Sequence[Value]) -> Value:
        """Load a number from each address into a lane."""
        f = self.function
        vector = ir.Constant(self.type, ir.Undefined)
        for lane, address in enumerate(addresses):
            scalar = f.load(address, self.format.scalar, self.item)
            vector = f.builder.insert_element(vector, scalar.ir, ir.Constant(I32, lane))
        return Value(f, vector)

    def transpose_square(self, addresses: Sequence[Value]) -> list[Value]:
        """Load a square at any alignment and transpose it: lane i of vector j is number j at address i.

        A transpose exchanges each bit of the lane's number with that bit of the row's. The highest bit is exchanged by
        loading halves of two rows into one vector, which takes no shuffle on most processors; the others by shuffles.
        """
        half = self.lanes // 2
        rows = [
            self._load_halves(low + offset, high + offset)
            for offset in (0, half * self.item)
            for low, high in zip(addresses[:half], addresses[half:], strict=True)
        ]
        distance = 1
        while distance < half:
            lanes = range(self.lanes)
            first = [lane if not lane & distance else self.lanes + lane - distance for lane in lanes]
            second = [lane + distance if not lane & distance else self.lanes + lane for lane in lanes]
            for row in lanes:
                if not row & distance:
                    pair = rows[row], rows[row + distance]
                    rows[row], rows[row + distance] = shuffle(*pair, first), shuffle(*pair, second)
            distance *= 2
        return rows

    def _load_halves(self, low: Value, high: Value) -> Value:
        """A vector of two halves, one from each address."""
        kind = ir.VectorType(self.format.scalar, self.lanes // 2)
        first, second = (self.function.load(address, kind, self.item) for address in (low, high))
        return shuffle(first, second, range(self.lanes))

    def splat(self, scalar: Value) -> Value:
        """The number in every lane."""
        return self._splat(scalar, self.format.scalar)

    def splat_float64(self, bits: Value) -> Value:
        """A float64, given by its bits, rounded to this format, in every lane."""
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
        """a·b + c, rounded once if the target has FMA."""
        return self._intrinsic("fma" if self.target.fma else "fmuladd", a, b, c)

    def abs(self, x: Value) -> Value:
        """|x|."""
        return self._intrinsic("fabs", x)

    def apply(self, op: str, *args: Value) -> Value:
        """Emit the operation of that name, which is a method of this class."""
        result: Value = getattr(self, op)(*args)
        return result

    add = staticmethod(operator.add)
    sub = staticmethod(operator.sub)
    mul = staticmethod(operator.mul)
    div = staticmethod(operator.truediv)

    def relu(self, x: Value) -> Value:
        """max(x, 0); NaN stays NaN."""
        return (x <= 0.0).select(0.0, x)

    def relu_grad(self, x: Value, value: Value) -> Value:
        """``value`` where x is positive or NaN, else zero."""
        return (x <= 0.0).select(0.0, value)

    def abs_grad(self, x: Value, value: Value) -> Value:
        """``value``, with its sign changed where x is negative."""
        return (x < 0.0).select(0.0 - value, value)

    def clip(self, x: Value, low: Operand, high: Operand) -> Value:
        """Limit x to the interval; NaN stays NaN."""
        x = (x > high).select(high, x)
        return (x < low).select(low, x)

    def clip_nan(self, x: Value, low: Value, high: Value) -> Value:
        """Limit x to the interval; NaN becomes the lower limit."""
        x = (x >= low).select(x, low)
        return (x > high).select(high, x)

    def clip_grad(self, x: Value, low: Value, high: Value, value: Value) -> Value:
        """``value`` where x is within the interval, else zero."""
        return ((x >= low) & (x <= high)).select(value, 0.0)

    def _exponential(self, x: Value, scale: float, ln2: Sequence[float]) -> tuple[Value, Value, Value]:
        """2ⁿ, C and r of exp(scale·x), for x in range; ``ln2`` is a sum of parts, the largest first."""
        form = self.format
        # The large number includes the exponent's bias: the sum's last bits, shifted left, are 2ⁿ.
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

    def tanh(self, x: Value) -> Value:
        """The hyperbolic tangent."""
        magnitude = self.abs(x)
        limit = self.format.tanh_is_one
        # ln 2 as one number has an error: n times 2⁻²⁹ (float64: 2⁻⁵⁵), n ≤ 30 (60). It fades as tanh flattens.
        power, coth, r = self._exponential((magnitude > limit).select(limit, magnitude), 2.0, [math.log(2)])
        numerator = self.fma(power - 1.0, coth, (power + 1.0) * r)
        return self._intrinsic("copysign", numerator / self.fma(coth - r, self.const(2.0), numerator), x)

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + exp(-x))."""
        form = self.format
        x = self.clip(x, form.sigmoid_is_zero, form.sigmoid_is_one)
        # A 2ⁿ too large for the format has the bits of inf, and the quotient is zero.
        power, coth, r = self._exponential(x, -1.0, [form.ln2_high, form.ln2_low])
        numerator = coth - r
        return numerator / self.fma(power, coth + r, numerator)

    def expm1(self, x: Value) -> Value:
        """exp(x) - 1, for x ≤ 0: one quotient as in tanh, so that no nearly equal numbers are subtracted."""
        form = self.format
        lowest = -2 * form.tanh_is_one
        power, coth, r = self._exponential((x < lowest).select(lowest, x), 1.0, [form.ln2_high, form.ln2_low])
        return self.fma(power - 1.0, coth, (power + 1.0) * r) / (coth - r)

    def softplus(self, x: Value) -> Value:
        """log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|), and log(1 + e) = 2·artanh(e / (2 + e)).

        An e below the smallest normal number counts as zero.
        """
        form = self.format
        magnitude, limit = self.abs(x), (form.bias - 1) * math.log(2)
        beyond = magnitude > limit
        power, coth, r = self._exponential(beyond.select(limit, magnitude), -1.0, [form.ln2_high, form.ln2_low])
        numerator = power * (coth + r)
        t = numerator / self.fma(coth - r, self.const(2.0), numerator)
        square = t * t
        series = self.const(2 / (2 * form.artanh_terms - 1))
        for term in reversed(range(form.artanh_terms - 1)):
            series = self.fma(series, square, self.const(2 / (2 * term + 1)))
        return self.relu(x) + beyond.select(0.0, series * t)
