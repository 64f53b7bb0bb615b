"""Inference calls of one op whose shapes change from call to call.

An op caches the call of one shape, and plans each other shape anew, which takes longer than a short call does. This
module keeps the cached calls of several shapes. To need few shapes, a batch may have more rows than sequences: the
number of rows comes from a short list and is at most an eighth larger. The bits of a sequence do not depend on the
others.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.interface import CachedForwardCall
from fusedrnn.locks import Lock
from fusedrnn.op.stream import ForwardOp
from fusedrnn.op.streamed_spec import streamed
from fusedrnn.quantized_params import Params
from fusedrnn.runtime.thread_pool import get_num_threads, thread_limits

MAX_SHAPES = 64
"""Shapes that are kept, enough for all batches up to 1,024 of one number of steps. The oldest is dropped first."""
_MAX_IDLE = 4
"""Arrays for states that a small batch keeps for later calls: one for each of several calls at the same time."""
_EXACT = 16
"""Up to so many sequences, a batch has no additional rows. Above, eight sizes lie between two powers of two."""


class SelectsEngine(ForwardOp, Protocol):
    """What these calls need of an operator."""

    def _select_engine(self, training: bool) -> tuple[str, Any]:
        """The name and the engine for a call."""


class Batch:
    """Calls of one shape.

    Attributes:
        rows: Sequences of the batch.
        is_small: Whether they are few.
        x_strides: The strides of the input as the calls take it.
        calls: The cached call of each number of threads.
        idle: Arrays for initial states that a call may use. It puts them back if the batch is small, because making new
            ones takes a noticeable part of a call of one step.
    """

    __slots__ = ("_dtype", "_state_shapes", "calls", "idle", "is_small", "rows", "x_strides")

    def __init__(self, x: Array, state_shapes: tuple[tuple[int, int, int], ...]) -> None:
        self.rows, self.x_strides, self._state_shapes, self._dtype = x.shape[1], x.strides, state_shapes, x.dtype
        self.calls: dict[int, CachedForwardCall | None] = {}
        self.idle: deque[tuple[Array, ...]] = deque(maxlen=_MAX_IDLE)
        self.is_small = self.rows <= _EXACT

    def new_states(self) -> tuple[Array, ...]:
        """New arrays for initial states."""
        return tuple([np.empty(shape, self._dtype) for shape in self._state_shapes])


class InferenceCalls:
    """Calls of an op without lengths, without resets and without a buffer for the output.

    Args:
        op: The op.
        params: Its parameters, frozen or quantized.

    Attributes:
        batches: The calls, by the shape of their input. :meth:`padded` copies inputs of other shapes and strides.
    """

    def __init__(self, op: SelectsEngine, params: Params) -> None:
        self._spec, self._dtype, self._params = streamed(op.spec), op.spec.dtype, params
        self._engine = op._select_engine(False)[1]
        self._cache = self._spec.cacher(self._engine)
        self.batches: dict[tuple[int, ...], Batch] = {}
        self._lock = Lock()

    def padded(self, x: Array) -> tuple[Array, Batch]:
        """A copy of the input (T, N, I), padded with rows of zeros to the size of a batch; and that batch."""
        steps, count, size = x.shape
        copy = np.zeros((steps, self._num_rows(count), size), self._dtype)
        copy[:, :count] = x
        batch = self.batches.get(copy.shape)
        if batch is None:
            batch = Batch(copy, self._spec.state_shapes(copy.shape[1]))
            with self._lock:
                if len(self.batches) >= MAX_SHAPES:
                    del self.batches[next(iter(self.batches))]
                self.batches[copy.shape] = batch
        return copy, batch

    def _num_rows(self, count: int) -> int:
        """The rows of the call for so many sequences."""
        if count <= _EXACT or self._cache is None:
            return count
        unit = 1 << (count - 1).bit_length() - _EXACT.bit_length() + 1
        return -(-count // unit) * unit

    def run(self, batch: Batch, x: Array, states: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...], None]:
        """(output, final states, None): the form of a cached call's result. The states are flat and contiguous.

        The operands have the batch's shapes and strides; ``states`` are flat.
        """
        threads = get_num_threads()
        call = batch.calls.get(threads)
        if call is not None:
            result = call(x, self._params, states, None, 0, None)
            if result is not None:
                return result
            if not x.flags.aligned:
                return self.run(batch, x.copy(), states)
            if threads > 1:  # another call has the thread pool
                with thread_limits(1):
                    return self.run(batch, x, states)
        spec = self._spec
        operands = spec.operands(x, self._params, states)
        final = spec.flat(self._engine.forward(operands))
        if self._cache is not None:
            batch.calls[threads] = self._cache(operands, states)
        return operands.y, tuple([np.ascontiguousarray(state) for state in final]), None
