"""One node in autograd's graph for a whole call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fusedrnn.torch import double_backward as composed
from fusedrnn.torch import tensor_calls as kernels
from fusedrnn.torch.support import plain
from fusedrnn.torch.tensor_calls import Kept, Network, Problem
from torch import Tensor


class Node(torch.autograd.Function):
    """The operator's gradients; those of its gradients come from torch's own operations.

    What backward needs are saved tensors like any others, so that it lives exactly as long as the graph, and hooks on
    saved tensors (checkpointing, offloading) reach it. Operands are saved too, for gradients of gradients; but what
    torch.nn does not save it lets change meanwhile: see :mod:`fusedrnn.torch.saving`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        network: Network,
        problem: Problem,
        made: tuple[Tensor, tuple[Tensor, ...], Kept],
        x: Tensor,
        *operands: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """``made`` is what became of ``x`` and ``operands``, which are initial states, None for zeros, then weights."""
        y, final, kept = made
        saved = network.saved_operands(ctx.needs_input_grad[3:], problem.steps > 1)
        given = x, *operands
        weights, ctx.unsaved = kept.weights, None
        if not kept.packed:
            # Backward may read matrices that are not saved, but only for results that nobody needs.
            flags = saved[1 + network.states :]
            ctx.unsaved = [None if save else weight for save, weight in zip(flags, weights, strict=True)]
            weights = [weight if save else None for save, weight in zip(flags, weights, strict=True)]
        ctx.save_for_backward(
            kept.reserve, *weights, *(one if save else None for save, one in zip(saved, given, strict=True))
        )
        ctx.aside = [None if save else (one, _version(one)) for save, one in zip(saved, given, strict=True)]
        ctx.network, ctx.problem, ctx.record, ctx.held = network, problem, kept.record, len(kept.weights)
        ctx.set_materialize_grads(False)
        return y, *final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> tuple[Any, ...]:
        """Gradients for what needs them."""
        network, problem, wanted = ctx.network, ctx.problem, ctx.needs_input_grad[3:]
        reserve, *saved = ctx.saved_tensors
        given = [gradient for gradient in (dy, *dfinal) if gradient is not None]
        if not given:
            return (None,) * (3 + len(wanted))
        if torch.is_grad_enabled() or not all(plain(gradient, network.dtype) for gradient in given):
            operands = _operands(saved[ctx.held :], ctx.aside)
            extent, seed = composed.Extent.of(problem), ctx.record.seed
            found = composed.gradients(network.spec, extent, seed, operands, (dy, *dfinal), wanted)
        else:
            weights = saved[: ctx.held]
            if ctx.unsaved is not None:
                pairs = zip(weights, ctx.unsaved, strict=True)
                weights = [other if weight is None else weight for weight, other in pairs]
            kept = Kept(reserve, weights, ctx.record)
            found = kernels.gradients(network, problem, kept, dy, dfinal, wanted)
        return None, None, None, *found


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _operands(
    saved: Sequence[Tensor | None], aside: Sequence[tuple[Tensor | None, int] | None]
) -> list[Tensor | None]:
    """All operands as they were, for gradients of gradients.

    Raises:
        RuntimeError: If one that was not saved has changed.
    """
    operands = []
    for one, other in zip(saved, aside, strict=True):
        tensor, version = (one, None) if other is None else other
        if version is not None and version != _version(tensor):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tuple(tensor.shape) if tensor is not None else ()} is at version {_version(tensor)}; "
                f"expected version {version} instead"
            )
        operands.append(tensor)
    return operands
