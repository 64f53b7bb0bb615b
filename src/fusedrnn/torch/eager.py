"""One call of the operator on tensors: inference, or a node in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fusedrnn.spec import RNNSpec
from fusedrnn.torch import tensor_calls as kernels
from fusedrnn.torch.autograd import Node
from fusedrnn.torch.tensor_calls import Network, Problem
from torch import Tensor

# Function.apply without its detour through functorch: calls under its transforms do not come here.
_recorded: Any = super(torch.autograd.Function, Node).apply


def run(
    spec: RNNSpec,
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor | None],
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a network over sequences; recorded in the graph if gradients are enabled and any operand requires them.

    Args:
        spec: What to run; its dropout counts, in inference too.
        x: Input (T, N, I), any strides; with ``batch_sizes`` the data of a packed sequence (rows, I).
        states: Initial states ``(h0,)`` or ``(h0, c0)``, each (L·D, N, size); None for zeros.
        weights: For each layer, for each direction: i2h weight, h2h weight, h2r weight if projected, i2h bias, h2h
            bias; None for no bias.
        lengths: Valid steps of each sequence, integers (N,), on the CPU; None for T everywhere.
        batch_sizes: Of a packed sequence: how many sequences have each step, int64 (T,).
        seed: What dropout depends on, from 0 to 2**63 - 1.

    Returns:
        The output (T, N, D·S), or packed (rows, D·S); and the final states, a tuple like ``states``.
    """
    network = Network.of(spec)
    weights = [weight if weight is None or weight.is_contiguous() else weight.contiguous() for weight in weights]
    problem = Problem(network, x, lengths, batch_sizes)
    if torch.is_grad_enabled() and _required(x, states, weights):
        # Not in the node's forward, where signal handlers would find that gradients are off.
        made = kernels.train(network, problem, x, states, weights, seed)
        given = states if states is not None else (None,) * network.states
        y, *final = _recorded(network, problem, made, x, *given, *weights)
        return y, tuple(final)
    if spec.drops:
        y, final, _ = kernels.train(network, problem, x, states, weights, seed)
        return y, final
    return kernels.infer(network, problem, x, states, weights)


def _required(x: Tensor, states: Sequence[Tensor] | None, weights: Sequence[Tensor | None]) -> bool:
    if x.requires_grad:
        return True
    for tensor in weights:
        if tensor is not None and tensor.requires_grad:
            return True
    return states is not None and any(state.requires_grad for state in states)
