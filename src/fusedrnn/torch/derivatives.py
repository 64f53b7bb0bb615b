"""How the operators in torch's registry are differentiated and transformed by torch.func.

The kernels give first derivatives in reverse mode, of one batch at a time. Whatever else is asked for (gradients of
gradients, forward mode, torch.func's transforms) comes from the same network composed of torch's own operations, which
know them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.autograd import forward_ad

import torch
from fusedrnn.torch import double_backward as composed
from fusedrnn.torch import operands
from fusedrnn.torch.double_backward import Extent
from fusedrnn.torch.operands import Call
from torch import Tensor

_transforms_active = torch._C._are_functorch_transforms_active
# The arguments of the operator ``backward`` before those of the call: dy, dh_n, dc_n, reserve.
_BEFORE = 4


def register(library: Any) -> None:
    """Register the kernels of this module with the library that defines the operators."""
    for name, autograd, batched in (
        ("rnn", _rnn, _composed_rnn),
        ("forward_training", _forward_training, _composed_training),
        ("backward", _backward, _composed_backward),
    ):
        library.impl(name, autograd, "Autograd")
        # Those of torch.vmap, and of is_grads_batched.
        library.impl(name, batched, "FuncTorchBatched")
        library.impl(name, batched, "Batched")


# -- autograd ---------------------------------------------------------------------------------------------------------


def _rnn(*arguments: Any) -> list[Tensor]:
    if _composes():
        return _composed_rnn(*arguments)
    if _recorded(*arguments[:3], *arguments[3]):
        return _record(arguments)[:-1]
    with torch._C._AutoDispatchBelowAutograd():
        results: list[Tensor] = torch.ops.fusedrnn.rnn(*arguments)
    return results


def _forward_training(*arguments: Any) -> list[Tensor]:
    if _composes():
        return _composed_training(*arguments)
    if _recorded(*arguments[:3], *arguments[3]):
        return _record(arguments)
    with torch._C._AutoDispatchBelowAutograd():
        results: list[Tensor] = torch.ops.fusedrnn.forward_training(*arguments)
    return results


def _backward(*arguments: Any) -> list[Tensor]:
    x, h0, c0, weights = arguments[_BEFORE : _BEFORE + 4]
    if _composes() or _recorded(*arguments[: _BEFORE - 1], x, h0, c0, *weights):
        return _composed_backward(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        results: list[Tensor] = torch.ops.fusedrnn.backward(*arguments)
    return results


def _composes() -> bool:
    """Whether derivatives may be asked for that no node in autograd's graph gives."""
    return forward_ad._current_level >= 0 or _transforms_active()


def _recorded(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _record(arguments: Sequence[Any]) -> list[Tensor]:
    node: Any = _Node.apply
    return list(node(arguments[7:], arguments[4:7], *arguments[:3], *arguments[3]))


class _Node(torch.autograd.Function):
    """A call of ``forward_training`` in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, options: Any, others: Sequence[Tensor | None], *tensors: Tensor | None) -> Any:
        x, h0, c0, *weights = tensors
        with torch._C._AutoDispatchBelowAutograd():
            *results, reserve = torch.ops.fusedrnn.forward_training(x, h0, c0, weights, *others, *options)
        ctx.save_for_backward(reserve, *others, *tensors)
        ctx.options = options
        ctx.mark_non_differentiable(reserve)
        ctx.set_materialize_grads(False)
        return *results, reserve

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Through the dispatcher: gradients that are recorded, batched or have tangents are composed."""
        needed = ctx.needs_input_grad[2:]
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        reserve, lengths, batch_sizes, seed, x, h0, c0, *weights = ctx.saved_tensors
        dy, dh_n, dc_n = (*gradients[:-1], None)[:3]  # the last is of the reserve
        results = torch.ops.fusedrnn.backward(
            dy, dh_n, dc_n, reserve, x, h0, c0, weights, lengths, batch_sizes, seed, *ctx.options, list(needed)
        )
        computed = iter(results)
        return (None, None, *(next(computed) if wanted else None for wanted in needed))


# -- composed ---------------------------------------------------------------------------------------------------------


def _composed_rnn(*arguments: Any) -> list[Tensor]:
    call = Call.of(arguments)
    operands.check(call)
    operands.check_values(call)
    return list(composed.run(call.spec, _extent(call), operands.seed_of(call), call.x, call.states, call.weights))


def _composed_training(*arguments: Any) -> list[Tensor]:
    """With a reserve of nothing: the backward of such a call is composed too."""
    results = _composed_rnn(*arguments)
    return [*results, results[0].new_empty(0, dtype=torch.uint8)]


def _composed_backward(*arguments: Any) -> list[Tensor]:
    call, needed = Call.of(arguments[_BEFORE:-1]), arguments[-1]
    gradients, reserve = arguments[: _BEFORE - 1], arguments[_BEFORE - 1]
    operands.check(call)
    operands.check_gradients(call, gradients, reserve, needed)
    operands.check_values(call)
    present, given = (call.x, *call.states, *call.weights), gradients[: 1 + len(call.states)]
    seed = operands.seed_of(call)
    computed = composed.gradients(call.spec, _extent(call), seed, present, given, call.wanted(needed))
    return [gradient for gradient in computed if gradient is not None]


def _extent(call: Call) -> Extent:
    if call.batch_sizes is not None:
        batch = int(call.batch_sizes[0])
        return Extent(len(call.batch_sizes), batch, torch.arange(batch) < call.batch_sizes[:, None], packed=True)
    steps, batch = call.x.shape[:2]
    return Extent(steps, batch, None if call.lengths is None else torch.arange(steps)[:, None] < call.lengths)
