"""What every cell checks of the arrays it is handed, before it computes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fusedrnn.scalars import positive_int
from fusedrnn.spec import Array

Layout = Literal["NTC", "TNC"]


def check_array(name: str, value: object, ndim: int, axes: str) -> Array:
    """``value`` if it is a floating NumPy array of ``ndim`` axes, none of them empty."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array; got {type(value).__name__}")
    if not np.issubdtype(value.dtype, np.floating):
        raise TypeError(f"{name} must hold floating-point numbers; got dtype {value.dtype}")
    if value.ndim != ndim or 0 in value.shape:
        raise ValueError(f"{name} must have shape {axes}, each at least 1; got {value.shape}")
    return value


def check_like(name: str, value: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """``value`` if it is an array of exactly that shape and dtype."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array; got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {value.shape}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, like the other arrays; got {value.dtype}")
    return value


def columns(params: Mapping[str, Array], name: str) -> int:
    """The input size that the i2h weight ``name`` in ``params`` is for."""
    require(params, [name])
    return int(check_array(name, params[name], 2, "(units, inputs)").shape[1])


def require(params: Mapping[str, Array], names: Sequence[str]) -> None:
    """Raise unless ``params`` is a mapping that has every one of ``names``."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a dict of named arrays; got {type(params).__name__}")
    if missing := [name for name in names if name not in params]:
        raise ValueError(f"params must hold {', '.join(names)}; missing {', '.join(missing)}")


def take(params: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """The arrays of those names, each of its shape and all of one floating dtype."""
    require(params, list(shapes))
    first = next(iter(shapes))
    dtype = check_array(first, params[first], len(shapes[first]), str(shapes[first])).dtype
    return {name: check_like(name, params[name], shape, dtype) for name, shape in shapes.items()}


def time_major(length: int, inputs: object, layout: Layout) -> Array:
    """The inputs of an unroll as one array (T, N, C): a view of an array, a stack of a list's steps."""
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


def as_asked(y: Array, layout: Layout, merge_outputs: bool) -> Array | list[Array]:
    """Outputs (T, N, S) as one array in ``layout``, or as a list of T arrays (N, S)."""
    if not merge_outputs:
        return list(y)
    return y if layout == "TNC" else y.swapaxes(0, 1)
