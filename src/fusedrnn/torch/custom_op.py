"""The operator as torch sees it: ``torch.ops.fusedrnn``, for torch.compile and torch.export.

``rnn`` is what a model calls. Where autograd records, it becomes ``forward_training``, whose last result is what
``backward`` needs. Each has a real kernel for the CPU and a fake one, which knows the shapes of the results only; how
they are differentiated is in :mod:`fusedrnn.torch.derivatives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fusedrnn.torch import autocast, derivatives, operands
from fusedrnn.torch import onnx_export as exporting
from fusedrnn.torch import tensor_calls as kernels
from fusedrnn.torch.operands import Call
from fusedrnn.torch.tensor_calls import Network, Problem
from torch import Tensor

# Seeds are below this: what fits int64.
_SEEDS = 2**63 - 1


def run(
    spec: Any,
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor | None],
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a network over sequences through torch's dispatcher: traceable, with any T and N in one graph.

    Args:
        spec: What to run, an RNNSpec or what has its mode, hidden_size, num_layers, bidirectional, projection_size
            and dropout, which counts in inference too.
        x: Input (T, N, I), float32 or float64, any strides; with ``batch_sizes`` the data of a packed sequence
            (rows, I).
        states: Initial states ``(h0,)`` or ``(h0, c0)``, each (L·D, N, size); None for zeros. Under torch.compile a
            packed sequence without them breaks the graph: only they tell N before ``batch_sizes`` is read.
        weights: For each layer, for each direction: i2h weight, h2h weight, h2r weight if projected, i2h bias, h2h
            bias; None for no bias.
        lengths: Valid steps of each sequence, int64 (N,), on the CPU; None for T everywhere.
        batch_sizes: Of a packed sequence: how many sequences have each step, int64 (T,), on the CPU.
        seed: What dropout depends on, int64, of no dimensions; None to draw one, in the graph, if anything is dropped.

    Returns:
        The output (T, N, D·S), or packed (rows, D·S); and the final states, a tuple like ``states``.
    """
    dropout = spec.dropout if spec.num_layers > 1 else 0.0
    if dropout and seed is None:
        seed = torch.randint(_SEEDS, (), dtype=torch.int64, device="cpu")
    h0, c0 = (*(states or ()), None, None)[:2]
    y, *final = torch.ops.fusedrnn.rnn(
        x, h0, c0, list(weights), lengths, batch_sizes, seed if dropout else None,
        spec.mode, spec.hidden_size, spec.num_layers, spec.bidirectional, dropout, spec.projection_size or 0,
    )  # fmt: skip
    return y, tuple(final)


# -- kernels ----------------------------------------------------------------------------------------------------------


def _rnn(*arguments: Any) -> list[Tensor]:
    call, network, problem, seed = _prepared(arguments)
    if network.spec.drops:
        y, final, _ = kernels.train(network, problem, call.x, call.states, call.weights, seed)
    else:
        y, final = kernels.infer(network, problem, call.x, call.states, call.weights)
    return [y, *final]


def _rnn_training(*arguments: Any) -> list[Tensor]:
    call, network, problem, seed = _prepared(arguments)
    y, final, kept = kernels.train(network, problem, call.x, call.states, call.weights, seed)
    return [y, *final, kept.reserve]


def _rnn_backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, reserve: Tensor, *arguments: Any
) -> list[Tensor]:
    call, network, problem, seed = _prepared(arguments[:-1])
    needed: list[bool] = arguments[-1]
    operands.check_gradients(call, (dy, dh_n, dc_n), reserve, needed)
    kept = kernels.kept_again(network, problem, reserve.contiguous(), call.weights, seed)
    if len(reserve) != kept.record.layout.size:
        raise RuntimeError(f"reserve must have {kept.record.layout.size} bytes; got {len(reserve)}")
    dfinal = [operands.written_out(dh_n), operands.written_out(dc_n)][: network.states]
    computed = kernels.gradients(network, problem, kept, operands.written_out(dy), dfinal, call.wanted(needed))
    return [gradient for gradient in computed if gradient is not None]


def _prepared(arguments: Sequence[Any]) -> tuple[Call, Network, Problem, int]:
    """A call whose operands fit, in memory; what runs it, its shape and its seed."""
    call = Call.of(arguments)
    network = Network.of(operands.check(call))
    operands.check_values(call)
    call = operands.in_memory(call)
    return call, network, Problem(network, call.x, call.lengths, call.batch_sizes), operands.seed_of(call)


# -- fakes ------------------------------------------------------------------------------------------------------------


def _fake_rnn(*arguments: Any) -> list[Tensor]:
    call = Call.of(arguments)
    operands.check(call)
    x, options = call.x, call.options
    sizes, batch = options.state_sizes, _sizes(call)[1]
    y = x.new_empty((*x.shape[:-1], options.directions * sizes[0]))
    return [y, *(x.new_empty((options.rows, batch, size)) for size in sizes)]


def _fake_training(*arguments: Any) -> list[Tensor]:
    call = Call.of(arguments)
    y, *final = _fake_rnn(*arguments)
    steps, batch = _sizes(call)[0], final[0].shape[1]
    engine: Any = Network.of(call.spec).engine
    size = engine.reserve_bytes(steps, batch, "gates")
    return [y, *final, call.x.new_empty((size,), dtype=torch.uint8)]


def _sizes(call: Call) -> tuple[int, int]:
    """T and N."""
    if call.batch_sizes is None:
        return call.x.shape[0], call.x.shape[1]
    steps = call.batch_sizes.shape[0]
    for state in call.states:
        if state is not None:
            return steps, state.shape[1]
    batch: Any = torch.library.get_ctx().new_dynamic_size()
    return steps, batch


def _fake_backward(dy: Any, dh_n: Any, dc_n: Any, reserve: Any, *arguments: Any) -> list[Tensor]:
    call, needed = Call.of(arguments[:-1]), arguments[-1]
    operands.check(call)
    operands.check_gradients(call, (dy, dh_n, dc_n), reserve, needed)
    return [
        like.new_empty(like.shape)
        for like, wanted in zip(call.differentiable, needed, strict=True)
        if wanted and like is not None
    ]


# -- registration -----------------------------------------------------------------------------------------------------


def _register() -> Any:
    untyped: Any = torch.library
    library = untyped.Library("fusedrnn", "DEF")
    call = f"({operands.SCHEMA}) -> Tensor[]"
    gradients = "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor reserve"
    backward = f"({gradients}, {operands.SCHEMA}, bool[] needed) -> Tensor[]"
    for name, schema, kernel, fake in (
        ("rnn", call, _rnn, _fake_rnn),
        ("forward_training", call, _rnn_training, _fake_training),
        ("backward", backward, _rnn_backward, _fake_backward),
    ):
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CPU")
        untyped.register_fake(f"fusedrnn::{name}", fake, lib=library)
    derivatives.register(library)
    library.impl("rnn", autocast.run, "AutocastCPU")
    exporting.register(torch.ops.fusedrnn.rnn.default)
    return library


# Kept: the operators go when it goes.
_LIBRARY = _register()
