"""The node of a whole eager call in autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.torch import double_backward, tensor_calls
from fusedrnn.torch.eligibility import is_plain
from fusedrnn.torch.network import CallShape, Network
from fusedrnn.torch.tensor_calls import SavedForBackward


class FusedRNN(torch.autograd.Function):
    """A call of the operator; gradients of its gradients come from the operator's decomposition.

    The reserve and the weights are saved tensors, so that they live as long as the graph, and hooks on saved tensors
    (checkpointing, offloading) see them. Operands are saved too, for gradients of gradients, but only those that
    torch.nn saves: the others may change before backward, see :mod:`fusedrnn.torch.saved_operands`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        network: Network,
        shape: CallShape,
        results: tuple[Tensor, tuple[Tensor, ...], SavedForBackward],
        x: Tensor,
        *operands: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Record ``results`` of ``x`` and ``operands``: the initial states, None for zeros, then the weights."""
        y, final, for_backward = results
        is_saved = network.saved_operands(ctx.needs_input_grad[3:], shape.steps > 1)
        operands = x, *operands
        weights, ctx.unsaved_weights = for_backward.weights, None
        if not for_backward.packed:
            # Backward reads unsaved matrices too, but only for unused results.
            flags = is_saved[1 + network.num_states :]
            ctx.unsaved_weights = [None if save else weight for save, weight in zip(flags, weights, strict=True)]
            weights = [weight if save else None for save, weight in zip(flags, weights, strict=True)]
        ctx.save_for_backward(
            for_backward.reserve,
            *weights,
            *(operand if save else None for save, operand in zip(is_saved, operands, strict=True)),
        )
        ctx.unsaved_operands = [
            None if save else (operand, _version(operand)) for save, operand in zip(is_saved, operands, strict=True)
        ]
        ctx.network, ctx.shape, ctx.info, ctx.num_weights = network, shape, for_backward.info, len(weights)
        ctx.set_materialize_grads(False)
        return y, *final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> tuple[Any, ...]:
        """The gradients of the inputs that need one."""
        network, shape, needs_grad = ctx.network, ctx.shape, ctx.needs_input_grad[3:]
        reserve, *saved = ctx.saved_tensors
        cotangents = [cotangent for cotangent in (dy, *dfinal) if cotangent is not None]
        if not cotangents:
            return (None,) * (3 + len(needs_grad))
        if torch.is_grad_enabled() or not all(is_plain(cotangent, network.dtype) for cotangent in cotangents):
            operands = _original_operands(saved[ctx.num_weights :], ctx.unsaved_operands)
            extent = double_backward.Extent.of(shape)
            grads = double_backward.vjp(network.spec, extent, ctx.info.seed, operands, (dy, *dfinal), needs_grad)
        else:
            weights = saved[: ctx.num_weights]
            if ctx.unsaved_weights is not None:
                pairs = zip(weights, ctx.unsaved_weights, strict=True)
                weights = [unsaved if weight is None else weight for weight, unsaved in pairs]
            for_backward = SavedForBackward(reserve, weights, ctx.info)
            grads = tensor_calls.backward(network, shape, for_backward, dy, dfinal, needs_grad)
        return None, None, None, *grads


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _original_operands(
    saved: Sequence[Tensor | None], unsaved: Sequence[tuple[Tensor | None, int] | None]
) -> list[Tensor | None]:
    """All operands as the call had them, for gradients of gradients.

    Raises:
        RuntimeError: If one that was not saved has changed.
    """
    operands = []
    for saved_operand, unsaved_operand in zip(saved, unsaved, strict=True):
        if unsaved_operand is None:
            operands.append(saved_operand)
            continue
        tensor, version = unsaved_operand
        if version != _version(tensor):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tuple(tensor.shape) if tensor is not None else ()} is at version {_version(tensor)}; "
                f"expected version {version} instead"
            )
        operands.append(tensor)
    return operands
