"""Streams that come and go: a slot holds the states of each stream, and a call advances any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.op.bfloat16_arrays import is_bfloat16
from fusedrnn.op.inference_calls import Batch, InferenceCalls, SelectsEngine
from fusedrnn.op.resets import restarted
from fusedrnn.op.snapshot import from_bytes, to_bytes
from fusedrnn.op.stream_ids import check_id, check_ids
from fusedrnn.op.stream_slots import StreamSlots, refuse
from fusedrnn.op.streamed_spec import States, streamed
from fusedrnn.op.validation import check_array, check_x
from fusedrnn.quantized_params import Params
from fusedrnn.runtime.slot_kernel import CLAIM, CLEAR, GATHER, JOIN, NOBODY, RELEASE, SCATTER
from fusedrnn.scalars import as_int


class Streams:
    """A set of streams that come and go. :meth:`RNNOp.streams` and :meth:`NetworkOp.streams` make it.

    A stream that joins gets an id, a number that no other stream of the set ever has. :meth:`step` runs the next chunk
    of any of the streams in one call. The outputs of a stream, joined, have the bits of one call on its joined chunks,
    whichever other streams were in its calls.

    Any number of threads may call all methods at once. Calls that run at the same time must be of different streams, or
    the second one raises an error. A call that fails or is interrupted leaves the states as they were.

    Attributes:
        op: The operator that runs the chunks.
        params: Its parameters, frozen or quantized.
        capacity: How many streams there may be at a time.

    Example:
    >>> import numpy as np
    >>> from fusedrnn import RNNOp, RNNSpec
    >>> op = RNNOp(RNNSpec("gru", input_size=3, hidden_size=5))
    >>> streams = op.streams(np.zeros(op.spec.layout.size, np.float32), capacity=100)
    >>> first, second = streams.join(), streams.join()
    >>> streams.step([first, second], np.ones((1, 2, 3), np.float32)).shape
    (1, 2, 5)
    >>> streams.step([second], np.ones((4, 1, 3), np.float32)).shape
    (4, 1, 5)
    >>> streams.leave(first)
    >>> len(streams)
    1
    """

    def __init__(self, op: SelectsEngine, params: Params, capacity: int) -> None:
        self.op, self.capacity = op, capacity
        self.params = params
        self._spec, self._dtype = streamed(op.spec), np.dtype(op.spec.dtype)
        self._slots = StreamSlots(capacity, self._spec.state_shapes, self._dtype)
        self._calls = InferenceCalls(op, params)

    def __len__(self) -> int:
        """How many streams there are."""
        return int(np.count_nonzero(self._slots.owners != NOBODY))

    def __repr__(self) -> str:
        return f"<{len(self)} streams of {self.capacity}, {self.op.spec!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Streams cannot be pickled or copied: take snapshots of the streams, and restore them")

    @property
    def ids(self) -> list[int]:
        """The ids of all streams, in the order of their slots."""
        owners = self._slots.owners.copy()
        ids: list[int] = owners[owners != NOBODY].tolist()
        return ids

    def join(self, states: States = None) -> int:
        """Take a slot for a new stream.

        Args:
            states: Its initial states, each (L, 1, H), as in :meth:`RNNOp.forward` or :meth:`NetworkOp.forward`, which
                are copied; None for zeros.

        Returns:
            Its id.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value; the message is of the same form.
            RuntimeError: If all slots are taken.
        """
        arrays = self._spec.check_states(states, 1)
        slots, write = self._slots, CLEAR if arrays is None else SCATTER
        claim = next(slots.claims)
        try:
            new = slots.use(slots.address, JOIN | write, claim, _NO_IDS, 1, 1, arrays or ())
        except BaseException:  # of a signal's handler, after the call: the id is lost
            slots.free_claimed(claim)
            raise
        if new == NOBODY:
            raise RuntimeError(f"all {self.capacity} slots are taken: a stream must leave before another one joins")
        slots.claimed[new % self.capacity] = 0  # no call, so that no signal's handler runs after it
        return new

    def leave(self, id: int) -> None:
        """End a stream and free its slot.

        Raises:
            TypeError: If ``id`` is no integer.
            ValueError: If there is no such stream.
            RuntimeError: If a call of the stream is running.
        """
        self._slots.free(check_id(id))

    def step(
        self,
        ids: Sequence[int] | Array,
        x: Array,
        *,
        resets: Array | Sequence[Sequence[bool]] | None = None,
        reset_states: States = None,
    ) -> Array:
        """Run the next chunk of some streams.

        Args:
            ids: The ids of n streams, in any order, none twice. An array of int64 takes the least time.
            x: Their input (T, n, I), any T from 1 up, as in :meth:`RNNOp.forward`.
            resets: Steps of the chunk at which a sequence begins anew, bools (T, n), as in :meth:`RNNOp.forward`.
            reset_states: The states after a reset, each (L, n, H), as in :meth:`RNNOp.forward`; None for zeros.

        Returns:
            The output (T, n, H).

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value, no stream has one of the ids, or an id is given
                twice.
            RuntimeError: If another call of one of the streams is running.
        """
        owners = check_ids(ids)
        count, calls, slots, dtype, result_dtype = len(owners), self._calls, self._slots, self._dtype, None
        batch = calls.batches.get(x.shape) if type(x) is np.ndarray else None
        if batch is None or batch.rows != count or x.dtype is not dtype or x.strides != batch.x_strides:
            x, result_dtype = self._checked_x(x, count)
            x, batch = calls.padded(x)
        rows, idle = batch.rows, batch.idle
        try:
            states = idle.pop()
        except IndexError:
            states = batch.new_states()
        use, address, claim = slots.use, slots.address, next(slots.claims)
        # An interrupt is raised between two calls of machine code: by then this call has claimed all its slots, or
        # none. The handler writes the old states, since the call that wrote the new ones may have been the last before
        # the interrupt. Where another call has claimed the stream since, machine code leaves the states as they are.
        has_states = False
        try:
            error = use(address, CLAIM | GATHER, claim, owners, count, rows, states)
            if error:
                refuse(error, owners)
            has_states = True
            if resets is None and reset_states is None:
                y, final, _ = calls.run(batch, x, states)
            else:
                y, final, _ = self._run_with_resets(batch, x, states, resets, reset_states, count)
            if rows != count:
                y = y[:, :count]
            if result_dtype is not None:
                y = y.astype(result_dtype)
            use(address, SCATTER | RELEASE, claim, owners, count, rows, final)
        except BaseException:
            use(address, SCATTER | RELEASE if has_states else RELEASE, claim, owners, count, rows, states)
            raise
        if batch.is_small:
            idle += [states]  # no call, so that no signal's handler runs after it
        return y

    def reset(self, ids: Sequence[int] | Array, states: States = None) -> None:
        """Start some streams over.

        Args:
            ids: The ids of n streams.
            states: The states to start from, each (L, n, H), as in :meth:`join`, which are copied; None for zeros.

        Raises:
            TypeError, ValueError, RuntimeError: As :meth:`step` does.
        """
        owners = check_ids(ids)
        arrays = self._spec.check_states(states, len(owners))
        self._slots.replace(CLEAR if arrays is None else SCATTER, owners, arrays or ())

    def states(self, ids: Sequence[int] | Array) -> tuple[Any, ...]:
        """Copies of the current states of n streams, each (L, n, H); of a network, a tuple of these for each layer.

        Raises:
            TypeError, ValueError, RuntimeError: As :meth:`step` does.
        """
        return self._spec.nested(self._slots.gathered(check_ids(ids)))

    def snapshot(self, id: int) -> bytes:
        """The states of a stream as bytes, for :meth:`restore` in this or another process, on any machine.

        The bytes describe the spec. They do not hold the parameters: the states have the same meaning only with equal
        parameters.

        Raises:
            TypeError, ValueError, RuntimeError: As :meth:`leave` does.
        """
        return to_bytes(self._spec, self._slots.gathered(check_id(id)))

    def restore(self, snapshot: bytes, id: int | None = None) -> int:
        """Continue a stream from its snapshot.

        Args:
            snapshot: What :meth:`snapshot` returned.
            id: The stream that gets the states; None for a new one.

        Returns:
            The id.

        Raises:
            TypeError: If ``snapshot`` is not bytes or ``id`` no integer.
            ValueError: If the snapshot is of another spec, when the message names the fields that differ; if it is
                damaged or no snapshot; or if there is no such stream.
            RuntimeError: If all slots are taken, or a call of the stream is running.
        """
        states = from_bytes(self._spec, snapshot)
        if id is None:
            return self.join(self._spec.nested(states))
        own_id = as_int("id", id)
        self._slots.replace(SCATTER, check_ids([own_id]), states)
        return own_id

    def _checked_x(self, x: object, count: int) -> tuple[Array, Any]:
        """The input in the spec's dtype, and the dtype of the output if that differs, else None."""
        spec = self._spec.layers[0]
        values, dtype = x, None
        if self._spec.takes_bfloat16 and is_bfloat16(x):
            values, dtype = x.astype(spec.dtype), x.dtype
        checked = check_array("x", values, spec)
        if checked.ndim == 3 and checked.shape[1] != count:
            raise ValueError(
                f"x must have shape (T, {count}, {spec.input_size}), with a sequence for each of the ids; "
                f"got {checked.shape}"
            )
        return check_x(checked, spec), dtype

    def _run_with_resets(
        self, batch: Batch, x: Array, states: tuple[Array, ...], resets: Any, reset_states: States, count: int
    ) -> tuple[Array, tuple[Array, ...], None]:
        """Run a chunk with resets; its first ``count`` rows are those of the streams.

        A single step that resets to zeros needs no resets: its initial states are set to zero instead.
        """
        if reset_states is None and len(x) == 1:
            return self._calls.run(batch, x, restarted(states, count, resets))
        rows = tuple([np.ascontiguousarray(state[:, :count]) for state in states])
        initial, options = self._spec.nested(rows), {"resets": resets, "reset_states": reset_states}
        y, final, _ = self.op.forward(x[:, :count], self.params, initial, **options)
        padding = ((0, 0), (0, x.shape[1] - count), (0, 0))
        return np.pad(y, padding), tuple([np.pad(state, padding) for state in self._spec.flat(final)]), None


_NO_IDS = np.zeros(1, np.int64)
