"""Which rows live when, for sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Tables:
    """Rows are in the order of falling lengths, and dealt to the row groups in turn.

    Attributes:
        order: The place in the batch of each row, group by group.
        ranks: The place of each row among all by falling length.
        falling: The place in the batch of each rank.
        alive: For each group and time, how many of its rows live.
        totals: For each time, how many rows live in the whole batch.
        lengths: The length of each row.
    """

    order: Array
    ranks: Array
    falling: Array
    alive: Array
    totals: Array
    lengths: Array

    @classmethod
    def of(cls, lengths: Array, row_starts: Sequence[int], steps: int) -> Tables:
        """The tables for those lengths and groups."""
        falling = np.argsort(-lengths, kind="stable")
        sizes = np.diff(row_starts)
        # The longest sequences are dealt like cards, so that every group has as much to do.
        dealt: list[list[int]] = [[] for _ in sizes]
        turn = 0
        for rank in range(len(falling)):
            while len(dealt[turn % len(sizes)]) >= sizes[turn % len(sizes)]:
                turn += 1
            dealt[turn % len(sizes)].append(rank)
            turn += 1
        ranks = np.array([rank for hand in dealt for rank in hand], np.int64)
        order = falling[ranks]
        times = np.arange(steps)[:, None]
        alive = [np.count_nonzero(lengths[falling[hand]][None, :] > times, axis=1) for hand in dealt]
        totals = np.sum(alive, axis=0)
        return cls(*(np.ascontiguousarray(t, np.int64) for t in (order, ranks, falling, alive, totals, lengths[order])))
