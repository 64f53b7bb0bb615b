"""Operands of bfloat16 and float16 as float32: one node of autograd, which checks those that torch.nn would save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.torch.network import Network, Tensors
from fusedrnn.torch.widened_weights import widened

Operands = tuple[Tensor, tuple[Any, ...] | None, Tensors]
"""x, the states or None, and the weights."""


class _Conversion(torch.autograd.Function):
    """From operands to their copies. Backward raises an error if a tensor of ``saved`` has changed in place."""

    @staticmethod
    def forward(ctx: Any, copies: tuple[Tensor, ...], saved: Sequence[Tensor], *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*saved)
        ctx.dtypes = [operand.dtype for operand in operands]
        ctx.set_materialize_grads(False)
        return copies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _ = ctx.saved_tensors  # raises an error if one has changed
        pairs = zip(grads, ctx.dtypes, strict=True)
        return None, None, *[grad if grad is None else grad.to(dtype) for grad, dtype in pairs]


# Function.apply without its detour through functorch; no call under functorch's transforms comes here.
_apply: Any = super(torch.autograd.Function, _Conversion).apply


def low_precision_operands(
    network: Network, x: Tensor, states: Sequence[Tensor] | None, weights: Tensors, several_steps: bool
) -> Operands:
    """The operands in float32. They may change before backward under the same rules as float32 operands.

    ``several_steps`` says whether T is above 1.
    """
    before: Tensors = states or (None,) * network.num_states
    operands = [x, *before, *weights]
    copies = [x.detach().to(torch.float32), *_float32(before), *widened(weights)]
    saved: list[Tensor] = []
    needs_grad = _needs_grad(operands)
    if True in needs_grad:
        candidates = [operands[number] for number in network.saved_operands(needs_grad, several_steps)[0]]
        # torch refuses to save tensors that were created in inference mode, and these cannot change in place here
        # either.
        saved = [tensor for tensor in candidates if tensor is not None and not tensor.is_inference()]
    x32, *others = _recorded(operands, copies, needs_grad, saved)
    states32: Any = tuple(others[: len(before)]) if states else None
    assert x32 is not None
    return x32, states32, others[len(before) :]


def _float32(tensors: Tensors) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.detach().to(torch.float32) for tensor in tensors]


def _needs_grad(operands: Tensors) -> tuple[bool, ...]:
    records = torch.is_grad_enabled()
    return tuple([records and operand is not None and operand.requires_grad for operand in operands])


def _recorded(
    operands: Tensors, copies: Tensors, needs_grad: Sequence[bool], saved: Sequence[Tensor]
) -> list[Tensor | None]:
    """The copies, as functions of the operands that need a gradient."""
    results = list(copies)
    indices = [i for i, needed in enumerate(needs_grad) if needed]
    if indices:
        # Other calls use the same copies of weights, so these must not get a history of autograd.
        aliases = tuple([copies[i].data for i in indices])  # type: ignore[union-attr]
        for i, result in zip(indices, _apply(aliases, saved, *[operands[i] for i in indices]), strict=True):
            results[i] = result
    return results
