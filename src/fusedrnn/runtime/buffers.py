"""Memory that outlives a call: scratch for later calls, and buffers that return to a pool with their last reference."""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fusedrnn.arrays import Array
from fusedrnn.jit.sync import CACHE_LINE

_HUGE_PAGE = 2 << 20
# How many scratch buffers an op keeps for its next calls, at most: one for each caller that uses it at the same time.
_MAX_IDLE_SCRATCH = 4
# A buffer serves requests of at least a sixteenth of its size. A buffer of at most _SMALL bytes serves any request.
_MAX_EXCESS, _SMALL = 16, 1 << 20


def round_up_to_cache_line(size: int) -> int:
    """Round a size up to whole cache lines."""
    return -(-size // CACHE_LINE) * CACHE_LINE


def pad_against_conflicts(size: int) -> int:
    """Round a row's size up to an odd number of cache lines, so that rows do not all map to the same cache sets."""
    return (-(-size // CACHE_LINE) | 1) * CACHE_LINE


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike, *, min_huge: int = 3 << 18) -> Array:
    """A new C-contiguous array that begins at a cache line; its content is undefined.

    An array of at least ``min_huge`` bytes gets huge pages where the system has them. Its cache lines are then
    consecutive in physical memory, so that a cache holds them without conflicts, and it takes few entries of the TLB.
    """
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    huge = size >= min_huge and hasattr(mmap, "MADV_HUGEPAGE")
    raw = _huge_pages(size) if huge else np.empty(size + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % (_HUGE_PAGE if huge else CACHE_LINE)
    return raw[start : start + size].view(kind).reshape(shape)


def _huge_pages(size: int) -> Array:
    """Memory that holds ``size`` bytes from a multiple of the huge page's size on. Huge pages are requested for it."""
    try:
        memory = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE + _HUGE_PAGE, flags=mmap.MAP_PRIVATE)
    except (OSError, OverflowError) as error:  # the same error as NumPy's
        raise MemoryError(f"Unable to allocate {size} bytes of memory: {error}") from error
    with suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


class _Returned(weakref.ref["Lease"]):
    """A weak reference to a lease that keeps the lease's buffer."""

    __slots__ = ("address", "buffer")
    buffer: Array
    address: int


class Lease:
    """A buffer of bytes that returns to its pool with the last reference to this object.

    An array that NumPy makes of it refers to it. The callback of a weak reference returns the buffer. The callback is
    the pool's own ``append``: the garbage collector may call it anywhere, so it must neither run Python code, which an
    interrupt could break off, nor take a lock.
    """

    __slots__ = ("__weakref__", "_returned", "address", "buffer")

    def __init__(self, buffer: Array, address: int, idle: deque[_Returned]) -> None:
        self.buffer, self.address = buffer, address
        self._returned = returned = _Returned(self, idle.append)
        returned.buffer, returned.address = buffer, address

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """NumPy's protocol for its bytes as an array."""
        return self.buffer.__array_interface__


class BufferPool:
    """Buffers of one kind, leased or idle. The methods of a deque are atomic: no lock is needed.

    It has as many buffers as were leased at the same time, and a few more if their sizes are far apart.

    Args:
        max_idle: Idle buffers to keep; the one that has been idle longest is freed first.
    """

    def __init__(self, max_idle: int) -> None:
        self._idle: deque[_Returned] = deque(maxlen=max_idle)

    def clear(self) -> None:
        """Free the idle buffers."""
        self._idle.clear()

    def lease(self, size: int) -> Lease:
        """A buffer of at least ``size`` bytes, a whole number of cache lines; its content is undefined.

        It is the smallest idle buffer that is large enough. A buffer that is many times too large stays idle: a caller
        that keeps little must not occupy much memory.
        """
        try:
            last = self._idle.pop()
        except IndexError:
            return self._new(size)
        if last.buffer.size == size:  # a loop of calls of the same size
            return Lease(last.buffer, last.address, self._idle)
        self._idle.append(last)
        while True:
            by_size = sorted(tuple(self._idle), key=lambda idle: idle.buffer.size)
            smallest = next((idle for idle in by_size if idle.buffer.size >= size), None)
            too_large = smallest is not None and smallest.buffer.size > max(_MAX_EXCESS * size, _SMALL)
            # A new buffer replaces the largest of those that are too small.
            too_small = next((idle for idle in reversed(by_size) if idle.buffer.size < size), None)
            removed = too_small if smallest is None or too_large else smallest
            try:
                if removed is not None:
                    self._idle.remove(removed)
            except ValueError:
                continue  # another thread has taken it
            if smallest is None:
                return self._new(size)
            if too_large:
                # The new buffer is large enough for every request that the idle buffer is too large for.
                return self._new(smallest.buffer.size // (_MAX_EXCESS * CACHE_LINE) * CACHE_LINE)
            return Lease(smallest.buffer, smallest.address, self._idle)

    def _new(self, size: int) -> Lease:
        buffer = aligned_empty((size,), np.uint8)
        return Lease(buffer, buffer.ctypes.data, self._idle)


class Scratch:
    """A buffer of bytes and its address."""

    __slots__ = ("address", "buffer")

    def __init__(self, size: int) -> None:
        self.buffer = aligned_empty((size,), np.uint8)
        self.address: int = self.buffer.ctypes.data


class ScratchPool:
    """The scratch of one op. Calls at the same time get different buffers, successive calls the same one.

    The methods of a deque are atomic: there is no lock that an interrupt could leave locked.
    """

    def __init__(self) -> None:
        self._idle: deque[Scratch] = deque(maxlen=_MAX_IDLE_SCRATCH)

    def acquire(self, size: int) -> Scratch:
        """A buffer of at least that many bytes; its content is undefined."""
        try:
            scratch = self._idle.pop()
        except IndexError:
            return Scratch(size)
        return scratch if scratch.buffer.size >= size else Scratch(size)

    def release(self, scratch: Scratch) -> None:
        """Return a buffer."""
        self._idle.append(scratch)

    def clear(self) -> None:
        """Free the idle buffers."""
        self._idle.clear()
