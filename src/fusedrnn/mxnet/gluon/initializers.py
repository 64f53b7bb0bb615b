"""MXNet's initializers for the parameters of recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.scalars import as_float

Shape = tuple[int, ...]
Function = Callable[[Shape, np.random.Generator], Any]
Initializer = str | float | Function | None


def _check_matrix(name: str, shape: Shape) -> None:
    if len(shape) < 2:
        raise ValueError(f"initializer {name!r} must be for a matrix; got a parameter of shape {shape}")


def _xavier(shape: Shape, rng: np.random.Generator) -> Array:
    """Uniform in ±√(3 / mean of rows and columns): Glorot and Bengio, AISTATS 2010. All gates count as one matrix."""
    _check_matrix("xavier", shape)
    bound = math.sqrt(3.0 / (sum(shape) / 2.0))
    return rng.uniform(-bound, bound, shape)


def _orthogonal(shape: Shape, rng: np.random.Generator) -> Array:
    """Orthonormal rows or columns, whichever are fewer, times √2: Saxe, McClelland and Ganguli, ICLR 2014."""
    _check_matrix("orthogonal", shape)
    left, _, right = np.linalg.svd(rng.uniform(-1.0, 1.0, shape), full_matrices=False)
    return math.sqrt(2.0) * (left if left.shape == shape else right)


def _lstm_bias(shape: Shape, rng: np.random.Generator) -> Array:
    """One for the forget gate, the second of four, and zero for the rest."""
    if len(shape) != 1 or shape[0] % 4:
        raise ValueError(f"initializer 'lstmbias' must be for the bias of an LSTM; got a parameter of shape {shape}")
    return np.repeat([0.0, 1.0, 0.0, 0.0], shape[0] // 4)


INITIALIZERS: dict[str, Function] = {
    "zeros": lambda shape, rng: np.zeros(shape),
    "ones": lambda shape, rng: np.ones(shape),
    "uniform": lambda shape, rng: rng.uniform(-0.07, 0.07, shape),
    "normal": lambda shape, rng: rng.normal(0.0, 0.01, shape),
    "xavier": _xavier,
    "orthogonal": _orthogonal,
    "lstmbias": _lstm_bias,
}
"""Initializers by MXNet's names, with its defaults: ±0.07 for uniform, 0.01 for normal."""


def check_initializer(name: str, value: object) -> Initializer:
    """``value`` if it is an initializer."""
    expected = f"one of {', '.join(INITIALIZERS)}, a number, a function of (shape, generator), or None"
    if isinstance(value, str) and value not in INITIALIZERS:
        raise ValueError(f"{name} must be {expected}; got {value!r}")
    if value is None or isinstance(value, str) or callable(value):
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be {expected}; got {value!r}")
    return as_float(name, value)


def fill(parameter: Array, initializer: Initializer, rng: np.random.Generator, name: str) -> None:
    """Fill the parameter of that name with the initializer's values.

    Raises:
        TypeError: If the values are not real numbers.
        ValueError: If they have another shape, or are not finite in the parameter's dtype.
    """
    if isinstance(initializer, float):
        values = np.full(parameter.shape, initializer)
    else:
        function = INITIALIZERS[initializer] if isinstance(initializer, str) else initializer
        assert function is not None
        values = np.asarray(function(parameter.shape, rng))
    # Other kinds may be real numbers too, such as the bfloat16 of ml_dtypes.
    if values.dtype.kind not in "biuf" and not np.can_cast(values.dtype, np.float64):
        raise TypeError(f"initializer of {name} must give real numbers; got dtype {values.dtype}")
    if values.shape != parameter.shape:
        raise ValueError(f"initializer of {name} must give an array of shape {parameter.shape}; got {values.shape}")
    with np.errstate(over="ignore"):
        parameter[...] = values
    if not np.isfinite(parameter).all():
        wrong = values[~np.isfinite(parameter)][0]
        raise ValueError(f"initializer of {name} must give numbers that are finite in {parameter.dtype}; got {wrong}")
