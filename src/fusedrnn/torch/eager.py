"""One eager call of the operator on tensors, recorded by autograd if anything requires gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.spec import RNNSpec
from fusedrnn.torch import double_backward, tensor_calls
from fusedrnn.torch.converted_operands import low_precision_operands
from fusedrnn.torch.eligibility import is_plain
from fusedrnn.torch.low_precision import rounded
from fusedrnn.torch.network import CallShape, Network, Results, Tensors
from fusedrnn.torch.tensor_calls import SavedForBackward, TrainingResults


class FusedRNN(torch.autograd.Function):
    """A call of the operator; gradients of its gradients come from the operator's decomposition.

    The reserve and the weights are saved tensors, so that they live as long as the graph, and hooks on saved tensors
    (checkpointing, offloading) see them. Operands are saved too, for gradients of gradients, but only those that
    torch.nn saves: the others may change before backward, see :mod:`fusedrnn.torch.saved_operands`.
    """

    @staticmethod
    def forward(ctx: Any, shape: CallShape, results: TrainingResults, *operands: Tensor | None) -> tuple[Tensor, ...]:
        """Record ``results`` of ``operands``: x, the initial states, None for zeros, and the weights."""
        y, final, for_backward = results
        network, weights = shape.network, for_backward.weights
        is_saved = network.saved_operands(ctx.needs_input_grad[2:], shape.steps > 1)
        # Backward reads unsaved matrices too, but only for unused results.
        are_read = (True,) if for_backward.packed else is_saved[1 + network.num_states :]
        if for_backward.under_autocast:
            is_saved = network.saved_operands(ctx.needs_input_grad[2:], shape.steps > 1, True)
            if not for_backward.packed:
                pairs = zip(weights, are_read, strict=True)
                weights = [weight.clone() if read and weight is not None else weight for weight, read in pairs]
        flags = *are_read, *is_saved
        tensors = *weights, *operands
        ctx.save_for_backward(
            for_backward.reserve, *[tensor if save else None for save, tensor in zip(flags, tensors, strict=True)]
        )
        ctx.unsaved = [None if save else tensor for save, tensor in zip(flags, tensors, strict=True)]
        ctx.versions = [None if save else _version(operand) for save, operand in zip(is_saved, operands, strict=True)]
        ctx.shape, ctx.info, ctx.num_weights = shape, for_backward.info, len(weights)
        ctx.set_materialize_grads(False)
        return y, *final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> tuple[Any, ...]:
        """The gradients of the inputs that need one."""
        shape, needs_grad = ctx.shape, ctx.needs_input_grad[2:]
        reserve, *saved = ctx.saved_tensors
        cotangents = [cotangent for cotangent in (dy, *dfinal) if cotangent is not None]
        if not cotangents:
            return (None,) * (2 + len(needs_grad))
        network = shape.network
        tensors = [unsaved if tensor is None else tensor for tensor, unsaved in zip(saved, ctx.unsaved, strict=True)]
        if torch.is_grad_enabled() or not all(is_plain(cotangent, network.dtype) for cotangent in cotangents):
            operands = tensors[ctx.num_weights :]
            _check_unchanged(operands, ctx.versions)
            extent = double_backward.Extent.of(shape)
            with torch.autocast("cpu", enabled=False):  # backward may be called under it
                grads = double_backward.vjp(network.spec, extent, ctx.info.seed, operands, (dy, *dfinal), needs_grad)
        else:
            for_backward = SavedForBackward(reserve, tensors[: ctx.num_weights], ctx.info)
            grads = tensor_calls.backward(shape, for_backward, dy, dfinal, needs_grad)
        return None, None, *grads


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _check_unchanged(operands: Tensors, versions: Sequence[int | None]) -> None:
    """Refuse operands of another version; autograd has checked those with None, which it saved.

    Raises:
        RuntimeError: As autograd raises it.
    """
    for tensor, version in zip(operands, versions, strict=True):
        if version is not None and version != _version(tensor):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tuple(tensor.shape) if tensor is not None else ()} is at version {_version(tensor)}; "
                f"expected version {version} instead"
            )


# Function.apply without its detour through functorch, under whose transforms no call gets here.
_apply: Any = super(torch.autograd.Function, FusedRNN).apply


def run(
    spec: RNNSpec, x: Tensor, states: Sequence[Tensor] | None, weights: Tensors, *,
    lengths: Tensor | None = None, batch_sizes: Tensor | None = None, seed: int | None = None,
    under_autocast: bool = False,
) -> Results:  # fmt: skip
    """Run a network over sequences.

    The tensors have the spec's dtype, or all of them bfloat16 or float16; results have that of ``x``.

    Args:
        spec: What to run; its dropout applies in inference too.
        x: Input (T, N, I), any strides; with ``batch_sizes`` the data of a packed sequence (rows, I).
        states: Initial states ``(h0,)`` or ``(h0, c0)``, each (L·D, N, size); None for zeros.
        weights: For each layer, for each direction: i2h weight, h2h weight, h2r weight if projected, i2h bias, h2h
            bias; None for no bias.
        lengths: Valid steps of each sequence, integers (N,), on the CPU; None for T everywhere.
        batch_sizes: Of a packed sequence: the number of sequences at each step, int64 (T,).
        seed: Seed of dropout, from 0 to 2**63 - 1; None to draw one from torch's generator if anything is dropped.
        under_autocast: Whether float32 tensors may change before backward as torch.nn's may under autocast.

    Returns:
        The output (T, N, D·S), or packed (rows, D·S); and the final states, a tuple like ``states``.
    """
    network = Network.of(spec)
    if x.dtype is not network.dtype:
        several_steps = len(x if batch_sizes is None else batch_sizes) > 1
        operands = low_precision_operands(network, x, states, weights, several_steps)
        return rounded(run(spec, *operands, lengths=lengths, batch_sizes=batch_sizes, seed=seed), x.dtype)
    if seed is None:
        seed = draw_seed() if network.drops else 0
    weights = [weight if weight is None or weight.is_contiguous() else weight.contiguous() for weight in weights]
    shape = CallShape(network, x, lengths, batch_sizes)
    if torch.is_grad_enabled() and _require_grad(x, states, weights):
        # Runs outside FusedRNN.forward, where a signal handler would see gradients disabled.
        results = tensor_calls.train(shape, x, states, weights, seed)
        if under_autocast:
            results = *results[:2], results[2]._replace(under_autocast=True)
        initial = states if states is not None else (None,) * network.num_states
        y, *final = _apply(shape, results, x, *initial, *weights)
        return y, tuple(final)
    if network.drops:
        return tensor_calls.train(shape, x, states, weights, seed)[:2]
    return tensor_calls.infer(shape, x, states, weights)


def run_under_autocast(
    spec: RNNSpec, x: Tensor, states: Sequence[Tensor] | None, weights: Tensors, **options: Any
) -> Results:
    """:func:`run` where autocast is on."""
    return run(spec, x, states, weights, under_autocast=True, **options)


def draw_seed() -> int:
    """A seed of dropout from PyTorch's default generator, which torch.manual_seed makes repeatable."""
    return int(torch.randint(2**63 - 1, (), device="cpu").item())


def _require_grad(x: Tensor, states: Sequence[Tensor] | None, weights: Tensors) -> bool:
    if x.requires_grad:
        return True
    for tensor in weights:
        if tensor is not None and tensor.requires_grad:
            return True
    return states is not None and any(state.requires_grad for state in states)
