"""Memory that outlives a call: scratch handed from call to call, buffers that come back when nobody holds them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusedrnn.engine.locks import Lock

Array = NDArray[Any]
_ALIGNMENT = 64
# Buffers an op keeps for its next calls: as many as callers that use it at the same time, within reason.
_MOST_IDLE = 4


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """A new C-contiguous array that begins at a cache line; its content is undefined."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


class Lease:
    """A buffer of bytes that goes back to its pool with the last reference to this."""

    def __init__(self, buffer: Array, idle: deque[Array]) -> None:
        self.buffer, self._idle = buffer, idle
        self.address: int = buffer.ctypes.data

    def __del__(self) -> None:
        # Not under a lock: the garbage collector may come here from anywhere.
        self._idle.append(self.buffer)


class Pool:
    """Buffers of one kind, some of them idle. A deque's own steps are atomic: it needs no lock.

    Args:
        most: Idle buffers to keep; the one that has been idle longest gives way.
    """

    def __init__(self, most: int = _MOST_IDLE) -> None:
        self._idle: deque[Array] = deque(maxlen=most)

    def lease(self, size: int) -> Lease:
        """A buffer of at least ``size`` bytes, its content undefined: an idle one if one is large enough."""
        for _ in range(len(self._idle)):
            try:
                buffer = self._idle.pop()
            except IndexError:
                break
            if buffer.size >= size:
                return Lease(buffer, self._idle)
            self._idle.appendleft(buffer)
        return Lease(aligned_empty((size,), np.uint8), self._idle)


class Workspaces:
    """The scratch buffers of one op. Two calls at once get two; one call after another gets the same one."""

    def __init__(self) -> None:
        self._idle: list[Array] = []
        self._lock = Lock()

    @contextmanager
    def borrow(self, size: int, zeroed: int) -> Iterator[int]:
        """The address of a buffer of at least ``size`` bytes, the first ``zeroed`` of them zero."""
        with self._lock:
            buffer = self._idle.pop() if self._idle else None
        if buffer is None or buffer.size < size:
            buffer = aligned_empty((size,), np.uint8)
        buffer[:zeroed] = 0
        yield buffer.ctypes.data
        with self._lock:
            if len(self._idle) < _MOST_IDLE:
                self._idle.append(buffer)
