"""The type of NumPy arrays of any dtype, and which arrays are plain.

Masked arrays are not, since a copy drops their mask, and neither are matrices.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
import numpy.ma
from numpy.typing import NDArray

Array = NDArray[Any]


def is_masked(value: object) -> bool:
    """Whether ``value`` is a masked array. Of sequences, only the sequence itself is looked at."""
    return isinstance(value, numpy.ma.MaskedArray)


def is_plain(value: object) -> TypeGuard[Array]:
    """Whether ``value`` is a NumPy array, not a masked array or a matrix."""
    return isinstance(value, np.ndarray) and not isinstance(value, (numpy.ma.MaskedArray, np.matrix))


def check_is_array(name: str, value: object) -> Array:
    """``value`` if it is a NumPy array, not a masked array or a matrix; else a TypeError that names it."""
    if not is_plain(value):
        raise TypeError(f"{name} must be a NumPy array; got {type(value).__name__}")
    return value
