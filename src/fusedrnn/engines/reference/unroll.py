"""The loop over the steps of one direction of one layer, and which states it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.reference.resets import Resets

Step = Callable[[Array, tuple[Array, ...]], tuple[Array, tuple[Array, ...]]]
"""From the input of a step (N, in) and the states before it to the output and the states after it."""


def unroll(
    x: Array,
    states: Sequence[Array],
    lengths: Array | None,
    reverse: bool,
    step: Step,
    resets: Resets | None = None,
    history: list[tuple[Array, ...]] | None = None,
) -> tuple[Array, tuple[Array, ...]]:
    """One direction of one layer: from ``x`` (T, N, in) to the output (T, N, S) and the final states (N, size).

    Appends the states after each step to ``history``.
    """
    steps, batch = x.shape[:2]
    states = tuple(states)
    y = np.zeros((steps, batch, states[0].shape[1]), x.dtype)
    for t in reversed(range(steps)) if reverse else range(steps):
        if resets is not None:
            states = resets.apply(t, reverse, states)
        output, new = step(x[t], states)
        if lengths is None:
            states, y[t] = new, output
        else:
            active = (t < lengths)[:, None]
            states = tuple(np.where(active, after, before) for after, before in zip(new, states, strict=True))
            y[t] = np.where(active, output, 0)
        if history is not None:
            history.append(states)
    return y, states


def store_states(
    all_states: Sequence[Array],
    history: Sequence[tuple[Array, ...]],
    lengths: Array | None,
    direction: int,
    reverse: bool,
) -> None:
    """Store states of every step of a direction, but not after the end of a sequence."""
    for index, states in enumerate(history[1:]):
        t = len(history) - 2 - index if reverse else index
        active = slice(None) if lengths is None else t < lengths
        for array, state in zip(all_states, states, strict=False):
            size = state.shape[1]
            array[t, active, direction * size : (direction + 1) * size] = state[active]
