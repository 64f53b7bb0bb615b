"""Sequences of different lengths: which rows are active at each step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from fusedrnn.arrays import Array


def table_offsets(steps: int, batch: int) -> dict[str, int]:
    """Byte offset of each table of :meth:`VarLen.tables`."""
    sizes = {
        "row_to_sequence": batch, "unsorted_indices": batch, "sorted_indices": batch, "lengths": batch,
        "batch_sizes": steps, "active_rows": 0,
    }  # fmt: skip
    offsets, offset = {}, 0
    for name, size in sizes.items():
        offsets[name] = offset
        offset += 8 * size
    return offsets


class VarLen:
    """Sequences of different lengths, and the tables in which kernels look up rows.

    Attributes:
        lengths: The valid steps of each sequence, int64 (N,).
        row_offsets: The first row of each step of a packed sequence, int64 (T,); None if arrays are (T, N, features).
        row_offsets_address: The address of ``row_offsets``; 0 for None.
    """

    def __init__(self, lengths: Array, sorted_indices: Array, batch_sizes: Array, row_offsets: Array | None) -> None:
        self.lengths, self.row_offsets = lengths, row_offsets
        self.row_offsets_address = 0 if row_offsets is None else row_offsets.ctypes.data
        self._sorted_indices, self._batch_sizes = sorted_indices, batch_sizes
        self._tables: dict[Sequence[int], Array] = {}

    @classmethod
    def padded(cls, lengths: Array, steps: int) -> VarLen:
        """Sequences of these lengths, int64 (N,), in arrays (T, N, features)."""
        batch_sizes = len(lengths) - np.cumsum(np.bincount(lengths, minlength=steps + 1))[:steps]
        return cls(lengths, np.argsort(-lengths, kind="stable"), batch_sizes, None)

    @classmethod
    def packed(cls, batch_sizes: Array) -> VarLen:
        """A packed sequence, sorted by falling length; ``batch_sizes`` (T,) is how many sequences have each step."""
        batch_sizes = batch_sizes.copy()  # the caller may change it before backward
        indices = np.arange(batch_sizes[0])
        lengths = len(batch_sizes) - np.searchsorted(batch_sizes[::-1], indices, side="right")
        return cls(lengths, indices, batch_sizes, np.cumsum(batch_sizes) - batch_sizes)

    def tables(self, row_starts: tuple[int, ...]) -> Array:
        """The tables, one after another in one array, for row groups that begin at these rows.

        Sequences are sorted by falling length and distributed to the row groups round-robin. The tables are:

        - ``row_to_sequence``: the index in the batch of each row, group by group;
        - ``unsorted_indices``: the index of each row in the sorted batch;
        - ``sorted_indices``: the index in the batch of each index in the sorted batch;
        - ``lengths``: the length of each row;
        - ``batch_sizes``: how many sequences of the whole batch are active at each step;
        - ``active_rows``: how many rows of each group are active at each step.
        """
        tables = self._tables.get(row_starts)
        if tables is None:
            unsorted_indices, batch_sizes = round_robin(row_starts), self._batch_sizes
            row_to_sequence = self._sorted_indices[unsorted_indices]
            # The sorted indices of a group rise, and the active ones are below the batch size.
            active_rows = [
                np.searchsorted(unsorted_indices[first:end], batch_sizes) for first, end in pairwise(row_starts)
            ]
            parts = (
                row_to_sequence, unsorted_indices, self._sorted_indices, self.lengths[row_to_sequence], batch_sizes,
                *active_rows,
            )  # fmt: skip
            tables = self._tables[row_starts] = np.concatenate(parts, dtype=np.int64)
        return tables


@lru_cache(maxsize=16)
def round_robin(row_starts: tuple[int, ...]) -> Array:
    """The sorted indices of each group, distributed round-robin, so that all groups have about the same work."""
    sizes = np.diff(row_starts)
    rounds = np.concatenate([np.arange(size) for size in sizes])
    groups = np.repeat(np.arange(len(sizes)), sizes)
    indices: Array = np.empty(len(rounds), np.int64)
    indices[np.lexsort((groups, rounds))] = np.arange(len(rounds))
    return indices
