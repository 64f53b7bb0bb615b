"""Arrays that can never be written: an op does not check frozen parameters for changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.ma
from numpy.typing import NDArray

Array = NDArray[Any]


class FrozenParams:
    """Parameters that are no array and can never change."""


class _FrozenBytes(bytes):
    """The memory of a frozen array.

    A type of its own marks it: NumPy leaves an unpickled array on the plain bytes of the pickle, and makes it writable.
    """


def frozen(params: Array) -> Array:
    """A copy of a parameter vector that can never be written, so that an op need not check it for changes.

    A frozen array and quantized parameters are returned unchanged.

    To check whether parameters have changed takes as long as to read them: most of the time of a call of one step of
    one sequence, next to nothing in a call of some dozen steps.

    Args:
        params: A NumPy array of floating-point numbers.

    Raises:
        TypeError: If ``params`` is anything else.
    """
    if isinstance(params, FrozenParams):  # which callers of typed code pass as Any
        return params
    is_array = isinstance(params, np.ndarray) and not isinstance(params, numpy.ma.MaskedArray)
    if not is_array or params.dtype.kind != "f":
        kind = params.dtype if is_array else type(params).__name__
        raise TypeError(f"params must be a NumPy array of floating-point numbers; got {kind}")
    if is_frozen(params):
        return params
    return frozen_copy(params)


def frozen_copy(array: Array) -> Array:
    """A copy of any array that can never be written."""
    return np.frombuffer(_FrozenBytes(array.tobytes()), array.dtype).reshape(array.shape)


def is_frozen(params: Array | FrozenParams) -> bool:
    """Whether :func:`frozen` returned an array, or it is a view of one; also of other parameters that cannot change.

    The read-only flag does not tell: the owner of the memory can clear it, write, and set it again.
    """
    owner: object = params
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, (_FrozenBytes, FrozenParams))
