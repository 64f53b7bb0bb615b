"""Elementwise arithmetic on vectors of float32 or float64, with exp, log, tanh, sigmoid and other functions.

All are within 4 ulp over their whole range. tanh, sigmoid and exp use one range reduction: s·x = n·ln 2 + s·r with
|s·r| ≤ ln 2 / 2, where n is rounded by adding and subtracting a number so large that no fraction bits remain. With C =
r·coth(s·r / 2), an even function of r, e^(s·x) = 2ⁿ·(C + r) / (C - r). The two sums make a longer series unnecessary,
and a single division computes both this quotient and that of the function. C is a polynomial in r² whose coefficients
minimise the largest relative error of the exponential: 5e-10 for float32 (0.009 of half an ulp), 2e-19 for float64
(0.002).

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
    log_terms: int


FORMATS = {
    # ln2_high has few enough bits that its product with any n in range is exact. coth: z·coth z in powers of z².
    "float32": Format(
        "f32", FLOAT, I32, 23, 127, 0.693145751953125, 1.4286068203094172321e-06,
        (1.0, 0.333332359790802, -0.0221279114484787),
        -89.0, 80.0, 10.0, 8, 6,
    ),
    "float64": Format(
        "f64", DOUBLE, I64, 52, 1023, 0.693147180369123816490, 1.90821492927058770002e-10,
        (
            1.0, 0.3333333333333311, -0.02222222222135762, 0.002116402000055367, -0.00021163311499383436,
            2.117653889417742e-05,
        ),
        -710.0, 700.0, 20.0, 17, 12,
    ),
}  # fmt: skip


class Elementwise:
    """The emitters of cells' operations, on vectors of one format in a function under construction."""

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

    def _intrinsic(self, name: str, *arguments: Value) -> Value:
        """An LLVM intrinsic whose arguments and result are vectors of this type."""
        return self.function.intrinsic(f"llvm.{name}.{self._suffix}", self.type, arguments)

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
        """``value``, with its sign changed where x is negative; zero where x is zero."""
        return x.equals(0.0).select(0.0, (x < 0.0).select(0.0 - value, value))

    def sqrt(self, x: Value) -> Value:
        """The square root; NaN of a negative number."""
        return self._intrinsic("sqrt", x)

    def rsqrt(self, x: Value) -> Value:
        """1 divided by the square root."""
        return 1.0 / self.sqrt(x)

    def maximum(self, a: Value, b: Value) -> Value:
        """The greater of the two; NaN if one of them is."""
        return b.equals(b).select((a < b).select(b, a), b)

    def minimum(self, a: Value, b: Value) -> Value:
        """The lesser of the two; NaN if one of them is."""
        return b.equals(b).select((a > b).select(b, a), b)

    def larger_grad(self, a: Value, b: Value, value: Value) -> Value:
        """``value`` where a is greater than b or one is NaN, half of it where they are equal, else zero."""
        return (a < b).select(0.0, a.equals(b).select(value * 0.5, value))

    def select_less(self, a: Value, b: Value, value: Value, other: Value) -> Value:
        """``value`` where a < b, else ``other``."""
        return (a < b).select(value, other)

    def select_less_equal(self, a: Value, b: Value, value: Value, other: Value) -> Value:
        """``value`` where a <= b, else ``other``."""
        return (a <= b).select(value, other)

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
        """2ⁿ, C and r of exp(scale·x), for x in range. The parts ``ln2``, the largest first, add up to ln 2."""
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

    def exp(self, x: Value) -> Value:
        """The number e to the power x; results below the smallest normal number may be zero."""
        form = self.format
        x = self.clip(x, -form.bias * math.log(2), (form.bias + 2) * math.log(2))
        power, coth, r = self._exponential(x, 1.0, [form.ln2_high, form.ln2_low])
        # 2ⁿ may be too large for the format where the result is not: half of a large result is computed, then doubled.
        is_large = x > 1.0
        half = (power.bitcast(self.itype) - (1 << form.mantissa)).bitcast(self.type)
        result = is_large.select(half, power) * ((coth + r) / (coth - r))
        return is_large.select(result + result, result)

    def log(self, x: Value) -> Value:
        """The natural logarithm; -inf of zero and of denormals, NaN of a negative number.

        x = 2ⁿ·m with m from √½ to √2, and log m = 2·artanh((m - 1) / (m + 1)).
        """
        form, bits = self.format, x.bitcast(self.itype)
        root = ((form.bias - 1) << form.mantissa) + int((math.sqrt(2) - 1) * 2**form.mantissa)  # the bits of √½
        exponent = (bits - root) >> form.mantissa
        m = (bits - (exponent << form.mantissa)).bitcast(self.type)
        # The bits of a number whose last bit is worth 1: an integer added to the bits is added to the number.
        magic = ((form.bias + form.mantissa) << form.mantissa) + (1 << (form.mantissa - 1))
        n = (exponent + magic).bitcast(self.type) - 1.5 * 2.0**form.mantissa
        t = (m - 1.0) / (m + 1.0)
        log_m = self.fma(t, self._artanh_series(t, form.log_terms), n * form.ln2_low)
        result = self.fma(n, self.const(form.ln2_high), log_m)
        largest = (2 - 2.0**-form.mantissa) * 2.0**form.bias
        result = (x <= largest).select(result, x)
        result = (x < 2.0 ** (1 - form.bias)).select(-math.inf, result)
        return (x < 0.0).select(math.nan, result)

    def _artanh_series(self, t: Value, terms: int) -> Value:
        """2·artanh(t) / t, by that many terms of its series."""
        square = t * t
        series = self.const(2 / (2 * terms - 1))
        for term in reversed(range(terms - 1)):
            series = self.fma(series, square, self.const(2 / (2 * term + 1)))
        return series

    def tanh(self, x: Value) -> Value:
        """The hyperbolic tangent."""
        magnitude = self.abs(x)
        limit = self.format.tanh_is_one
        # ln 2 as one number has an error. It grows to n·2⁻²⁹ (float64: n·2⁻⁵⁵) with n ≤ 30 (60), but where n is large,
        # tanh is flat, and the error does not show.
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
        series = self._artanh_series(t, form.artanh_terms)
        return self.relu(x) + beyond.select(0.0, series * t)
