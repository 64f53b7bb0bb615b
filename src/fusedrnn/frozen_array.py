"""Arrays that can never change: parameters that an op need not look at twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.ma
from numpy.typing import NDArray

Array = NDArray[Any]


class _Constant(bytes):
    """The memory of a frozen array, which no one can ever write to.

    Plain bytes would not do: NumPy leaves an array that it unpickles on the bytes that it came in, writable.
    """


def frozen(params: Array) -> Array:
    """A copy of a parameter vector that no one can ever write to, so that an op need not look for changes.

    One that is such a copy already is returned as it is.

    Finding out whether parameters have changed takes as long as reading them: most of the time of a call that runs
    one step of one sequence, nothing beside one that runs a few dozen.

    Args:
        params: A NumPy array of floating-point numbers.

    Raises:
        TypeError: If ``params`` is not one.
    """
    is_array = isinstance(params, np.ndarray) and not isinstance(params, numpy.ma.MaskedArray)
    if not is_array or params.dtype.kind != "f":
        kind = params.dtype if is_array else type(params).__name__
        raise TypeError(f"params must be a NumPy array of floating-point numbers; got {kind}")
    if is_constant(params):
        return params
    return np.frombuffer(_Constant(params.tobytes()), params.dtype).reshape(params.shape)


def is_constant(array: Array) -> bool:
    """Whether the array is :func:`frozen`'s.

    A read-only flag would not do: whoever owns the memory can lift it, write, and set it again.
    """
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, _Constant)
