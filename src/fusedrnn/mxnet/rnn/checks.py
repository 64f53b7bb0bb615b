"""Checks of the arrays that are passed to cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from fusedrnn.arrays import Array, check_is_array
from fusedrnn.scalars import positive_int

Layout = Literal["NTC", "TNC"]
Shapes = dict[str, tuple[int, ...]]


def check_array(name: str, array: object, ndim: int, axes: str) -> Array:
    """``array`` if it is a floating NumPy array of ``ndim`` axes, none of them empty."""
    value = check_is_array(name, array)
    if not np.issubdtype(value.dtype, np.floating):
        raise TypeError(f"{name} must hold floating-point numbers; got dtype {value.dtype}")
    if value.ndim != ndim or 0 in value.shape:
        raise ValueError(f"{name} must have shape {axes}, each at least 1; got {value.shape}")
    return value


def check_like(name: str, array: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """``array`` if it is a NumPy array of that shape and dtype."""
    value = check_is_array(name, array)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {value.shape}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, like the other arrays; got {value.dtype}")
    return value


def require(params: Mapping[str, Array], names: Iterable[str] = ()) -> None:
    """Raise an error unless ``params`` is a mapping that has all these names."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a dict of named arrays; got {type(params).__name__}")
    if missing := [name for name in names if name not in params]:
        raise ValueError(f"params must hold {', '.join(names)}; missing {', '.join(missing)}")


def take(params: Mapping[str, Array], i2h_weight: str, shapes_for: Callable[[int], Shapes]) -> dict[str, Array]:
    """The arrays of a cell, checked: each has its shape, and all have one floating dtype.

    Args:
        params: Arrays by name, including the cell's.
        i2h_weight: The name of the weight (units, inputs) that has the input size.
        shapes_for: The name and shape of each array of the cell for that input size.
    """
    require(params, [i2h_weight])
    weight = check_array(i2h_weight, params[i2h_weight], 2, "(units, inputs)")
    shapes = shapes_for(weight.shape[1])
    require(params, shapes)
    return {name: check_like(name, params[name], shape, weight.dtype) for name, shape in shapes.items()}


def unroll_inputs(length: int, inputs: object, layout: Layout) -> Array:
    """The inputs of an unroll as one array (T, N, C): a view of an array, or a stack of the steps in a list."""
    length = positive_int("length", length)
    if layout not in ("NTC", "TNC"):
        raise ValueError(f"layout must be 'NTC' or 'TNC'; got {layout!r}")
    if isinstance(inputs, (list, tuple)):
        if len(inputs) != length:
            raise ValueError(f"inputs must hold length ({length}) steps; got {len(inputs)}")
        first = check_array("inputs[0]", inputs[0], 2, "(N, C)")
        return np.stack([check_like(f"inputs[{t}]", x, first.shape, first.dtype) for t, x in enumerate(inputs)])
    x = check_array("inputs", inputs, 3, f"({', '.join(layout)})")
    x = x if layout == "TNC" else x.swapaxes(0, 1)
    if len(x) != length:
        raise ValueError(f"inputs must have length ({length}) steps on axis T of {layout}; got {len(x)}")
    return x
