"""One eager call of the operator on tensors, recorded by autograd if anything requires gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.spec import RNNSpec
from fusedrnn.torch import tensor_calls
from fusedrnn.torch.autograd import FusedRNN
from fusedrnn.torch.network import CallShape, Network

# Function.apply without its detour through functorch, under whose transforms no call gets here.
_apply: Any = super(torch.autograd.Function, FusedRNN).apply


def run(
    spec: RNNSpec,
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor | None],
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a network over sequences.

    Args:
        spec: What to run; its dropout applies in inference too.
        x: Input (T, N, I), any strides; with ``batch_sizes`` the data of a packed sequence (rows, I).
        states: Initial states ``(h0,)`` or ``(h0, c0)``, each (L·D, N, size); None for zeros.
        weights: For each layer, for each direction: i2h weight, h2h weight, h2r weight if projected, i2h bias, h2h
            bias; None for no bias.
        lengths: Valid steps of each sequence, integers (N,), on the CPU; None for T everywhere.
        batch_sizes: Of a packed sequence: the number of sequences at each step, int64 (T,).
        seed: Seed of dropout, from 0 to 2**63 - 1; None to draw one from torch's generator if anything is dropped.

    Returns:
        The output (T, N, D·S), or packed (rows, D·S); and the final states, a tuple like ``states``.
    """
    network = Network.of(spec)
    if seed is None:
        seed = draw_seed() if network.drops else 0
    weights = [weight if weight is None or weight.is_contiguous() else weight.contiguous() for weight in weights]
    shape = CallShape(network, x, lengths, batch_sizes)
    if torch.is_grad_enabled() and _require_grad(x, states, weights):
        # Runs outside FusedRNN.forward, where a signal handler would see gradients disabled.
        results = tensor_calls.train(network, shape, x, states, weights, seed)
        initial = states if states is not None else (None,) * network.num_states
        y, *final = _apply(network, shape, results, x, *initial, *weights)
        return y, tuple(final)
    if network.drops:
        return tensor_calls.train(network, shape, x, states, weights, seed)[:2]
    return tensor_calls.infer(network, shape, x, states, weights)


def draw_seed() -> int:
    """A seed of dropout from PyTorch's default generator, which torch.manual_seed makes repeatable."""
    return int(torch.randint(2**63 - 1, (), device="cpu").item())


def _require_grad(x: Tensor, states: Sequence[Tensor] | None, weights: Sequence[Tensor | None]) -> bool:
    if x.requires_grad:
        return True
    for tensor in weights:
        if tensor is not None and tensor.requires_grad:
            return True
    return states is not None and any(state.requires_grad for state in states)
