"""Rollouts as whole sequences. In a row, episodes follow one another, and marks tell where they begin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

States = tuple[Tensor, Tensor]


def process_sequence(
    features: Tensor, states: States, episode_starts: Tensor, lstm: Any
) -> tuple[Tensor, States]:
    """Compute in one call what sb3-contrib's policies compute in a loop over steps.

    Args:
        features: (N·T, features), one sequence after another.
        states: h and c, each (layers, N, H).
        episode_starts: (N·T,), nonzero where an episode begins.
        lstm: A :class:`fusedrnn.torch.LSTM`.

    Returns:
        The output (N·T, H) and the final states.
    """
    batch = states[0].shape[1]
    x = features.reshape(batch, -1, lstm.input_size).swapaxes(0, 1)
    starts = episode_starts.reshape(batch, -1).swapaxes(0, 1)
    y, states = lstm(x, states, resets=starts != 0)
    return y.transpose(0, 1).flatten(0, 1), states


def whole_rows(steps: int, num_envs: int, batch_size: int, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    """Batches of whole rows, in random order, of a rollout that stores one environment after another.

    Args:
        steps: T, the steps of the rollout.
        num_envs: The number of its environments.
        batch_size: The steps of a batch in all its environments together, a multiple of T.
        rng: The generator that shuffles the environments.

    Yields:
        The indices of the steps of a batch, and the indices of the first step of each row.
    """
    order, rows = rng.permutation(num_envs), max(1, batch_size // steps)
    for begin in range(0, num_envs, rows):
        firsts = order[begin : begin + rows] * steps
        yield (firsts[:, None] + np.arange(steps)).ravel(), firsts
