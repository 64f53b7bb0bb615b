"""Which rows live when, for sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def places(steps: int, batch: int) -> dict[str, int]:
    """Where each table begins, in bytes behind the first; the last one is as long as there are row groups."""
    sizes = {
        "row_to_sequence": batch, "unsorted_indices": batch, "sorted_indices": batch, "lengths": batch,
        "batch_sizes": steps, "active_rows": 0,
    }  # fmt: skip
    found, at = {}, 0
    for name, size in sizes.items():
        found[name] = at
        at += 8 * size
    return found


class Ragged:
    """Sequences of different lengths.

    Args:
        lengths: The valid steps of each, int64 (N,).
        steps: T.
    """

    firsts: Array | None = None
    """The first row of each time where rows lie packed, int64 (T,); None if they lie (T, N)."""

    def __init__(self, lengths: Array, steps: int) -> None:
        self.lengths = lengths
        self._falling = np.argsort(-lengths, kind="stable")
        self._totals = len(lengths) - np.cumsum(np.bincount(lengths, minlength=steps + 1))[:steps]
        self._made: dict[Sequence[int], Array] = {}

    @classmethod
    def packed(cls, totals: Array) -> Ragged:
        """Sequences by falling length, as a packed sequence has them; ``totals`` (T,) says how many have each step."""
        made, totals = cls.__new__(cls), totals.copy()  # the caller's may change before backward
        made._falling = np.arange(totals[0])
        made.lengths = len(totals) - np.searchsorted(totals[::-1], made._falling, side="right")
        made.firsts = np.cumsum(totals) - totals
        made._totals, made._made = totals, {}
        return made

    def tables(self, row_starts: tuple[int, ...]) -> Array:
        """The tables for row groups that begin at these rows, one behind the other in one array.

        Rows are in the order of falling lengths, and dealt to the groups in turn. ``order`` is the place in the batch
        of each row, group by group; ``ranks`` the place of each row among all by falling length; ``falling`` the place
        in the batch of each rank; ``lengths`` the length of each row; ``totals`` how many rows live at each time in
        the whole batch; ``alive`` how many of each group's.
        """
        made = self._made.get(row_starts)
        if made is None:
            ranks, totals = _dealt(row_starts), self._totals
            order = self._falling[ranks]
            # A group's ranks rise: those that live are the ones below the number of all that live.
            alive = [np.searchsorted(ranks[first:end], totals) for first, end in pairwise(row_starts)]
            tables = (order, ranks, self._falling, self.lengths[order], totals, *alive)
            made = self._made[row_starts] = np.concatenate(tables, dtype=np.int64)
        return made


@lru_cache(maxsize=16)
def _dealt(row_starts: tuple[int, ...]) -> Array:
    """Ranks dealt to the groups like cards, so that each has as much to do; group by group."""
    sizes = np.diff(row_starts)
    turns = np.concatenate([np.arange(size) for size in sizes])
    groups = np.repeat(np.arange(len(sizes)), sizes)
    ranks: Array = np.empty(len(turns), np.int64)
    ranks[np.lexsort((groups, turns))] = np.arange(len(turns))
    return ranks
