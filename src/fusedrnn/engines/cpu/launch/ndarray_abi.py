"""Where the interpreter keeps what machine code reads of tuples and NumPy arrays, as far as it is as expected."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

_ALIGNED, _WRITEABLE = 0x100, 0x400
_WORD = 8


class Layout(NamedTuple):
    """Bytes from where an object begins: to a tuple's items, to an object's type, to an array's data pointer.

    What follows the data pointer has been the same in every release of NumPy: see
    :mod:`fusedrnn.engines.cpu.launch.guard_kernel`.
    """

    items_at: int
    type_at: int
    data_at: int


@lru_cache(maxsize=1)
def layout() -> Layout | None:
    """The layout in this interpreter; None if it is another one than expected, and objects are not to be read."""
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != _WORD:
        return None
    head = object.__basicsize__
    found = Layout(tuple.__basicsize__, head - _WORD, head)
    if np.ndarray.__basicsize__ < head + 7 * _WORD:
        return None
    probe = np.zeros((2, 4, 5), np.float32)[:, 1:]
    probe.flags.writeable = False
    return found if _as_expected(probe, found) else None


def _as_expected(probe: Any, found: Layout) -> bool:
    def word(at: int) -> int:
        return ctypes.c_int64.from_address(at).value

    def number(at: int) -> int:
        return ctypes.c_int32.from_address(at).value

    items = (probe,)
    data_at = id(probe) + found.data_at
    return (
        word(id(items) + found.items_at) == id(probe)
        and word(id(probe) + found.type_at) == id(np.ndarray)
        and word(data_at) == probe.ctypes.data
        and number(data_at + 8) == probe.ndim
        and word(data_at + 40) == id(probe.dtype)
        and number(data_at + 48) == probe.flags.num
        and [word(word(data_at + 16) + _WORD * axis) for axis in range(3)] == list(probe.shape)
        and [word(word(data_at + 24) + _WORD * axis) for axis in range(3)] == list(probe.strides)
    )


def described(value: Any, into: int, written: bool) -> list[int] | None:
    """A slot for objects like this one; None for one that no slot describes.

    See :data:`fusedrnn.engines.cpu.launch.guard_kernel.SLOT`. An array may be known by its dtype's identity as long as
    that lives.
    """
    if value is None:
        return [id(None), 0, 0, 0, 0, 0, 0, into, *[0] * 6]
    if type(value) is not np.ndarray or value.ndim > 3 or min(value.strides, default=0) < 0:
        return None
    mask = _ALIGNED | _WRITEABLE if written else _ALIGNED
    extent = sum((size - 1) * stride for size, stride in zip(value.shape, value.strides, strict=True)) + value.itemsize
    rest = [0] * (3 - value.ndim)
    return [
        0, id(value.dtype), value.ndim, mask, mask, extent, int(written), into,
        *value.shape, *rest, *value.strides, *rest,
    ]  # fmt: skip
