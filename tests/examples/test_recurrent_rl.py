"""Rollouts as whole sequences: a policy's loop over steps as one call, batches of whole rows, and both libraries."""

from __future__ import annotations

import numpy as np
import pytest
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


def agents():
    """sb3-contrib's agent and ours, with the same parameters."""
    contrib = pytest.importorskip("sb3_contrib", reason="needs sb3-contrib")
    from stable_baselines3.common.env_util import make_vec_env

    from examples.recurrent_rl.sb3 import FusedRecurrentPPO, ResetPolicy

    def make(algorithm, policy):
        return algorithm(policy, make_vec_env("CartPole-v1", 4, seed=0), n_steps=16, batch_size=32, n_epochs=2, seed=0,
                         device="cpu", policy_kwargs={"lstm_hidden_size": 8})  # fmt: skip

    theirs, ours = make(contrib.RecurrentPPO, "MlpLstmPolicy"), make(FusedRecurrentPPO, ResetPolicy)
    ours.policy.load_state_dict(theirs.policy.state_dict())
    return theirs, ours


def test_sb3_policies_agree():
    """Values and log probabilities of rows with beginnings of episodes inside, and their gradients."""
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    theirs, ours = (agent.policy for agent in agents())
    torch.manual_seed(2)
    rows, steps = 4, 6
    states = RNNStates(*((torch.rand(1, rows, 8), torch.rand(1, rows, 8)) for _ in range(2)))
    observations, actions = torch.randn(rows * steps, 4), torch.randint(2, (rows * steps,))
    starts = (torch.rand(rows * steps) < 0.3).float()
    results = [policy.evaluate_actions(observations, actions, states, starts) for policy in (theirs, ours)]
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    for values, log_probs, _ in results:
        (values.sum() + log_probs.sum()).backward()
    for expected, actual in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("option", ["--steps", "--envs"])
def test_sb3_numbers_out_of_range(option, monkeypatch, capsys):
    pytest.importorskip("sb3_contrib", reason="needs sb3-contrib")
    from examples.recurrent_rl.sb3 import main

    monkeypatch.setattr("sys.argv", ["sb3", option, "0"])
    with pytest.raises(SystemExit):
        main()
    assert f"{option} must be at least 1; got 0" in capsys.readouterr().err


def test_sb3_learns():
    _, ours = agents()
    before = [parameter.detach().clone() for parameter in ours.policy.parameters()]
    ours.learn(2 * 4 * 16)
    after = [*ours.policy.parameters()]
    assert all(parameter.isfinite().all() for parameter in after)
    assert any((new != old).any() for new, old in zip(after, before, strict=True))


@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_torchrl_modules_agree():
    pytest.importorskip("torchrl", reason="needs torchrl")
    from examples.recurrent_rl.with_torchrl import compare

    torch.manual_seed(0)
    compare(B=3, T=7, I=4, H=8, repetitions=1)
