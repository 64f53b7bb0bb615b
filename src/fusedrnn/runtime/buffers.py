"""Memory that outlives a call: scratch handed from call to call, buffers that come back when nobody holds them."""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
_ALIGNMENT = 64
# From this size on a buffer is worth large pages, where the system has them: its lines then lie side by side in memory
# too, which a cache holds without conflicts, and which takes few entries of the tables that translate addresses.
_WORTH_PAGES, _LARGE_PAGE = 3 << 18, 2 << 20
# Buffers an op keeps for its next calls: as many as callers that use it at the same time, within reason.
_MOST_IDLE = 4
# A buffer serves for what needs a sixteenth of it or more; a small one for whatever needs less.
_ROOMY, _SMALL = 16, 1 << 20


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """A new C-contiguous array that begins at a cache line; its content is undefined."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    large = size >= _WORTH_PAGES and hasattr(mmap, "MADV_HUGEPAGE")
    raw = _large_pages(size) if large else np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % (_LARGE_PAGE if large else _ALIGNMENT)
    return raw[start : start + size].view(kind).reshape(shape)


def _large_pages(size: int) -> Array:
    """Room for so many bytes that begin where a large page does; the system is asked for large ones."""
    try:
        room = mmap.mmap(-1, -(-size // _LARGE_PAGE) * _LARGE_PAGE + _LARGE_PAGE, flags=mmap.MAP_PRIVATE)
    except (OSError, OverflowError) as error:  # as NumPy has it
        raise MemoryError(f"Unable to allocate {size} bytes of memory: {error}") from error
    with suppress(OSError):  # a system without them
        room.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(room, np.uint8)


class _Return(weakref.ref["Lease"]):
    """What is left of a lease when it has gone: its buffer."""

    __slots__ = ("address", "buffer")
    buffer: Array
    address: int


class Lease:
    """A buffer of bytes that goes back to its pool with the last reference to this.

    An array that NumPy makes of it holds on to it. A weak reference with the pool's own ``append`` for a callback
    brings it back: no Python code runs then, which an interrupt could fall into, nor is a lock taken, since the garbage
    collector may come from anywhere.
    """

    __slots__ = ("__weakref__", "_back", "address", "buffer")

    def __init__(self, buffer: Array, address: int, idle: deque[_Return]) -> None:
        self.buffer, self.address = buffer, address
        self._back = back = _Return(self, idle.append)
        back.buffer, back.address = buffer, address

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Its bytes as an array, as NumPy wants to know them."""
        return self.buffer.__array_interface__


class BufferPool:
    """Buffers of one kind, some of them idle. A deque's own steps are atomic: it needs no lock.

    There are as many buffers as were on lease at once, and a few more for sizes far apart.

    Args:
        most: Idle buffers to keep; the one that has been idle longest gives way.
    """

    def __init__(self, most: int) -> None:
        self._idle: deque[_Return] = deque(maxlen=most)

    def clear(self) -> None:
        """Let go of the idle ones."""
        self._idle.clear()

    def lease(self, size: int) -> Lease:
        """A buffer of at least ``size`` bytes, a whole number of cache lines, its content undefined.

        It is the smallest idle one that is large enough. One that is many times too large stays idle: who holds little
        shall not hold much memory.
        """
        try:
            last = self._idle.pop()
        except IndexError:
            return self._new(size)
        if last.buffer.size == size:  # a loop of calls of one kind
            return Lease(last.buffer, last.address, self._idle)
        self._idle.append(last)
        while True:
            by_size = sorted(tuple(self._idle), key=lambda back: back.buffer.size)
            fitting = next((back for back in by_size if back.buffer.size >= size), None)
            roomy = fitting is not None and fitting.buffer.size > max(_ROOMY * size, _SMALL)
            # Without one that fits, a new one stands in for the largest of those that are too small.
            too_small = next((back for back in reversed(by_size) if back.buffer.size < size), None)
            chosen = too_small if fitting is None or roomy else fitting
            try:
                if chosen is not None:
                    self._idle.remove(chosen)
            except ValueError:
                continue  # another thread was faster
            if fitting is None:
                return self._new(size)
            if roomy:
                # Large enough for all that the roomy one is too large for.
                return self._new(fitting.buffer.size // (_ROOMY * _ALIGNMENT) * _ALIGNMENT)
            return Lease(fitting.buffer, fitting.address, self._idle)

    def _new(self, size: int) -> Lease:
        buffer = aligned_empty((size,), np.uint8)
        return Lease(buffer, buffer.ctypes.data, self._idle)


class Scratch:
    """A buffer of bytes and where it is."""

    __slots__ = ("address", "buffer")

    def __init__(self, size: int) -> None:
        self.buffer = aligned_empty((size,), np.uint8)
        self.address: int = self.buffer.ctypes.data


class Workspaces:
    """The scratch of one op. Two calls at once get two buffers; one call after another gets the same one.

    A deque's own steps are atomic: there is no lock for an interrupt to leave taken.
    """

    def __init__(self) -> None:
        self._idle: deque[Scratch] = deque(maxlen=_MOST_IDLE)

    def acquire(self, size: int) -> Scratch:
        """A buffer of at least that many bytes, its content undefined."""
        try:
            scratch = self._idle.pop()
        except IndexError:
            return Scratch(size)
        return scratch if scratch.buffer.size >= size else Scratch(size)

    def clear(self) -> None:
        """Let go of the idle ones."""
        self._idle.clear()

    def release(self, scratch: Scratch) -> None:
        """The buffer is not needed any more."""
        self._idle.append(scratch)
