"""One node in autograd's graph for a whole call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.torch import composed, kernels
from fusedrnn.torch.kernels import Kept, Network, Problem
from fusedrnn.torch.support import plain


class Node(torch.autograd.Function):
    """The operator's gradients; those of its gradients come from torch's own operations.

    What backward needs are saved tensors like any others, so that it lives exactly as long as the graph, and hooks on
    saved tensors (checkpointing, offloading) reach it. Operands are saved too, for gradients of gradients; but what
    torch.nn does not save it lets change meanwhile: the biases, and the input if no weight has a gradient.
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
        count = 1 + network.states
        aside = [False] * count + [len(shape) == 1 for shape in network.shapes]
        aside[0] = True not in ctx.needs_input_grad[3 + count :]
        given = x, *operands
        ctx.save_for_backward(
            kept.reserve, *kept.weights, *(None if out else one for out, one in zip(aside, given, strict=True))
        )
        ctx.aside = [(one, _version(one)) if out else None for out, one in zip(aside, given, strict=True)]
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
            kept = Kept(reserve, saved[: ctx.held], ctx.record)
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
