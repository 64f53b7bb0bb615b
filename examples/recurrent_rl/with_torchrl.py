"""TorchRL's GRUModule and LSTMModule on layers with resets.

    pip install torchrl '.[torch]'
    python -m examples.recurrent_rl.with_torchrl    # compares with TorchRL's own module, and times both

TorchRL's modules cut a batch of trajectories at ``is_init`` and pad the pieces, or scan over the steps. In this
example, a batch is one call of the layer. After a reset the states are zero, as TorchRL's primers set them. The module
writes the hidden states of the last step, and zeros for the steps before.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.modules import GRUModule, LSTMModule

from fusedrnn.torch import GRU, LSTM


class _WithResets:
    """Replaces the recurrent mode of one of TorchRL's modules."""

    in_keys: Any
    out_keys: Any
    recurrent_mode: bool

    def forward(self, tensordict: Any) -> Any:
        """Run as TorchRL's module does. In recurrent mode, the last axis of the batch is time."""
        if not self.recurrent_mode:
            return super().forward(tensordict)  # type: ignore[misc]
        rows = tensordict.reshape(-1, tensordict.shape[-1])
        x, *hidden = (rows.get(key, None) for key in self.in_keys[: len(self.out_keys)])
        resets = rows["is_init"].squeeze(-1).clone()
        resets[:, 0] = False  # the tensordict has the states from which the first step starts
        states = None
        if hidden[0] is not None:
            states = tuple(state[:, 0].transpose(0, 1).contiguous() for state in hidden)
        y, final = self.layer(x, states, resets)
        rows.set(self.out_keys[0], y)
        for key, state in zip(self.out_keys[1:], final, strict=True):
            every = state.new_zeros(state.shape[1], x.shape[1], state.shape[0], state.shape[2])
            every[:, -1] = state.transpose(0, 1)
            rows.set(key, every)
        return tensordict.update(rows.reshape(tensordict.shape))

    def layer(
        self, x: Tensor, states: tuple[Tensor, ...] | None, resets: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer's output and final states."""
        raise NotImplementedError


class ResetGRUModule(_WithResets, GRUModule):  # type: ignore[misc]
    """``GRUModule`` for ``gru=fusedrnn.torch.GRU(..., batch_first=True)``."""

    def layer(
        self, x: Tensor, states: tuple[Tensor, ...] | None, resets: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the base."""
        y, h_n = self.gru(x, states and states[0], resets=resets)
        return y, (h_n,)


class ResetLSTMModule(_WithResets, LSTMModule):  # type: ignore[misc]
    """``LSTMModule`` for ``lstm=fusedrnn.torch.LSTM(..., batch_first=True)``."""

    def layer(
        self, x: Tensor, states: tuple[Tensor, ...] | None, resets: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the base."""
        y, final = self.lstm(x, states, resets=resets)
        return y, final


def _batch(B: int, T: int, I: int, H: int, names: tuple[str, ...]) -> Any:
    is_init = torch.rand(B, T, 1) < 0.03
    hidden = {name: torch.zeros(B, T, 1, H) for name in names}
    return TensorDict({"x": torch.randn(B, T, I), "is_init": is_init, **hidden}, [B, T])


def _run(module: Any, batch: Any) -> Tensor:
    module.zero_grad()
    y: Tensor = module(batch.clone())["y"]
    loss: Any = y.square().mean()
    loss.backward()
    return y


def compare(B: int = 64, T: int = 32, I: int = 32, H: int = 128, repetitions: int = 20) -> None:
    """Compare the modules with TorchRL's, and print the shortest times of forward and backward."""
    kinds = (("gru", GRUModule, ResetGRUModule, GRU, ("h",)), ("lstm", LSTMModule, ResetLSTMModule, LSTM, ("h", "c")))
    for name, theirs_class, ours_class, layer, states in kinds:
        keys: dict[str, Any] = {"in_keys": ["x", *states], "out_keys": ["y", *(("next", state) for state in states)]}
        keys["default_recurrent_mode"] = True
        backends = {backend: theirs_class(I, H, recurrent_backend=backend, **keys) for backend in ("pad", "scan")}
        ours = ours_class(**{name: layer(I, H, batch_first=True)}, **keys)
        ours.load_state_dict(backends["pad"].state_dict())
        backends["scan"].load_state_dict(backends["pad"].state_dict())
        modules = {"ours": ours, **backends}
        batch, least = _batch(B, T, I, H, states), dict.fromkeys(modules, float("inf"))
        expected = _run(modules["pad"], batch).detach()
        gradients = [parameter.grad.clone() for parameter in modules["pad"].parameters()]
        torch.testing.assert_close(_run(ours, batch).detach(), expected, rtol=1e-4, atol=1e-5)
        for parameter, gradient in zip(ours.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
        for _ in range(repetitions):
            for which, module in modules.items():
                began = perf_counter()
                _run(module, batch)
                least[which] = min(least[which], perf_counter() - began)
        print(name, ", ".join(f"{which} {seconds * 1e3:.2f} ms" for which, seconds in least.items()))


if __name__ == "__main__":
    torch.manual_seed(0)
    compare()
