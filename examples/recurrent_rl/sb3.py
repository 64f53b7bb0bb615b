"""sb3-contrib's RecurrentPPO on whole sequences.

    pip install sb3-contrib '.[torch]'
    python -m examples.recurrent_rl.sb3 --steps 20000            # with this project's layers
    python -m examples.recurrent_rl.sb3 --steps 20000 --plain    # sb3-contrib as it is

sb3-contrib cuts a rollout at every beginning of an episode and pads the pieces; if a piece is cut at other places, it
runs its LSTM step by step. In this example, a batch has whole rows of the rollout, one for each environment, and the
LSTM gets the beginnings of episodes as resets.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator
from time import perf_counter
from typing import Any

import numpy as np
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RecurrentRolloutBufferSamples, RNNStates

from examples.recurrent_rl.sequences import process_sequence, whole_rows
from fusedrnn.torch import accelerate


class ResetPolicy(RecurrentActorCriticPolicy):
    """``MlpLstmPolicy``, but its LSTMs run over whole sequences."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        accelerate(self)

    _process_sequence: Any = staticmethod(process_sequence)


class WholeRows(RecurrentRolloutBuffer):
    """A rollout buffer whose batches have whole rows, one for each environment."""

    generator_ready: bool

    def get(self, batch_size: int | None = None) -> Generator[RecurrentRolloutBufferSamples, None, None]:  # type: ignore[override]
        """Batches of ``batch_size`` steps, in whole rows."""
        states = "hidden_states_pi", "cell_states_pi", "hidden_states_vf", "cell_states_vf"
        names = "observations", "actions", "values", "log_probs", "advantages", "returns", "episode_starts"
        if not self.generator_ready:
            for name in states:
                setattr(self, name, getattr(self, name).swapaxes(1, 2))
            for name in (*names, *states):
                setattr(self, name, self.swap_and_flatten(getattr(self, name)))
            self.generator_ready = True
        size = self.buffer_size * self.n_envs if batch_size is None else batch_size
        rng = np.random.default_rng(np.random.randint(2**31))
        for steps, firsts in whole_rows(self.buffer_size, self.n_envs, size, rng):
            arrays = {name: self.to_torch(getattr(self, name)[steps]) for name in names}
            h_pi, c_pi, h_vf, c_vf = (
                self.to_torch(getattr(self, name)[firsts].swapaxes(0, 1)).contiguous() for name in states
            )
            starts = arrays["episode_starts"].flatten()
            yield RecurrentRolloutBufferSamples(
                observations=arrays["observations"], actions=arrays["actions"], old_values=arrays["values"].flatten(),
                old_log_prob=arrays["log_probs"].flatten(), advantages=arrays["advantages"].flatten(),
                returns=arrays["returns"].flatten(), lstm_states=RNNStates((h_pi, c_pi), (h_vf, c_vf)),
                episode_starts=starts, mask=starts.new_ones(len(starts)),
            )  # fmt: skip


class FusedRecurrentPPO(RecurrentPPO):
    """RecurrentPPO with :class:`WholeRows`."""

    rollout_buffer: Any

    def _setup_model(self) -> None:
        super()._setup_model()
        buffer = self.rollout_buffer
        self.rollout_buffer = WholeRows(
            self.n_steps, self.observation_space, self.action_space, buffer.hidden_state_shape, self.device,
            gamma=self.gamma, gae_lambda=self.gae_lambda, n_envs=self.n_envs,
        )  # fmt: skip


def main() -> None:
    """Train on an environment, and print the time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--plain", action="store_true", help="sb3-contrib as it is")
    arguments = parser.parse_args()
    for name in ("steps", "envs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(arguments, name)}")
    from stable_baselines3.common.env_util import make_vec_env

    algorithm: Any = RecurrentPPO if arguments.plain else FusedRecurrentPPO
    policy: Any = "MlpLstmPolicy" if arguments.plain else ResetPolicy
    env = make_vec_env(arguments.env, arguments.envs, seed=0)
    model = algorithm(policy, env, n_steps=128, batch_size=128 * arguments.envs // 2, seed=0, device="cpu")
    began = perf_counter()
    model.learn(arguments.steps)
    seconds = perf_counter() - began
    rewards = [episode["r"] for episode in model.ep_info_buffer]
    print(f"{arguments.steps / seconds:.0f} steps a second; mean reward {np.mean(rewards):.1f}")


if __name__ == "__main__":
    main()
