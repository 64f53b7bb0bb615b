"""The table of elementwise operations. One row defines an operation; to add one, add a row and an emitter.

The emitter is the method of the row's name in :class:`fusedrnn.jit.vector.Vectors`. A row is called to build an
expression: ``tanh(x)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fusedrnn.cell.expr import Condition, Constant, Expr, Operation, as_expr

__all__ = [
    "PRIMITIVES", "ArrayArithmetic", "Primitive", "absolute", "clip", "clip_nan", "exp", "expm1", "log", "maximum",
    "minimum", "primitive", "relu", "relu_grad", "rsqrt", "sigmoid", "softplus", "sqrt", "tanh", "where",
]  # fmt: skip

Vjp = Callable[..., tuple[Expr | None, ...]]
"""A function of (cotangent, result, *arguments); it returns each argument's cotangent, None where there is none."""


@dataclass(frozen=True)
class Primitive:
    """One elementwise operation.

    Attributes:
        name: Its name in expressions, and the name of its emitter.
        arity: The number of its arguments.
        array: The operation on arrays: a function of (namespace, *arguments), where the namespace is ``numpy`` or a
            module with the same functions.
        vjp: Its derivative rule; None if it has no derivative.
        flops: Floating-point operations for an element. They determine whether a value is saved or recomputed.
        instructions: Instructions for a vector, which the cost model of the plan adds up.
        has_kink: Whether its value or its derivative jumps somewhere.
    """

    name: str
    arity: int
    array: Callable[..., Any]
    vjp: Vjp | None
    flops: int = 1
    instructions: int = 1
    has_kink: bool = False

    def __call__(self, *args: Expr | float, **named: object) -> Expr:
        """The operation on expressions or numbers; at least one argument must be an expression."""
        if named:
            raise TypeError(f"{self.name} takes its arguments by position; got {', '.join(named)}= by name")
        if len(args) != self.arity:
            raise TypeError(f"{self.name} takes {self.arity} argument{'s' * (self.arity != 1)}; got {len(args)}")
        exprs = tuple(map(as_expr, args))
        if all(isinstance(arg, Constant) for arg in exprs):
            raise TypeError(f"{self.name} takes an expression; got {args[0]!r}: for numbers use the module math")
        return Operation(self.name, exprs)


PRIMITIVES: dict[str, Primitive] = {}


def primitive(
    name: str, arity: int, array: Callable[..., Any], vjp: Vjp | None = None, *, flops: int = 1, instructions: int = 1,
    kink: bool = False,
) -> Primitive:  # fmt: skip
    """Add a row to the table."""
    PRIMITIVES[name] = row = Primitive(name, arity, array, vjp, flops, instructions, kink)
    return row


def _select(xp: Any, condition: Any, like: tuple[Any, Any], value: Any, other: Any) -> Any:
    """``value`` where a condition holds, else ``other``; numbers take the type of the arrays ``like``."""
    if isinstance(condition, bool):  # a comparison of numbers
        return value if condition else other
    if isinstance(value, float) and isinstance(other, float):
        value = xp.full_like(like[isinstance(like[0], float)], value)
    return xp.where(condition, value, other)


def where(condition: Condition, value: Expr | float, other: Expr | float) -> Expr:
    """``value`` where the comparison ``condition`` holds; ``other`` where it does not, or where an operand is NaN.

    Raises:
        TypeError: If ``condition`` is no comparison of expressions.
    """
    if not isinstance(condition, Condition):
        raise TypeError(
            f"where takes a comparison by <, <=, > or >=, as in where(a < b, value, other); got {condition!r}"
        )
    return PRIMITIVES[f"select_{condition.relation}"](condition.a, condition.b, value, other)


# fmt: off
# xp is the array namespace, ct the cotangent of the result y.
add = primitive("add", 2, lambda xp, a, b: a + b, lambda ct, y, a, b: (ct, ct))
sub = primitive("sub", 2, lambda xp, a, b: a - b, lambda ct, y, a, b: (ct, 0.0 - ct))
mul = primitive("mul", 2, lambda xp, a, b: a * b, lambda ct, y, a, b: (ct * b, ct * a))
div = primitive("div", 2, lambda xp, a, b: a / b, lambda ct, y, a, b: (ct / b, 0.0 - ct / b * y),
                flops=10, instructions=8)
sigmoid = primitive("sigmoid", 1, lambda xp, x: 1 / (1 + xp.exp(-x)), lambda ct, y, x: (ct * (y * (1.0 - y)),),
                    flops=50, instructions=27)
tanh = primitive("tanh", 1, lambda xp, x: xp.tanh(x), lambda ct, y, x: (ct * (1.0 - y * y),),
                 flops=45, instructions=25)
exp = primitive("exp", 1, lambda xp, x: xp.exp(x), lambda ct, y, x: (ct * y,), flops=40, instructions=25)
log = primitive("log", 1, lambda xp, x: xp.log(x), lambda ct, y, x: (ct / x,), flops=40, instructions=28)
sqrt = primitive("sqrt", 1, lambda xp, x: xp.sqrt(x), lambda ct, y, x: (0.5 * ct / y,), flops=15, instructions=8)
# 1 / sqrt(x); its derivative takes no division.
rsqrt = primitive("rsqrt", 1, lambda xp, x: 1 / xp.sqrt(x), lambda ct, y, x: (-0.5 * ct * (y * y * y),),
                  flops=25, instructions=16)
# exp(x) - 1; the emitter needs x of at most 0.
expm1 = primitive("expm1", 1, lambda xp, x: xp.expm1(x), lambda ct, y, x: (ct * (y + 1.0),), flops=40, instructions=24)
# log(1 + exp(x)), without overflow.
softplus = primitive("softplus", 1, lambda xp, x: xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x))),
                     lambda ct, y, x: (ct * sigmoid(x),), flops=80, instructions=60)
absolute = primitive("abs", 1, lambda xp, x: xp.abs(x), lambda ct, y, x: (abs_grad(x, ct),), kink=True)
# The derivative of abs: value with its sign changed where x is negative, 0 where x is 0.
abs_grad: Primitive = primitive("abs_grad", 2, lambda xp, x, value:
                                xp.where(x < 0, -value, xp.where(x == 0, 0, value)),
                                lambda ct, y, x, value: (None, abs_grad(x, ct)), kink=True)
# max(x, 0); NaN stays NaN.
relu = primitive("relu", 1, lambda xp, x: xp.maximum(x, 0), lambda ct, y, x: (relu_grad(y, ct),), kink=True)
# The derivative of relu: value where x is positive or NaN, else 0.
relu_grad: Primitive = primitive("relu_grad", 2, lambda xp, x, value: xp.where(x <= 0, 0, value),
                                 lambda ct, y, x, value: (None, relu_grad(x, ct)), kink=True)
# x between two bounds; NaN stays NaN.
clip = primitive("clip", 3, lambda xp, x, low, high: xp.clip(x, low, high),
                 lambda ct, y, x, low, high: (clip_grad(x, low, high, ct), None, None),
                 flops=2, instructions=2, kink=True)
# x between two bounds; NaN becomes the lower one.
clip_nan = primitive("clip_nan", 3,
                     lambda xp, x, low, high: xp.where(xp.isnan(x), x.dtype.type(low), xp.clip(x, low, high)),
                     lambda ct, y, x, low, high: (clip_grad(x, low, high, ct), None, None), flops=3, kink=True)
# The derivative of clip and clip_nan: value where x is between the bounds, else 0, also where x is NaN.
clip_grad: Primitive = primitive("clip_grad", 4, lambda xp, x, low, high, value:
                                 xp.where((low <= x) & (x <= high), value, 0), kink=True)
# The greater of the two; NaN if one of them is.
maximum = primitive("maximum", 2, lambda xp, a, b: _select(xp, (a >= b) | (a != a), (a, b), a, b),
                    lambda ct, y, a, b: (larger_grad(a, b, ct), larger_grad(b, a, ct)), instructions=3, kink=True)
minimum = primitive("minimum", 2, lambda xp, a, b: _select(xp, (a <= b) | (a != a), (a, b), a, b),
                    lambda ct, y, a, b: (larger_grad(b, a, ct), larger_grad(a, b, ct)), instructions=3, kink=True)
# The derivative of maximum: value where a is greater, half of it where a and b are equal, else 0; value for NaN.
larger_grad: Primitive = primitive("larger_grad", 3, lambda xp, a, b, value:
                                   xp.where(a < b, 0, xp.where(a == b, value / 2, value)),
                                   lambda ct, y, a, b, value: (None, None, larger_grad(a, b, ct)),
                                   flops=2, instructions=4, kink=True)
# value where a < b, or a <= b, else other.
select_less: Primitive = primitive("select_less", 4, lambda xp, a, b, value, other:
                                   _select(xp, a < b, (a, b), value, other),
                                   lambda ct, y, a, b, value, other:
                                   (None, None, select_less(a, b, ct, 0.0), select_less(a, b, 0.0, ct)),
                                   instructions=2, kink=True)
select_less_equal: Primitive = primitive("select_less_equal", 4, lambda xp, a, b, value, other:
                                         _select(xp, a <= b, (a, b), value, other),
                                         lambda ct, y, a, b, value, other:
                                         (None, None, select_less_equal(a, b, ct, 0.0),
                                          select_less_equal(a, b, 0.0, ct)),
                                         instructions=2, kink=True)
# fmt: on


class ArrayArithmetic:
    """Evaluates expressions on arrays by the rows' ``array`` functions.

    Args:
        xp: ``numpy`` or a module with the same functions.
        overrides: Functions of the arguments, without a namespace, to use instead, by the operation's name.
    """

    def __init__(self, xp: Any, overrides: Mapping[str, Callable[..., Any]]) -> None:
        self._xp, self._overrides = xp, overrides

    def const(self, value: float) -> float:
        """A constant: a Python number, which does not change the type of arrays."""
        return value

    def apply(self, op: str, *args: Any) -> Any:
        """The operation of that name."""
        override = self._overrides.get(op)
        return PRIMITIVES[op].array(self._xp, *args) if override is None else override(*args)
