"""Arrays that can never be written. An op does not check such frozen parameters for changes."""

from __future__ import annotations

import numpy as np

from fusedrnn.arrays import Array, is_plain


class FrozenParams:
    """Base of parameters that are not an array and can never change."""


class _FrozenBytes(bytes):
    """The memory of a frozen array.

    It needs its own type as a mark, because an array that NumPy unpickles uses the plain bytes of the pickle, and is
    writable.
    """


def frozen(params: Array) -> Array:
    """A copy of a parameter vector that can never be written, so that an op need not check it for changes.

    A frozen array and quantized parameters are returned unchanged. The copy of an array of bfloat16 is of float32,
    which is exact.

    Checking whether parameters have changed takes as long as reading them, which is very little in a call of some dozen
    steps. A call of up to three steps of a plain LSTM, GRU or vanilla RNN does not check them, but transposes the
    weights in registers each time. Frozen parameters save both.

    Args:
        params: A NumPy array of floating-point numbers.

    Raises:
        TypeError: If ``params`` is anything else.
    """
    if isinstance(params, FrozenParams):  # callers of typed code pass these as Any
        return params
    is_array = is_plain(params)
    if is_array and params.dtype.name == "bfloat16":
        params = params.astype(np.float32)
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
    """Whether parameters cannot change: an array from :func:`frozen`, a view of one, or other frozen parameters.

    The read-only flag is not enough: the owner of the memory can clear it, write, and set it again.
    """
    owner: object = params
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, (_FrozenBytes, FrozenParams))
