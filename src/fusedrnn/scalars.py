"""Numbers from callers: as floats, and as text for errors."""

from __future__ import annotations

from typing import SupportsFloat

# Python refuses to print integers of thousands of digits. No argument is meant to have more bits than this.
_MAX_BITS = 128


def as_float(name: str, value: SupportsFloat) -> float:
    """``value`` as a float.

    Raises:
        ValueError: If it is too large for a float; the message names the argument.
    """
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float; got {shown(value)}") from None


def shown(value: object) -> str:
    """A value as text for an error: its repr, but only the length of a huge integer."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"{'a negative' if value < 0 else 'an'} integer of {value.bit_length()} bits"
    return repr(value)
