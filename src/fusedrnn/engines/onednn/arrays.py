"""The arrays of a call by name: float32 arrays in one leased buffer, or the caller's own."""

from __future__ import annotations

from math import prod

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.runtime.buffers import BufferPool, round_up_to_cache_line

ITEM = 4


class ArrayLayout:
    """The places of named arrays in a buffer; each begins at a cache line.

    Attributes:
        nbytes: Bytes of the buffer.
        arrays: The byte offset and the shape of each array.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.arrays: dict[str, tuple[int, tuple[int, ...]]] = {}

    def add(self, name: str, *shape: int) -> None:
        """Append an array of that shape."""
        self.arrays[name] = self.nbytes, shape
        self.nbytes += round_up_to_cache_line(prod(shape) * ITEM)

    def add_bytes(self, name: str, nbytes: int) -> None:
        """Append an array of at least ``nbytes`` bytes."""
        self.add(name, -(-nbytes // ITEM))


class Arrays:
    """The arrays of a layout in a buffer of a pool. Their content is undefined. A caller's arrays can replace them.

    The buffer returns to the pool with the last reference to this object and to its arrays.

    Attributes:
        addresses: The address of each array.
    """

    def __init__(self, layout: ArrayLayout, pool: BufferPool) -> None:
        self._layout, self._lease = layout, pool.lease(layout.nbytes)
        self.addresses = {name: self._lease.address + offset for name, (offset, _) in layout.arrays.items()}
        self._replaced: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        """An array, by name."""
        if name in self._replaced:
            return self._replaced[name]
        offset, shape = self._layout.arrays[name]
        raw: Array = np.asarray(self._lease)
        return raw[offset : offset + prod(shape) * ITEM].view(np.float32).reshape(shape)

    def replace(self, name: str, array: Array) -> Array:
        """Use ``array``, which is contiguous, under that name; return it."""
        self._replaced[name] = array
        self.addresses[name] = array.ctypes.data
        return array

    def read(self, name: str, array: Array | None) -> None:
        """Use ``array``, or a copy of it if it is not contiguous; zeros for None."""
        if array is not None and array.flags.c_contiguous:
            self.replace(name, array)
        else:
            self[name][...] = 0 if array is None else array

    def write(self, name: str, buffer: Array | None) -> Array:
        """Use ``buffer`` if it is contiguous; return the array to write to."""
        return self.replace(name, buffer) if buffer is not None and buffer.flags.c_contiguous else self[name]
