"""Which rows live when, for sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def places(steps: int, batch: int) -> dict[str, int]:
    """Where each table begins, in bytes behind the first; the last one is as long as there are row groups."""
    sizes = {"order": batch, "ranks": batch, "falling": batch, "lengths": batch, "totals": steps, "alive": 0}
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
        firsts: The first row of each time where rows lie packed, int64 (T,); None if they lie (T, N).
    """

    def __init__(self, lengths: Array, steps: int, firsts: Array | None = None) -> None:
        self.lengths, self.steps, self.firsts = lengths, steps, firsts
        self._made: dict[Sequence[int], Array] = {}

    def tables(self, row_starts: Sequence[int]) -> Array:
        """The tables for row groups that begin at these rows, one behind the other in one array.

        Rows are in the order of falling lengths, and dealt to the groups in turn. ``order`` is the place in the batch
        of each row, group by group; ``ranks`` the place of each row among all by falling length; ``falling`` the place
        in the batch of each rank; ``lengths`` the length of each row; ``totals`` how many rows live at each time in
        the whole batch; ``alive`` how many of each group's.
        """
        made = self._made.get(row_starts)
        if made is None:
            made = self._made[row_starts] = self._make(np.diff(row_starts))
        return made

    def _make(self, sizes: Array) -> Array:
        lengths = self.lengths
        falling = np.argsort(-lengths, kind="stable")
        ranks = _dealt(sizes)
        order = falling[ranks]
        alive = [_alive(hand, self.steps) for hand in np.split(lengths[order], np.cumsum(sizes)[:-1])]
        tables = (order, ranks, falling, lengths[order], np.sum(alive, axis=0), *alive)
        return np.concatenate(tables, dtype=np.int64)


def _dealt(sizes: Array) -> Array:
    """Ranks dealt to groups of these sizes like cards, so that every group has as much to do; group by group."""
    turns = np.concatenate([np.arange(size) for size in sizes])
    groups = np.repeat(np.arange(len(sizes)), sizes)
    ranks: Array = np.empty(len(turns), np.int64)
    ranks[np.lexsort((groups, turns))] = np.arange(len(turns))
    return ranks


def _alive(lengths: Array, steps: int) -> Array:
    """How many sequences of these lengths live at each time."""
    ends = np.bincount(lengths, minlength=steps + 1)
    return len(lengths) - np.cumsum(ends)[:steps]
