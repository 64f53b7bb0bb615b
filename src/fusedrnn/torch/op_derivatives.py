"""How autograd and torch.func differentiate and transform the operators in torch's registry.

The kernels compute first derivatives in reverse mode, for one batch at a time. Gradients of gradients, forward mode and
torch.func's transforms use the decomposition of the operator into torch's own operations, which support all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedrnn.torch import double_backward, op_backward_call, op_call
from fusedrnn.torch.double_backward import Extent
from fusedrnn.torch.network import Tensors, check_trainable
from fusedrnn.torch.op_backward_call import join_backward, split_backward
from fusedrnn.torch.op_call import CallOptions, OpCall

Kernel = Callable[..., list[Tensor]]

_transforms_active = torch._C._are_functorch_transforms_active


def register(library: Any) -> None:
    """Register the kernels of this module with the library that defines the operators."""
    for name, differentiable, decomposed, record in (
        ("rnn", _operands, _decomposed_rnn, lambda *arguments: _record(*arguments)[:-1]),
        ("forward_training", _operands, _decomposed_training, _record),
        ("backward", _backward_operands, _decomposed_backward, _decomposed_backward),
    ):
        operator = getattr(torch.ops.fusedrnn, name)
        library.impl(name, _autograd_kernel(operator, differentiable, decomposed, record), "Autograd")
        # The dispatch key of torch.vmap and of is_grads_batched.
        library.impl(name, decomposed, "FuncTorchBatched")
        library.impl(name, decomposed, "Batched")


def _operands(arguments: Sequence[Any]) -> Tensors:
    """The operands of an operator that may require a gradient."""
    return OpCall(*arguments).differentiable


def _backward_operands(arguments: Sequence[Any]) -> Tensors:
    """The operands of ``backward`` that may require a gradient, which include the cotangents."""
    parts = split_backward(arguments)
    return *parts.cotangents, *parts.call.differentiable


def _autograd_kernel(
    operator: Any, differentiable: Callable[[Sequence[Any]], Tensors], decomposed: Kernel, record: Kernel
) -> Kernel:
    """The kernel of an operator; ``differentiable`` returns those of its arguments that may require a gradient."""

    def kernel(*arguments: Any) -> list[Tensor]:
        if forward_ad._current_level >= 0 or _transforms_active():  # a node of autograd lacks these derivatives
            return decomposed(*arguments)
        if torch.is_grad_enabled():
            for tensor in differentiable(arguments):
                if tensor is not None and tensor.requires_grad:
                    return record(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            results: list[Tensor] = operator(*arguments)
        return results

    return kernel


def _record(*arguments: Any) -> list[Tensor]:
    apply: Any = _RecordedCall.apply
    call = OpCall(*arguments)  # adds arguments that have their defaults
    return list(apply(call.options, call.others, *call.differentiable))


class _RecordedCall(torch.autograd.Function):
    """A call of ``forward_training`` in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, options: CallOptions, others: Sequence[Tensor | None], *tensors: Tensor | None) -> Any:
        call = OpCall.of(tensors, others, options)
        with torch._C._AutoDispatchBelowAutograd():
            *results, reserve = torch.ops.fusedrnn.forward_training(*call)
        ctx.save_for_backward(reserve, *others, *tensors)
        ctx.options = options
        ctx.mark_non_differentiable(reserve)
        ctx.set_materialize_grads(False)
        return *results, reserve

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """Call the dispatcher, so that recorded, batched and forward-mode cotangents use the decomposition."""
        needed = ctx.needs_input_grad[2:]
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        reserve, lengths, batch_sizes, seed, resets, *tensors = ctx.saved_tensors
        call = OpCall.of(tensors, (lengths, batch_sizes, seed, resets), ctx.options)
        results = torch.ops.fusedrnn.backward(*join_backward(call, cotangents[:-1], reserve, needed))
        grads = iter(results)
        return (None, None, *(next(grads) if need else None for need in needed))


# -- decompositions ---------------------------------------------------------------------------------------------------


def _decomposed_rnn(*arguments: Any) -> list[Tensor]:
    call = op_call.checked(*arguments)
    check_trainable(call.spec)
    seed = op_call.check_values(call)
    extent = Extent.of_tensors(call.x, call.lengths, call.batch_sizes, call.resets, call.all_states)
    return list(double_backward.forward(call.spec, extent, seed, call.x, call.states, call.weights))


def _decomposed_training(*arguments: Any) -> list[Tensor]:
    """Return an empty reserve, since the backward of such a call is decomposed too."""
    results = _decomposed_rnn(*arguments)
    return [*results, results[0].new_empty(0, dtype=torch.uint8)]


def _decomposed_backward(*arguments: Any) -> list[Tensor]:
    call, cotangents, _, needed = op_backward_call.checked_backward(*arguments)
    seed = op_call.check_values(call)
    operands = call.x, *call.states, *call.weights
    extent = Extent.of_tensors(call.x, call.lengths, call.batch_sizes, call.resets, call.all_states)
    grads = double_backward.vjp(call.spec, extent, seed, operands, cotangents, call.grads_needed(needed))
    return [grad for grad in grads if grad is not None]
