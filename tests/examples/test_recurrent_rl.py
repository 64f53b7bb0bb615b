"""Rollouts as whole sequences: a policy's loop over steps as one call, and batches of whole rows."""

from __future__ import annotations

import numpy as np
import torch

from examples.recurrent_rl.sequences import process_sequence, whole_rows
from fusedrnn.torch import LSTM

N, I, H = 3, 4, 8


def step_by_step(features, states, episode_starts, lstm):
    """As sb3-contrib's policies compute it."""
    x = features.reshape(N, -1, I).swapaxes(0, 1)
    outputs = []
    for row, starts in zip(x, episode_starts.reshape(N, -1).T, strict=True):
        y, states = lstm(row.unsqueeze(0), tuple((1 - starts).view(1, N, 1) * state for state in states))
        outputs.append(y)
    return torch.cat(outputs).transpose(0, 1).flatten(0, 1), states


def test_a_policy_in_one_call():
    torch.manual_seed(1)
    theirs, ours = torch.nn.LSTM(I, H), LSTM(I, H)
    ours.load_state_dict(theirs.state_dict())
    states = torch.rand(1, N, H), torch.rand(1, N, H)
    for steps in (1, 10):
        features = torch.randn(N * steps, I)
        episode_starts = (torch.rand(N * steps) < 0.3).float()
        latent, after = process_sequence(features, states, episode_starts, ours)
        expected, expected_after = step_by_step(features, states, episode_starts, theirs)
        torch.testing.assert_close((latent, *after), (expected, *expected_after))


def test_batches_have_every_row_once():
    batches = list(whole_rows(5, 6, 12, np.random.default_rng(0)))
    assert [len(firsts) for _, firsts in batches] == [2, 2, 2]
    assert sorted(np.concatenate([firsts for _, firsts in batches])) == list(range(0, 30, 5))
    for steps, firsts in batches:
        assert (steps.reshape(-1, 5) == firsts[:, None] + np.arange(5)).all()
