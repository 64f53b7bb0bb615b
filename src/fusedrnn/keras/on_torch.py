"""The operator on Keras's tensors of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedrnn.keras import cell_spec
from fusedrnn.keras.cell_spec import gate_order
from fusedrnn.keras.parameters import Parameters, Results
from fusedrnn.spec import RNNSpec
from fusedrnn.torch import dispatch
from fusedrnn.torch.eligibility import MODULE_DTYPES, is_plain
from fusedrnn.torch.imports import after_import
from fusedrnn.torch.network import Tensors
from fusedrnn.torch.weight_copies import WeightCopies

Order = tuple[int, ...]

_ONE_STEP = "lstm", "gru"
"""Keras has functions for these. For a single step, they take as long as the check whether a weight has changed."""


# torch.compile treats the spec as a constant, and does not trace how it is found.
after_import("torch._dynamo", lambda dynamo: dynamo.assume_constant_result(cell_spec.named_spec))


def run(
    spec: RNNSpec, x: Tensor, states: Sequence[Tensor], parameters: Sequence[Parameters], lengths: Tensor | None
) -> Results | None:
    """:meth:`fusedrnn.keras.backends.Backend.run`."""
    if x.shape[0] == 1 and lengths is None and spec.mode in _ONE_STEP and spec.reset_after:
        return None
    run_call = dispatch.runner()
    tensors = [tensor for own in parameters for tensor in own]
    dtype = tensors[0].dtype
    x = x.to(dtype)
    operands = [x, *states, *[tensor for tensor in tensors if tensor is not None]]
    if run_call is None or dtype not in MODULE_DTYPES or not all([is_plain(tensor, dtype) for tensor in operands]):
        return None
    if not dispatch.is_eager(run_call) and not (spec.reset_after and spec.activations is None):
        return None  # the registered operator has no such options
    arrange = _kept if dispatch.is_eager(run_call) and isinstance(tensors[0], Parameter) else _arranged
    return run_call(spec, x, tuple(states), arrange(tensors, gate_order(spec)), lengths=lengths)


def padding_of(mask: Tensor) -> bool | None:
    """:meth:`fusedrnn.keras.backends.Backend.padding_of`."""
    run_call = dispatch.runner()
    # Tracers, transforms such as vmap and tensors without memory of the CPU have no values to read.
    if run_call is None or not dispatch.is_eager(run_call) or not is_plain(mask, torch.bool):
        return False
    if bool(mask.all()):
        return None
    return bool((mask[1:] <= mask[:-1]).all())


def _arranged(tensors: Tensors, order: Order) -> list[Tensor | None]:
    """The operator's weights and biases of each direction, from Keras's kernels and biases."""
    weights: list[Tensor | None] = []
    for kernel, recurrent_kernel, bias in zip(*[iter(tensors)] * 3, strict=True):
        weights += [_by_rows(kernel, order), _by_rows(recurrent_kernel, order)]
        rows = [] if bias is None else [bias] if bias.dim() == 1 else bias.unbind()
        weights += [*[_reordered(row, order) for row in rows], None, None][:2]
    return weights


def _by_rows(kernel: Tensor, order: Order) -> Tensor:
    """A kernel (in, G·H) as (G·H, in), its gates in another order."""
    if order == tuple(sorted(order)):
        return kernel.t().contiguous()
    gates = kernel.chunk(len(order), 1)
    return torch.cat([gates[gate].t() for gate in order])


def _reordered(bias: Tensor, order: Order) -> Tensor:
    if order == tuple(sorted(order)):
        return bias.clone()
    gates = bias.chunk(len(order))
    return torch.cat([gates[gate] for gate in order])


_COPIES = WeightCopies(_arranged)


def _kept(tensors: Tensors, order: Order) -> Tensors:
    """:func:`_arranged`, computed again only if the content of a variable has changed."""
    copies = _COPIES.of(tensors, order)
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return copies
    # Other calls use the same copies, so these must not get a history of autograd.
    aliases = [copy if copy is None else copy.data for copy in copies]
    present = [copy for copy in aliases if copy is not None]
    recorded = iter(_Arrangement.apply(present, order, *tensors))
    return [copy if copy is None else next(recorded) for copy in copies]


class _Arrangement(torch.autograd.Function):
    """From Keras's kernels and biases to copies that are arranged for the operator."""

    @staticmethod
    def forward(ctx: Any, copies: Sequence[Tensor], order: Order, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.order, ctx.bias_dims = order, [0 if bias is None else bias.dim() for bias in tensors[2::3]]
        ctx.set_materialize_grads(False)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        remaining, results = iter(grads), []
        for dims in ctx.bias_dims:
            results += [_by_columns(next(remaining), ctx.order), _by_columns(next(remaining), ctx.order)]
            biases = [_reordered_if(next(remaining), ctx.order) for _ in range(dims)]
            results.append(_stacked(biases) if dims == 2 else biases[0] if biases else None)
        return None, None, *results


def _by_columns(grad: Tensor | None, order: Order) -> Tensor | None:
    """The gradient of a kernel, from the gradient of the result of :func:`_by_rows`."""
    if grad is None:
        return None
    # Swapping two gates is its own inverse.
    return grad.t() if order == tuple(sorted(order)) else torch.cat([grad.chunk(len(order))[g].t() for g in order], 1)


def _reordered_if(grad: Tensor | None, order: Order) -> Tensor | None:
    return None if grad is None else _reordered(grad, order)


def _stacked(grads: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient of both rows of a bias; zeros in a row that has no gradient."""
    like = next((grad for grad in grads if grad is not None), None)
    return None if like is None else torch.stack([torch.zeros_like(like) if grad is None else grad for grad in grads])
