"""How the interpreter lays out tuples and NumPy arrays in memory, as far as machine code reads them."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

# Byte offsets from an array's data pointer to its other fields. They have been the same in every release of NumPy.
NDIM, SHAPE, STRIDES, DTYPE, FLAGS = 8, 16, 24, 40, 48
_ALIGNED, _WRITEABLE = 0x100, 0x400
_WORD = 8


class ObjectLayout(NamedTuple):
    """Byte offsets: of a tuple's items and of their number, of an object's type, of an array's data pointer."""

    items_offset: int
    size_offset: int
    type_offset: int
    data_offset: int


@lru_cache(maxsize=1)
def object_layout() -> ObjectLayout | None:
    """The layout in this interpreter; None if it is not the expected one: then machine code must not read objects."""
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != _WORD:
        return None
    head = object.__basicsize__
    layout = ObjectLayout(tuple.__basicsize__, head, head - _WORD, head)
    if np.ndarray.__basicsize__ < head + 7 * _WORD:
        return None
    probe = np.zeros((2, 4, 5), np.float32)[:, 1:]
    probe.flags.writeable = False
    return layout if _layout_is_known(probe, layout) else None


def _layout_is_known(probe: Any, layout: ObjectLayout) -> bool:
    """Whether the fields of an array are where the layout says."""

    def word(address: int) -> int:
        return ctypes.c_int64.from_address(address).value

    def c_int(address: int) -> int:
        return ctypes.c_int32.from_address(address).value

    items = (probe,)
    data_at = id(probe) + layout.data_offset
    return (
        word(id(items) + layout.items_offset) == id(probe)
        and word(id(items) + layout.size_offset) == len(items)
        and word(id(probe) + layout.type_offset) == id(np.ndarray)
        and word(data_at) == probe.ctypes.data
        and c_int(data_at + NDIM) == probe.ndim
        and word(data_at + DTYPE) == id(probe.dtype)
        and c_int(data_at + FLAGS) == probe.flags.num
        and [word(word(data_at + SHAPE) + _WORD * axis) for axis in range(3)] == list(probe.shape)
        and [word(word(data_at + STRIDES) + _WORD * axis) for axis in range(3)] == list(probe.strides)
    )


def guard_of(argument: Any, symbol: int, written: bool) -> list[int] | None:
    """The guard for arguments like this one, which is an array or None. Returns None if no guard can describe it.

    See :data:`fusedrnn.engines.cpu.launch.call_kernel.GUARD`; ``symbol`` is the number of the symbol for its address.
    The guard compares the identity of the dtype: its user must hold a reference to the dtype.
    """
    if argument is None:
        return [id(None), 0, 0, 0, 0, 0, 0, symbol, *[0] * 6]
    if type(argument) is not np.ndarray or argument.ndim > 3 or min(argument.strides, default=0) < 0:
        return None
    shape, strides = argument.shape, argument.strides
    flags = _ALIGNED | _WRITEABLE if written else _ALIGNED
    extent = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + argument.itemsize
    unused = [0] * (3 - argument.ndim)
    return [
        0, id(argument.dtype), argument.ndim, flags, flags, extent, int(written), symbol,
        *shape, *unused, *strides, *unused,
    ]  # fmt: skip
