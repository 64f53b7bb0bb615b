"""One node in autograd's graph for a whole call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn.torch import composed, kernels
from fusedrnn.torch.kernels import Network, Problem


class Node(torch.autograd.Function):
    """The operator with its gradients; those of its gradients come from torch's own operations.

    What backward needs is a saved tensor like any other, so that it lives exactly as long as the graph, and hooks on
    saved tensors (checkpointing, offloading) reach it.
    """

    @staticmethod
    def forward(
        ctx: Any, network: Network, problem: Problem, seed: int, x: Tensor, *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        """``operands`` are the initial states, None for zeros, then the weights."""
        states, weights = operands[: network.states], operands[network.states :]
        initial = None if states[0] is None else states
        y, final, reserve, kept = kernels.train(network, problem, x, initial, weights, seed)
        ctx.save_for_backward(reserve, x, *operands)
        ctx.network, ctx.problem, ctx.kept = network, problem, kept
        ctx.set_materialize_grads(False)
        return y, *final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> tuple[Any, ...]:
        """Gradients for what needs them."""
        network, problem, wanted = ctx.network, ctx.problem, ctx.needs_input_grad[3:]
        reserve, x, *operands = ctx.saved_tensors
        if torch.is_grad_enabled():
            given = composed.gradients(network, problem, ctx.kept.seed, x, operands, dy, dfinal, wanted)
            return None, None, None, *given
        if dy is None and all(gradient is None for gradient in dfinal):
            return (None,) * (4 + len(operands))
        weights = operands[network.states :]
        found = kernels.gradients(network, problem, ctx.kept, reserve, dy, dfinal, weights, wanted)
        return None, None, None, *found
