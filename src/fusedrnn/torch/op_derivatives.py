"""How autograd and torch.func differentiate and transform the operators in torch's registry.

The kernels compute first derivatives in reverse mode, of one batch at a time. Gradients of gradients, forward mode and
torch.func's transforms use the decomposition of the operator into torch's own operations, which support them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedrnn.torch import double_backward, op_call
from fusedrnn.torch.double_backward import Extent
from fusedrnn.torch.network import check_trainable
from fusedrnn.torch.op_call import NUM_BACKWARD, OpCall

Kernel = Callable[..., list[Tensor]]

_transforms_active = torch._C._are_functorch_transforms_active


def register(library: Any) -> None:
    """Register the kernels of this module with the library that defines the operators."""
    for name, first, decomposed, record in (
        ("rnn", 0, _decomposed_rnn, lambda *arguments: _record(*arguments)[:-1]),
        ("forward_training", 0, _decomposed_training, _record),
        ("backward", NUM_BACKWARD, _decomposed_backward, _decomposed_backward),
    ):
        operator = getattr(torch.ops.fusedrnn, name)
        library.impl(name, _autograd_kernel(operator, first, decomposed, record), "Autograd")
        # Keys of torch.vmap, and of is_grads_batched.
        library.impl(name, decomposed, "FuncTorchBatched")
        library.impl(name, decomposed, "Batched")


def _autograd_kernel(operator: Any, first: int, decomposed: Kernel, record: Kernel) -> Kernel:
    """The kernel of an operator whose arguments of the call start at ``first``, after its cotangents and reserve."""

    def kernel(*arguments: Any) -> list[Tensor]:
        if forward_ad._current_level >= 0 or _transforms_active():  # no node of autograd has these derivatives
            return decomposed(*arguments)
        x, h0, c0, weights = arguments[first : first + 4]
        if torch.is_grad_enabled():
            for tensor in (*arguments[: max(first - 1, 0)], x, h0, c0, *weights):
                if tensor is not None and tensor.requires_grad:
                    return record(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            results: list[Tensor] = operator(*arguments)
        return results

    return kernel


def _record(*arguments: Any) -> list[Tensor]:
    apply: Any = _RecordedCall.apply
    call = OpCall(*arguments)  # with every argument that has a default
    others = call.lengths, call.batch_sizes, call.seed, call.resets
    return list(apply(call[7:-1], others, *call[:3], *call[3]))


class _RecordedCall(torch.autograd.Function):
    """A call of ``forward_training`` in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, options: Any, others: Sequence[Tensor | None], *tensors: Tensor | None) -> Any:
        x, h0, c0, *weights = tensors
        with torch._C._AutoDispatchBelowAutograd():
            *results, reserve = torch.ops.fusedrnn.forward_training(
                x, h0, c0, weights, *others[:-1], *options, others[-1]
            )
        ctx.save_for_backward(reserve, *others, *tensors)
        *ctx.options, ctx.compute = options
        ctx.mark_non_differentiable(reserve)
        ctx.set_materialize_grads(False)
        return *results, reserve

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """Through the dispatcher, so that recorded, batched and forward-mode cotangents use the decomposition."""
        needed = ctx.needs_input_grad[2:]
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        reserve, lengths, batch_sizes, seed, resets, x, h0, c0, *weights = ctx.saved_tensors
        dy, dh_n, dc_n = (*cotangents[:-1], None)[:3]  # the last is that of the reserve
        results = torch.ops.fusedrnn.backward(
            dy, dh_n, dc_n, reserve, x, h0, c0, weights, lengths, batch_sizes, seed, *ctx.options, list(needed),
            ctx.compute, resets,
        )  # fmt: skip
        grads = iter(results)
        return (None, None, *(next(grads) if need else None for need in needed))


# -- decompositions ---------------------------------------------------------------------------------------------------


def _decomposed_rnn(*arguments: Any) -> list[Tensor]:
    call = op_call.checked(*arguments)
    check_trainable(call.spec)
    seed = op_call.check_values(call)
    return list(double_backward.forward(call.spec, _extent(call), seed, call.x, call.states, call.weights))


def _decomposed_training(*arguments: Any) -> list[Tensor]:
    """With an empty reserve: the backward of such a call is decomposed too."""
    results = _decomposed_rnn(*arguments)
    return [*results, results[0].new_empty(0, dtype=torch.uint8)]


def _decomposed_backward(*arguments: Any) -> list[Tensor]:
    call, cotangents, _, needed = op_call.checked_backward(*arguments)
    seed = op_call.check_values(call)
    operands = call.x, *call.states, *call.weights
    grads = double_backward.vjp(call.spec, _extent(call), seed, operands, cotangents, call.grads_needed(needed))
    return [grad for grad in grads if grad is not None]


def _extent(call: OpCall) -> Extent:
    if call.batch_sizes is not None:
        batch = int(call.batch_sizes[0])
        active = torch.arange(batch) < call.batch_sizes[:, None]
        return Extent(len(call.batch_sizes), batch, active, packed=True, resets=call.resets)
    steps, batch = call.x.shape[:2]
    valid = None if call.lengths is None else torch.arange(steps)[:, None] < call.lengths
    return Extent(steps, batch, valid, resets=call.resets)
