"""Resets inside sequences, in NumPy: states replaced before a step, gradients cut there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fusedrnn.arrays import Array

States = tuple[Array, ...]


class Resets(NamedTuple):
    """Where the states of sequences are replaced, and by what.

    Attributes:
        marks: Bools (T, N): a sequence begins anew at that step. False in the padding.
        states: What replaces the states: (L·D, N, size) each, or (N, size) for one direction of one layer; None for
            zeros.
    """

    marks: Array
    states: Sequence[Array] | None

    def of(self, layer_dir: int) -> Resets:
        """The resets of the layer-direction with that index."""
        return Resets(self.marks, self.states and tuple(state[layer_dir] for state in self.states))

    def rows(self, t: int, reverse: bool) -> Array:
        """Which sequences are reset before the step at time t: a piece of them begins (in reverse: ends) there."""
        boundary = t + 1 if reverse else t
        if boundary == len(self.marks):
            return np.zeros(self.marks.shape[1], bool)
        marked: Array = self.marks[boundary]
        return marked

    def apply(self, t: int, reverse: bool, states: States) -> States:
        """The states (N, size) that the step at time t starts from."""
        rows = self.rows(t, reverse)
        if not rows.any():
            return states
        replacements = map(np.zeros_like, states) if self.states is None else self.states
        pairs = zip(states, replacements, strict=True)
        return tuple(np.where(rows[:, None], new, old) for old, new in pairs)

    def cut(self, t: int, reverse: bool, gradients: Sequence[Array]) -> tuple[list[Array], list[Array] | None]:
        """The backward of :meth:`apply`: the gradients of the states before it, and of the replacements, if any."""
        rows = self.rows(t, reverse)
        if not rows.any():
            return list(gradients), None
        mask = rows[:, None]
        return [np.where(mask, 0, grad) for grad in gradients], [np.where(mask, grad, 0) for grad in gradients]
