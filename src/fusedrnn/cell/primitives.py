"""The table of elementwise operations. One row defines an operation; to add one, add a row and an emitter.

The emitter is the method of the row's name in :class:`fusedrnn.jit.vector.Vectors`. A row is called to build an
expression: ``tanh(x)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fusedrnn.cell.expr import Expr, Operation, as_expr

__all__ = [
    "PRIMITIVES",
    "ArrayArithmetic",
    "Primitive",
    "absolute",
    "clip",
    "clip_nan",
    "expm1",
    "primitive",
    "relu",
    "relu_grad",
    "sigmoid",
    "softplus",
    "tanh",
]

Vjp = Callable[..., tuple[Expr | None, ...]]
"""From (cotangent, result, *arguments) to the cotangent of each argument; None for an argument without one."""


@dataclass(frozen=True)
class Primitive:
    """One elementwise operation.

    Attributes:
        name: Its name in expressions, and of its emitter.
        arity: The number of its arguments.
        array: The operation on arrays: a function of (namespace, *arguments), where the namespace is ``numpy`` or a
            module with the same functions.
        vjp: Its derivative rule; None if it has no derivative.
        flops: Floating-point operations for an element; they decide between saving and recomputing a value.
        instructions: Instructions for a vector; the cost model of the plan adds them up.
    """

    name: str
    arity: int
    array: Callable[..., Any]
    vjp: Vjp | None
    flops: int = 1
    instructions: int = 1

    def __call__(self, *args: Expr | float) -> Expr:
        """The operation on expressions or numbers."""
        if len(args) != self.arity:
            raise TypeError(f"{self.name} takes {self.arity} arguments; got {len(args)}")
        return Operation(self.name, tuple(map(as_expr, args)))


PRIMITIVES: dict[str, Primitive] = {}


def primitive(
    name: str,
    arity: int,
    array: Callable[..., Any],
    vjp: Vjp | None = None,
    *,
    flops: int = 1,
    instructions: int = 1,
) -> Primitive:
    """Add a row to the table."""
    PRIMITIVES[name] = row = Primitive(name, arity, array, vjp, flops, instructions)
    return row


# In the derivative rules, ct is the cotangent of the result y.
add = primitive("add", 2, lambda xp, a, b: a + b, lambda ct, y, a, b: (ct, ct))
sub = primitive("sub", 2, lambda xp, a, b: a - b, lambda ct, y, a, b: (ct, 0.0 - ct))
mul = primitive("mul", 2, lambda xp, a, b: a * b, lambda ct, y, a, b: (ct * b, ct * a))
div = primitive("div", 2, lambda xp, a, b: a / b, lambda ct, y, a, b: _div_vjp(ct / b, y), flops=10, instructions=8)
sigmoid = primitive(
    "sigmoid",
    1,
    lambda xp, x: 1 / (1 + xp.exp(-x)),
    lambda ct, y, x: (ct * (y * (1.0 - y)),),
    flops=50,
    instructions=27,
)
tanh = primitive(
    "tanh", 1, lambda xp, x: xp.tanh(x), lambda ct, y, x: (ct * (1.0 - y * y),), flops=45, instructions=25
)
# exp(x) - 1; kernels need x of at most 0.
expm1 = primitive("expm1", 1, lambda xp, x: xp.expm1(x), lambda ct, y, x: (ct * (y + 1.0),), flops=40, instructions=24)
# log(1 + exp(x)), without overflow.
softplus = primitive(
    "softplus",
    1,
    lambda xp, x: xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x))),
    lambda ct, y, x: (ct * sigmoid(x),),
    flops=80,
    instructions=60,
)
absolute = primitive("abs", 1, lambda xp, x: xp.abs(x), lambda ct, y, x: (abs_grad(x, ct),))
# ct with its sign changed where x is negative: the derivative of abs.
abs_grad: Primitive = primitive("abs_grad", 2, lambda xp, x, ct: xp.where(x < 0, -ct, ct))
# max(x, 0); NaN stays NaN.
relu = primitive("relu", 1, lambda xp, x: xp.maximum(x, 0), lambda ct, y, x: (relu_grad(y, ct),))
# ct where x is positive or NaN, else 0: the derivative of relu.
relu_grad: Primitive = primitive(
    "relu_grad",
    2,
    lambda xp, x, ct: xp.where(x <= 0, 0, ct),
    lambda ct, y, x, value: (None, relu_grad(x, ct)),
)
# x between two bounds; NaN stays NaN.
clip = primitive(
    "clip",
    3,
    lambda xp, x, low, high: xp.clip(x, low, high),
    lambda ct, y, x, low, high: (clip_grad(x, low, high, ct), None, None),
    flops=2,
    instructions=2,
)
# x between two bounds; NaN becomes the lower one.
clip_nan = primitive(
    "clip_nan",
    3,
    lambda xp, x, low, high: xp.where(xp.isnan(x), x.dtype.type(low), xp.clip(x, low, high)),
    lambda ct, y, x, low, high: (clip_grad(x, low, high, ct), None, None),
    flops=3,
)
# ct where x is between the bounds, else 0, also where x is NaN: the derivative of clip and clip_nan.
clip_grad: Primitive = primitive(
    "clip_grad", 4, lambda xp, x, low, high, ct: xp.where((low <= x) & (x <= high), ct, 0)
)


class ArrayArithmetic:
    """Evaluates expressions on arrays by the rows' ``array`` functions.

    Args:
        xp: ``numpy`` or a module with the same functions.
        overrides: Functions of the arguments alone to use instead, by the operation's name.
    """

    def __init__(self, xp: Any, overrides: Mapping[str, Callable[..., Any]]) -> None:
        self._xp, self._overrides = xp, overrides

    def const(self, value: float) -> float:
        """A constant: a Python number, which leaves the arrays' type as it is."""
        return value

    def apply(self, op: str, *args: Any) -> Any:
        """The operation of that name."""
        override = self._overrides.get(op)
        return PRIMITIVES[op].array(self._xp, *args) if override is None else override(*args)


def _div_vjp(da: Expr, y: Expr) -> tuple[Expr, Expr]:
    return da, 0.0 - da * y
