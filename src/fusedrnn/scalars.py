"""Scalar arguments of callers: their validation, and their text in errors. Every error names the argument."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, SupportsFloat, TypeVar, cast

import numpy as np
from numpy.typing import DTypeLike

Choice = TypeVar("Choice", bound=str)
MAX_BYTES = 2**48
"""The bytes of the largest array: the address space of common processors."""
# Python refuses to print integers of thousands of digits. No valid argument has more bits than this.
_MAX_BITS = 128


def as_int(name: str, value: object) -> int:
    """``value`` as an int; a TypeError if it is not an integer."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    return int(value)


def positive_int(name: str, value: object) -> int:
    """``value`` as an int from 1 to :data:`MAX_BYTES`.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is out of range.
    """
    number = as_int(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1; got {shown(value)}")
    if number > MAX_BYTES:
        raise ValueError(f"{name} must be at most {MAX_BYTES}; got {shown(value)}")
    return number


def check_choice(name: str, value: object, choices: Collection[Choice]) -> Choice:
    """``value`` if it is one of these strings; a TypeError if it is no string, a ValueError for another string."""
    if isinstance(value, str):
        for choice in choices:
            if value == choice:
                return choice
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{name} must be one of {', '.join(choices)}; got {shown(value)}")


def dtype_name(value: object, names: Collection[str]) -> str:
    """The name of a dtype of native byte order; a ValueError if it is not one of these."""
    try:
        dtype = np.dtype(cast(Any, value))
        name = dtype.name if dtype.isnative else ""
    except TypeError:
        name = ""
    if value is None or name not in names:
        raise ValueError(f"dtype must be one of {', '.join(names)}; got {value!r}")
    return name


def check_bytes(name: str, value: int, shapes: Iterable[tuple[int, ...]], dtype: DTypeLike) -> None:
    """Raise a ValueError if an array of one of these shapes would be too large; the shapes follow from ``value``."""
    item = np.dtype(dtype).itemsize
    if any(math.prod(shape) * item > MAX_BYTES for shape in shapes):
        raise ValueError(f"{name} must make arrays of at most {MAX_BYTES} bytes; got {shown(value)}")


def as_bool(name: str, value: object) -> bool:
    """``value`` as a bool; a TypeError if it is not one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def as_number(name: str, value: object) -> float:
    """``value`` as a float.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is NaN or too large for a float.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    number = as_float(name, value)
    if math.isnan(number):
        raise ValueError(f"{name} must be a number; got nan")
    return number


def positive_number(name: str, value: object) -> float:
    """``value`` as a float above 0.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is NaN, not above 0 or too large for a float.
    """
    number = as_number(name, value)
    if not number > 0:
        raise ValueError(f"{name} must be above 0; got {number!r}")
    return number


def probability(name: str, value: object) -> float:
    """``value`` as a float in [0, 1).

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is outside that interval, or NaN.
    """
    number = as_number(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must be a probability in [0, 1); got {number!r}")
    return number


def as_float(name: str, value: SupportsFloat) -> float:
    """``value`` as a float; a ValueError if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float; got {shown(value)}") from None


def shown(value: object) -> str:
    """The text of a value in an error: its repr; for a huge integer, only its length."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"{'a negative' if value < 0 else 'an'} integer of {value.bit_length()} bits"
    return repr(value)


def check_bounds(low_name: str, low: float | None, high_name: str, high: float | None) -> None:
    """Raise a ValueError unless two bounds are both None, or both are given and the lower is at most the upper."""
    if low is not None and high is not None:
        if low > high:
            raise ValueError(f"{low_name} must not exceed {high_name}; got {low!r} and {high!r}")
    elif low is not None or high is not None:
        raise ValueError(f"{low_name if low is None else high_name} must be given when the other bound is; got None")
