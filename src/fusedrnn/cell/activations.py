"""The activations of cells: those of ONNX's RNN operators, with their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from fusedrnn.cell.expr import Expr
from fusedrnn.cell.primitives import absolute, clip, expm1, relu, relu_grad, sigmoid, softplus, tanh, where
from fusedrnn.scalars import as_float, check_choice

__all__ = ["ACTIVATIONS", "Activation", "check_activations"]


@dataclass(frozen=True)
class Function:
    """A function of x, alpha and beta.

    Attributes:
        apply: The function.
        alpha: The default of alpha; None if the function has no alpha.
        beta: The default of beta; None if the function has no beta.
        kink: Whether its derivative jumps somewhere for any alpha and beta.
    """

    apply: Callable[[Expr, float, float], Expr]
    alpha: float | None = None
    beta: float | None = None
    kink: bool = False


def _below_zero(x: Expr) -> Expr:
    """min(x, 0), whose derivative at 0 is 1, as PyTorch has it in elu and leaky_relu; that of relu is 0."""
    return where(x <= 0.0, x, 0.0)


ACTIVATIONS: dict[str, Function] = {
    "sigmoid": Function(lambda x, a, b: sigmoid(x)),
    "tanh": Function(lambda x, a, b: tanh(x)),
    "relu": Function(lambda x, a, b: relu(x), kink=True),
    "affine": Function(lambda x, a, b: a * x + b, 1.0, 0.0),
    "leaky_relu": Function(lambda x, a, b: relu(x) + a * _below_zero(x), 0.01, kink=True),
    "thresholded_relu": Function(lambda x, a, b: relu_grad(x - a, x), 1.0, kink=True),
    "scaled_tanh": Function(lambda x, a, b: a * tanh(b * x), 1.0, 1.0),
    "hard_sigmoid": Function(lambda x, a, b: clip(a * x + b, 0.0, 1.0), 0.2, 0.5, kink=True),
    "elu": Function(lambda x, a, b: relu(x) + a * expm1(_below_zero(x)), 1.0, kink=True),
    "softsign": Function(lambda x, a, b: x / (1.0 + absolute(x))),
    "softplus": Function(lambda x, a, b: softplus(x)),
}


@dataclass(frozen=True)
class Activation:
    """One of :data:`ACTIVATIONS` with its parameters; a function of expressions.

    Attributes:
        name: A key of :data:`ACTIVATIONS`.
        alpha: Its first parameter; None for the function's default, or if the function has no alpha.
        beta: Its second parameter; None likewise.

    Raises:
        TypeError: If the name is not a string or a parameter is not a number.
        ValueError: If there is no such function, or it has no such parameter.
    """

    name: str
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        function = ACTIVATIONS[check_choice("activations", self.name, ACTIVATIONS)]
        for parameter in ("alpha", "beta"):
            value, default = getattr(self, parameter), getattr(function, parameter)
            if value is not None:
                self._check_parameter(parameter, value, default)
            object.__setattr__(self, parameter, default if value is None else float(value))

    def _check_parameter(self, parameter: str, value: object, default: float | None) -> None:
        if default is None:
            raise ValueError(f"activations: {self.name} must have no {parameter}; got {value!r}")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"activations: {parameter} of {self.name} must be a number; got {value!r}")
        if not math.isfinite(as_float(f"activations: {parameter} of {self.name}", value)):
            raise ValueError(f"activations: {parameter} of {self.name} must be finite; got {value!r}")

    @property
    def has_kink(self) -> bool:
        """Whether its derivative jumps somewhere."""
        return ACTIVATIONS[self.name].kink

    def __call__(self, x: Expr) -> Expr:
        """Apply it to an expression."""
        return ACTIVATIONS[self.name].apply(x, self.alpha or 0.0, self.beta or 0.0)

    def __str__(self) -> str:
        parameters = {"alpha": self.alpha, "beta": self.beta}
        texts = [f"{name}={value:g}" for name, value in parameters.items() if value is not None]
        return f"{self.name}({', '.join(texts)})" if texts else self.name


def check_activations(
    activations: object, default: tuple[Activation, ...], mode: str
) -> tuple[Activation, ...] | None:
    """The activations of a cell, each an :class:`Activation` or its name; None if they are the default ones."""
    expected = f"{len(default)} of {', '.join(ACTIVATIONS)}"
    if not isinstance(activations, (tuple, list)):
        raise TypeError(f"activations must be a tuple of {expected}; got {activations!r}")
    checked = tuple(a if isinstance(a, Activation) else Activation(a) for a in activations)
    if len(checked) != len(default):
        raise ValueError(f"activations must be {expected} in mode {mode!r}; got a tuple of {len(checked)}")
    return None if checked == default else checked
