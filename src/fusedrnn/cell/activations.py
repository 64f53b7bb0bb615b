"""The functions that a cell may put its pre-activations through, with their parameters: those of ONNX's operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from fusedrnn.cell.expr import Expr
from fusedrnn.cell.primitives import absolute, clip, expm1, relu, relu_grad, sigmoid, softplus, tanh
from fusedrnn.scalars import as_float

__all__ = ["ACTIVATIONS", "Activation"]


@dataclass(frozen=True)
class Function:
    """A function of x, alpha and beta; and what these two are if nobody says: None for one that it has not.

    ``corner`` says whether its derivative jumps somewhere, whatever the parameters.
    """

    apply: Callable[[Expr, float, float], Expr]
    alpha: float | None = None
    beta: float | None = None
    corner: bool = False


def _elu(x: Expr, alpha: float) -> Expr:
    return relu(x) + alpha * expm1(0.0 - relu(0.0 - x))


ACTIVATIONS: dict[str, Function] = {
    "sigmoid": Function(lambda x, a, b: sigmoid(x)),
    "tanh": Function(lambda x, a, b: tanh(x)),
    "relu": Function(lambda x, a, b: relu(x), corner=True),
    "affine": Function(lambda x, a, b: a * x + b, 1.0, 0.0),
    "leaky_relu": Function(lambda x, a, b: relu(x) - a * relu(0.0 - x), 0.01, corner=True),
    "thresholded_relu": Function(lambda x, a, b: relu_grad(x - a, x), 1.0, corner=True),
    "scaled_tanh": Function(lambda x, a, b: a * tanh(b * x), 1.0, 1.0),
    "hard_sigmoid": Function(lambda x, a, b: clip(a * x + b, 0.0, 1.0), 0.2, 0.5, corner=True),
    "elu": Function(lambda x, a, b: _elu(x, a), 1.0, corner=True),
    "softsign": Function(lambda x, a, b: x / (1.0 + absolute(x))),
    "softplus": Function(lambda x, a, b: softplus(x)),
}


@dataclass(frozen=True)
class Activation:
    """One of :data:`ACTIVATIONS` with its parameters, to be called on expressions.

    Attributes:
        name: What it is.
        alpha: Its first parameter; None for the function's default, or if it has none.
        beta: Its second one.

    Raises:
        TypeError: If the name is no string or a parameter no number.
        ValueError: If there is no such function, or it has no such parameter.
    """

    name: str
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"activations must be of {', '.join(ACTIVATIONS)}; got {self.name!r}")
        function = ACTIVATIONS.get(self.name)
        if function is None:
            raise ValueError(f"activations must be of {', '.join(ACTIVATIONS)}; got {self.name!r}")
        for which in ("alpha", "beta"):
            given, default = getattr(self, which), getattr(function, which)
            if given is None:
                object.__setattr__(self, which, default)
                continue
            if default is None:
                raise ValueError(f"activations: {self.name} must have no {which}; got {given!r}")
            if isinstance(given, bool) or not isinstance(given, Real):
                raise TypeError(f"activations: {which} of {self.name} must be a number; got {given!r}")
            number = as_float(f"activations: {which} of {self.name}", given)
            if not math.isfinite(number):
                raise ValueError(f"activations: {which} of {self.name} must be finite; got {given!r}")
            object.__setattr__(self, which, number)

    @property
    def has_corner(self) -> bool:
        """Whether its derivative jumps somewhere."""
        return ACTIVATIONS[self.name].corner

    def __call__(self, x: Expr) -> Expr:
        """The function of an expression."""
        return ACTIVATIONS[self.name].apply(x, self.alpha or 0.0, self.beta or 0.0)

    def __str__(self) -> str:
        parameters = {"alpha": self.alpha, "beta": self.beta}
        given = [f"{name}={value:g}" for name, value in parameters.items() if value is not None]
        return f"{self.name}({', '.join(given)})" if given else self.name
