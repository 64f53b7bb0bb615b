"""Rows of several arrays in slots, which owners take and leave: calls gather the rows of some owners into arrays."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from fusedrnn.arrays import Array
from fusedrnn.jit.ndarray_abi import object_layout
from fusedrnn.runtime.buffers import aligned_empty, round_up_to_cache_line
from fusedrnn.runtime.slot_kernel import NOBODY, PART, SLOTS, load_use_slots

_all: weakref.WeakSet[Slots] = weakref.WeakSet()


class Slots:
    """Slots, each of which holds one row of each array; see :mod:`fusedrnn.runtime.slot_kernel`.

    Args:
        capacity: The number of slots.
        shapes: The shapes of the arrays with one row, each (layers, 1, elements).
        dtype: The dtype of the arrays.

    Attributes:
        owners: The owner of each slot, int64 (capacity,), NOBODY if it is free.
        use: The function ``use(address, actions, claim, owners, count, rows, arrays)`` of machine code.
        address: The first argument of ``use``.
        claims: Numbers for claims, all of them different.
        claimed: The claim on each slot, int64 (capacity,); not above 0 if there is none.
    """

    def __init__(self, capacity: int, shapes: Sequence[tuple[int, int, int]], dtype: DTypeLike) -> None:
        item, offset, parts = np.dtype(dtype).itemsize, 0, []
        for layers, _, elements in shapes:
            parts.append((offset, layers, elements * item))
            offset += layers * elements * item
        stride = round_up_to_cache_line(offset)
        self._rows = aligned_empty((capacity, stride), np.uint8)
        self._parts = np.array(parts, np.int64)
        assert self._parts.shape[1] == len(PART)
        self.owners, self.claimed = np.full(capacity, NOBODY, np.int64), np.zeros(capacity, np.int64)
        layout = object_layout()
        fields = {
            "owners": self.owners.ctypes.data, "claims": self.claimed.ctypes.data, "first_free": 0,
            "capacity": capacity, "rows": self._rows.ctypes.data, "row_bytes": stride, "parts": self._parts.ctypes.data,
            "num_parts": len(parts), "num_owners": 0, "items_offset": layout.items_offset if layout else 0,
            "data_offset": layout.data_offset if layout else 0,
        }  # fmt: skip
        self._struct = np.array(SLOTS.values(fields), np.int64)
        self.address = self._struct.ctypes.data
        self._use = load_use_slots(layout is not None)
        self.use = self._use if layout is not None else self._use_by_address
        self.claims = itertools.count(1)
        _all.add(self)

    def _use_by_address(
        self, address: int, actions: int, claim: int, owners: Array, count: int, rows: int, arrays: Sequence[Array]
    ) -> int:
        """:attr:`use` where machine code does not know how the interpreter lays out objects."""
        addresses = np.array([array.ctypes.data for array in arrays], np.int64)
        return self._use(address, actions, claim, owners.ctypes.data, count, rows, addresses.ctypes.data)

    def free_claimed(self, claim: int) -> None:
        """Make the slots free that have this claim, whatever their owners."""
        slots = self.claimed == claim
        self.owners[slots] = NOBODY
        self.claimed[slots] = 0
        self._struct[SLOTS.index["first_free"]] = 0

    def forget_claims(self) -> None:
        """End all claims. For a forked child: the calls that have the claims do not run there."""
        self.claimed[:] = 0


def _after_fork_in_child() -> None:
    for slots in _all:
        slots.forget_claims()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
