"""The slots of streams: reading, replacing and freeing them, each undone if a signal's handler interrupts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import DTypeLike

from fusedrnn.arrays import Array
from fusedrnn.op.stream_ids import UNKNOWN_ID
from fusedrnn.runtime import slot_kernel
from fusedrnn.runtime.slot_kernel import CLAIM, FREE, GATHER, OWN, RELEASE, SCATTER
from fusedrnn.runtime.slots import Slots

Shapes = Sequence[tuple[int, int, int]]


class StreamSlots(Slots):
    """Slots whose rows are the states of streams.

    Args:
        capacity: The number of slots.
        state_shapes: The shapes of the states of so many streams, each (layers, streams, elements).
        dtype: The dtype of the states.
    """

    def __init__(self, capacity: int, state_shapes: Callable[[int], Shapes], dtype: DTypeLike) -> None:
        super().__init__(capacity, state_shapes(1), dtype)
        self._state_shapes, self._dtype = state_shapes, np.dtype(dtype)

    def gathered(self, owners: Array) -> tuple[Array, ...]:
        """Copies of the states of some streams, flat."""
        count, arrays = len(owners), self._new_states(len(owners))
        error = self.use(self.address, CLAIM | GATHER | RELEASE, next(self.claims), owners, count, count, arrays)
        if error:
            refuse(error, owners)
        return arrays

    def replace(self, action: int, owners: Array, states: tuple[Array, ...]) -> None:
        """Set the states of some streams to zero, or to these arrays, by CLEAR or SCATTER."""
        count, before, has_before = len(owners), self._new_states(len(owners)), False
        use, address, claim = self.use, self.address, next(self.claims)
        try:
            error = use(address, CLAIM | GATHER, claim, owners, count, count, before)
            if error:
                refuse(error, owners)
            has_before = True
            use(address, action | RELEASE, claim, owners, count, count, states)
        except BaseException:
            use(address, SCATTER | RELEASE if has_before else RELEASE, claim, owners, count, count, before)
            raise

    def free(self, owners: Array) -> None:
        """Make the slots of some streams free."""
        count, use, address, claim = len(owners), self.use, self.address, next(self.claims)
        try:
            error = use(address, CLAIM | FREE | RELEASE, claim, owners, count, count, ())
        except BaseException:  # of a signal's handler, after the call
            use(address, OWN | RELEASE, claim, owners, count, count, ())
            raise
        if error:
            refuse(error, owners)

    def _new_states(self, count: int) -> tuple[Array, ...]:
        """New arrays for the states of so many streams."""
        return tuple([np.empty(shape, self._dtype) for shape in self._state_shapes(count)])


def refuse(error: int, owners: Array) -> NoReturn:
    """Raise the error that a call of machine code has returned."""
    index, kind = divmod(error, slot_kernel.KINDS)
    id = int(owners[index])
    if kind == slot_kernel.UNKNOWN:
        raise ValueError(UNKNOWN_ID.format(id))
    if kind == slot_kernel.REPEATED:
        raise ValueError(f"ids must have each stream once; got {id} twice")
    raise RuntimeError(f"stream {id} is in another call that is running")
