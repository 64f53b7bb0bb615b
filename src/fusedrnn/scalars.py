"""Numbers that callers pass: as floats, and as text for errors."""

from __future__ import annotations

from typing import SupportsFloat

# Python refuses to write integers of thousands of digits; no argument has more than this by intention.
_MOST_BITS = 128


def as_float(name: str, value: SupportsFloat) -> float:
    """``value`` as a float; the ValueError that names the argument if it is beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float; got {shown(value)}") from None


def shown(value: object) -> str:
    """A value in words for an error; a huge integer by its length."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"{'a negative' if value < 0 else 'an'} integer of {value.bit_length()} bits"
    return repr(value)
