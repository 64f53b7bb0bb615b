"""The operator in torch's registry, ``torch.ops.fusedrnn``, for torch.compile and torch.export.

A model calls ``rnn``. If autograd records, the call becomes ``forward_training``, whose last result is the reserve that
``backward`` needs. Each operator has a kernel for the CPU and a fake kernel, which only computes the shapes of the
results. :mod:`fusedrnn.torch.op_derivatives` defines the derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.spec import RNNSpec
from fusedrnn.torch import autocast, low_precision, onnx_export, op_backward_call, op_call, op_derivatives, tensor_calls
from fusedrnn.torch.eligibility import DTYPE_NAMES
from fusedrnn.torch.network import CallShape, Network, Results, Tensors, check_trainable
from fusedrnn.torch.op_call import OpCall

_SEED_END = 2**63 - 1


def run(
    spec: RNNSpec, x: Tensor, states: Sequence[Tensor] | None, weights: Tensors, *,
    lengths: Tensor | None = None, batch_sizes: Tensor | None = None, seed: Tensor | None = None,
    resets: Tensor | None = None, all_states: bool = False,
) -> Results:  # fmt: skip
    """:func:`fusedrnn.torch.eager.run` through torch's dispatcher: traceable, with any T and N in one graph.

    The arguments and results are the same, with two differences. ``seed`` is an int64 tensor without dimensions; None
    draws it in the graph. Under torch.compile, a packed sequence without ``states`` breaks the graph: only the shape of
    states gives N, because the graph does not read ``batch_sizes``.
    """
    if x.dtype not in DTYPE_NAMES:
        options: dict[str, Any] = {"lengths": lengths, "batch_sizes": batch_sizes, "seed": seed, "resets": resets}
        options["all_states"] = all_states
        return low_precision.run(run, spec, x, states, weights, **options)
    dropout = spec.dropout if spec.num_layers > 1 else 0.0
    if spec.drops and seed is None:
        seed = torch.randint(_SEED_END, (), dtype=torch.int64, device="cpu")
    num_states = len(spec.state_names)
    initial, reset_states = (states or ())[:num_states], (states or ())[num_states:]
    h0, c0, *more = (*initial, None, None)[: max(2, len(initial))]
    y, *final = torch.ops.fusedrnn.rnn(
        x, h0, c0, list(weights), lengths, batch_sizes, seed if spec.drops else None,
        spec.mode if isinstance(spec.mode, str) else spec.mode.reference, spec.hidden_size, spec.num_layers,
        spec.bidirectional, dropout, spec.projection_size or 0, spec.compute, more or None, resets, all_states,
        spec.residual, spec.input_dropout, list(reset_states) or None,
    )  # fmt: skip
    return y, tuple(final)


# -- kernels ----------------------------------------------------------------------------------------------------------


def _rnn(*arguments: Any) -> list[Tensor]:
    call, shape, seed = _prepared(op_call.checked(*arguments))
    if shape.network.drops:
        y, final, _ = tensor_calls.train(shape, call.x, call.states, call.weights, seed)
    else:
        y, final = tensor_calls.infer(shape, call.x, call.states, call.weights)
    return [y, *final]


def _forward_training(*arguments: Any) -> list[Tensor]:
    call, shape, seed = _prepared(op_call.checked(*arguments))
    y, final, saved = tensor_calls.train(shape, call.x, call.states, call.weights, seed)
    return [y, *final, saved.reserve]


def _backward(*arguments: Any) -> list[Tensor]:
    call, cotangents, reserve, needed = op_backward_call.checked_backward(*arguments)
    call, shape, seed = _prepared(call)
    saved = tensor_calls.saved_for(shape, reserve.contiguous(), call.weights, seed)
    if len(reserve) != saved.call.layout.size:
        raise RuntimeError(f"reserve must have {saved.call.layout.size} bytes; got {len(reserve)}")
    dy, *dfinal = map(op_call.materialized, cotangents)
    grads = tensor_calls.backward(shape, saved, dy, dfinal, call.grads_needed(needed))
    return [grad for grad in grads if grad is not None]


def _prepared(call: OpCall) -> tuple[OpCall, CallShape, int]:
    """The call with its operands in memory for the kernels, its shape and its seed, after a check of values."""
    seed = op_call.check_values(call)
    x, h0, c0 = map(op_call.materialized, (call.x, call.h0, call.c0))
    more_states = [*map(op_call.materialized, call.more_states or ())]
    weights = [None if weight is None else op_call.materialized(weight).contiguous() for weight in call.weights]
    reset_states = [*map(op_call.materialized, call.reset_states or ())] or None
    call = call._replace(x=x, h0=h0, c0=c0, weights=weights, more_states=more_states, reset_states=reset_states)
    options: dict[str, Any] = {"resets": call.resets, "all_states": call.all_states}
    return call, CallShape(Network.of(call.spec), x, call.lengths, call.batch_sizes, **options), seed


# -- fake kernels -----------------------------------------------------------------------------------------------------


def _fake_rnn(*arguments: Any) -> list[Tensor]:
    call = op_call.checked(*arguments)
    y = call.x.new_empty((*call.x.shape[:-1], call.spec.output_size))
    shapes = *call.spec.state_shape(_fake_batch(call)), *call.all_state_shapes
    return [y, *(y.new_empty(shape) for shape in shapes)]


def _fake_forward_training(*arguments: Any) -> list[Tensor]:
    call = OpCall(*arguments)
    check_trainable(call.spec)
    y, *final = _fake_rnn(*arguments)
    steps = (call.x if call.batch_sizes is None else call.batch_sizes).shape[0]
    executor: Any = Network.of(call.spec).executor
    size = executor.reserve_bytes(steps, final[0].shape[1], "gates", call.resets is not None)
    return [y, *final, y.new_empty((size,), dtype=torch.uint8)]


def _fake_batch(call: OpCall) -> Any:
    """N. For a packed sequence, it comes from the shape of a state, or it is a new symbol."""
    if call.batch is not None:
        return call.batch
    for state in call.states:
        if state is not None:
            return state.shape[1]
    return torch.library.get_ctx().new_dynamic_size()


def _fake_backward(*arguments: Any) -> list[Tensor]:
    call, _, _, needed = op_backward_call.checked_backward(*arguments)
    return [
        operand.new_empty(operand.shape)
        for operand, need in zip(call.differentiable, needed, strict=True)
        if need and operand is not None
    ]


# -- registration -----------------------------------------------------------------------------------------------------


def _register() -> Any:
    untyped: Any = torch.library
    library = untyped.Library("fusedrnn", "DEF")
    for name, schema, kernel, fake in (
        ("rnn", op_call.SCHEMA, _rnn, _fake_rnn),
        ("forward_training", op_call.SCHEMA, _forward_training, _fake_forward_training),
        ("backward", op_backward_call.SCHEMA, _backward, _fake_backward),
    ):
        library.define(f"{name}({schema}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CPU")
        untyped.register_fake(f"fusedrnn::{name}", fake, lib=library)
    op_derivatives.register(library)
    library.impl("rnn", autocast.kernel, "AutocastCPU")
    onnx_export.register()
    return library


# A reference keeps the operators registered.
_LIBRARY = _register()
