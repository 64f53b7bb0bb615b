"""One eager call of the operator on tensors, recorded by autograd if anything requires gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.spec import RNNSpec
from fusedrnn.torch import double_backward, guarded_backward, tensor_calls
from fusedrnn.torch.converted_operands import low_precision_operands
from fusedrnn.torch.eligibility import is_plain
from fusedrnn.torch.low_precision import rounded
from fusedrnn.torch.network import CallShape, Network, Results, Tensors
from fusedrnn.torch.tensor_calls import SavedForBackward, TrainingResults


class FusedRNN(torch.autograd.Function):
    """A call of the operator. Its gradients' gradients come from the operator's decomposition.

    The reserve and the weights are saved tensors: they live as long as the graph, and hooks on saved tensors
    (checkpointing, offloading) see them. Operands are saved too, for gradients of gradients, but only those that
    torch.nn saves. The others may change before backward; see :mod:`fusedrnn.torch.saved_operands`.
    """

    @staticmethod
    def forward(ctx: Any, shape: CallShape, results: TrainingResults, *operands: Tensor | None) -> tuple[Tensor, ...]:
        """Record ``results`` of ``operands``: x, the states, None for zeros, and the weights.

        Returns the output, except for a step of a cell, and the final states.
        """
        y, final, for_backward = results
        network, needs_grad = shape.network, ctx.needs_input_grad[2:]
        several_steps, under_autocast = shape.steps > 1, for_backward.under_autocast
        ctx.numbers = saved, unsaved = network.saved_operands(needs_grad, several_steps, under_autocast)
        weights, is_packed = for_backward.weights, for_backward.packed
        if under_autocast and not is_packed:
            # Backward also reads matrices that are not saved here, but only for results that are not used.
            read = network.saved_operands(needs_grad, several_steps)[0]
            weights = [
                weight if weight is None or number not in read else weight.clone()
                for number, weight in enumerate(weights, len(operands) - len(weights))
            ]
        # Packed weights are a copy. Other weights are the parameters' own memory, which hooks need not see twice.
        packed = weights if is_packed else ()
        ctx.save_for_backward(for_backward.reserve, *packed, *[operands[number] for number in saved])
        ctx.sizes = [len(memory) for memory in (for_backward.reserve, *packed)]
        ctx.weights = None if is_packed else weights
        ctx.unsaved = [(operands[number], _version(operands[number])) for number in unsaved]
        ctx.shape, ctx.call = shape, for_backward.call
        ctx.set_materialize_grads(False)
        return final if y is None else (y, *final)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """The gradients of the inputs that need one."""
        shape, needs_grad = ctx.shape, ctx.needs_input_grad[2:]
        reserve, *saved = ctx.saved_tensors
        weights = ctx.weights or [saved.pop(0)]
        present = [cotangent for cotangent in cotangents if cotangent is not None]
        if not present:
            return (None,) * (2 + len(needs_grad))
        dy, *dfinal = (None, *cotangents) if shape.is_cell else cotangents
        network = shape.network
        if torch.is_grad_enabled() or not all([is_plain(cotangent, network.dtype) for cotangent in present]):
            operands = _in_order(ctx.numbers, saved, [_unchanged(*operand) for operand in ctx.unsaved])
            extent = double_backward.Extent.of(shape)
            with torch.autocast("cpu", enabled=False):  # backward may be called under autocast
                grads = double_backward.vjp(network.spec, extent, ctx.call.seed, operands, (dy, *dfinal), needs_grad)
        else:
            reserve, *packed = map(tensor_calls.restored, (reserve, *weights), ctx.sizes)
            read: Tensors = packed or weights
            grads = _gradients(shape, SavedForBackward(reserve, [*read], ctx.call), dy, dfinal, needs_grad)
        return None, None, *grads


def _gradients(
    shape: CallShape, saved: SavedForBackward, dy: Tensor | None, dfinal: Tensors, needs_grad: tuple[bool, ...]
) -> list[Tensor | None]:
    """What :func:`fusedrnn.torch.tensor_calls.backward` returns, by a prepared call if there is one."""
    if shape.backwards is not None:
        dy, dfinal = tensor_calls.readable(dy, dfinal)
        backward = guarded_backward.prepared(shape, saved, needs_grad, dy, dfinal)
        grads = None if backward is None else backward.run(saved, dy, dfinal)
        if grads is not None:
            return grads
    return tensor_calls.backward(shape, saved, dy, dfinal, needs_grad)


def _in_order(
    numbers: tuple[list[int], list[int]], saved: Tensors, unsaved: Tensors
) -> list[Tensor | None]:
    """The operands in order, from the saved ones and the others; ``numbers`` are the positions of both."""
    by_number = dict(zip((*numbers[0], *numbers[1]), (*saved, *unsaved), strict=True))
    return [by_number[number] for number in range(len(by_number))]


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _unchanged(operand: Tensor | None, version: int) -> Tensor | None:
    """An operand that autograd did not save, and therefore has not checked.

    Raises:
        RuntimeError: As autograd raises it, if the operand has another version.
    """
    if version != _version(operand):
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{tuple(operand.shape) if operand is not None else ()} is at version {_version(operand)}; "
            f"expected version {version} instead"
        )
    return operand


# Function.apply without its detour through functorch; no call under functorch's transforms comes here.
_apply: Any = super(torch.autograd.Function, FusedRNN).apply


def run(
    spec: RNNSpec, x: Tensor, states: Sequence[Tensor] | None, weights: Tensors, *,
    lengths: Tensor | None = None, batch_sizes: Tensor | None = None, seed: int | None = None,
    resets: Tensor | None = None, all_states: bool = False, under_autocast: bool = False,
) -> Results:  # fmt: skip
    """Run a network over sequences.

    The tensors have the spec's dtype, or all are bfloat16 or all float16; results have the dtype of ``x``.

    Args:
        spec: The network; its dropout applies in inference too.
        x: Input (T, N, I), any strides; with ``batch_sizes``, the data of a packed sequence (rows, I).
        states: Initial states ``(h0,)`` or ``(h0, c0)``, each (L·D, N, size), and then the states after resets unless
            these are zeros; None for zeros.
        weights: For each layer and each direction: i2h weight, h2h weight, h2r weight if projected, i2h bias, h2h bias;
            None for a missing bias.
        lengths: Valid steps of each sequence, integers (N,), on the CPU; None for T everywhere.
        batch_sizes: For a packed sequence, the number of sequences at each step, int64 (T,).
        seed: Seed of dropout, from 0 to 2**63 - 1; None to draw one from torch's generator if anything is dropped.
        resets: Where sequences begin anew: bools (T, N), on the CPU; None for nowhere.
        all_states: Whether to return the other states of every step too, after the final states.
        under_autocast: Whether float32 tensors may change before backward, as they may in torch.nn under autocast.

    Returns:
        The output (T, N, D·S), or packed (rows, D·S); and the final states, a tuple like the initial states.
    """
    network = Network.of(spec)
    if x.dtype is not network.dtype:
        several_steps = len(x if batch_sizes is None else batch_sizes) > 1
        operands = low_precision_operands(network, x, states, weights, several_steps)
        options: dict[str, Any] = {"lengths": lengths, "batch_sizes": batch_sizes, "seed": seed, "resets": resets}
        options["all_states"] = all_states
        return rounded(run(spec, *operands, **options), x.dtype)
    shape = CallShape(network, x, lengths, batch_sizes, resets=resets, all_states=all_states)
    return run_shape(shape, x, states, tensor_calls.contiguous(weights), seed, under_autocast=under_autocast)


def run_cell(spec: RNNSpec, x: Tensor, states: Sequence[Tensor] | None, weights: Tensors) -> Results:
    """Run a step of a cell on tensors of the spec's dtype.

    It is like :func:`run`, but x is (N, I) or (I,), states are (N, size) or (size,), and there is no output.
    """
    shape = CallShape(Network.of(spec), x, None, None, is_cell=True)
    return run_shape(shape, x, states, tensor_calls.contiguous(weights))


def run_shape(
    shape: CallShape, x: Tensor, states: Sequence[Tensor] | None, weights: Tensors, seed: int | None = None,
    executor_weights: Any = None, is_recorded: bool | None = None, under_autocast: bool = False,
) -> Results:  # fmt: skip
    """Run a call of a known shape on tensors of the spec's dtype, with contiguous weights.

    ``executor_weights`` are the weights in the executor's form, and ``is_recorded`` is whether autograd records the
    call; None if not known. ``under_autocast`` is as in :func:`run`.
    """
    network = shape.network
    if seed is None:
        seed = draw_seed() if network.drops else 0
    if is_recorded is None:
        is_recorded = torch.is_grad_enabled() and require_grad(x, states, weights)
    if is_recorded:
        # This runs outside of FusedRNN.forward, since a signal handler would see gradients disabled there.
        results = tensor_calls.train(shape, x, states, weights, seed, executor_weights)
        if under_autocast:
            results = *results[:2], results[2]._replace(under_autocast=True)
        y, *final = record(shape, results, x, states or (None,) * network.num_states, weights)
        return y, tuple(final)
    if network.drops:
        return tensor_calls.train(shape, x, states, weights, seed, executor_weights)[:2]
    return tensor_calls.infer(shape, x, states, weights, executor_weights)


def record(
    shape: CallShape, results: TrainingResults, x: Tensor, states: Tensors, weights: Tensors
) -> tuple[Any, ...]:
    """Let autograd record a call: the output, None for a cell, and the final states, with their history."""
    outputs: tuple[Any, ...] = _apply(shape, results, x, *states, *weights)
    return (None, *outputs) if shape.is_cell else outputs


def run_under_autocast(
    spec: RNNSpec, x: Tensor, states: Sequence[Tensor] | None, weights: Tensors, **options: Any
) -> Results:
    """:func:`run` for a call that is made under autocast."""
    return run(spec, x, states, weights, under_autocast=True, **options)


def draw_seed() -> int:
    """A seed of dropout from PyTorch's default generator, which torch.manual_seed makes repeatable."""
    return int(torch.randint(2**63 - 1, (), device="cpu").item())


def require_grad(x: Tensor, states: Sequence[Tensor] | None, weights: Tensors) -> bool:
    """Whether any of these tensors requires a gradient."""
    if x.requires_grad:
        return True
    for tensor in weights:
        if tensor is not None and tensor.requires_grad:
            return True
    return states is not None and any(state.requires_grad for state in states)
