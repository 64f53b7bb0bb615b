"""The operator as torch sees it: ``torch.ops.fusedrnn``, for torch.compile and torch.export.

``rnn`` is what a model calls. Where autograd records, it becomes ``forward_training``, whose last result is what
``backward`` needs. Each has a real kernel for the CPU and a fake one, which knows the shapes of the results only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedrnn.spec import RNNSpec
from fusedrnn.torch import exporting, kernels, support
from fusedrnn.torch.kernels import Network, Problem

_OPERANDS = "Tensor x, Tensor? h0, Tensor? c0, Tensor?[] weights, Tensor? lengths, Tensor? batch_sizes, Tensor? seed"
_OPTIONS = "str mode, int hidden_size, int num_layers, bool bidirectional, float dropout, int projection_size"
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


class _Operands(NamedTuple):
    """The tensors of a call, in the order of the schema."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor | None]
    lengths: Tensor | None
    batch_sizes: Tensor | None
    seed: Tensor | None

    @property
    def states(self) -> tuple[Tensor, ...] | None:
        """Those that are there."""
        return tuple(state for state in (self.h0, self.c0) if state is not None) or None


class _Options(NamedTuple):
    """What is no tensor, in the order of the schema."""

    mode: str
    hidden_size: int
    num_layers: int
    bidirectional: bool
    dropout: float
    projection_size: int

    @property
    def states(self) -> int:
        return 2 if self.mode == "lstm" else 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Features of h, and of an LSTM's c."""
        return (self.projection_size or self.hidden_size, self.hidden_size)[: self.states]


_COUNT = len(_Operands._fields)
# Places for initial states, used or not.
_STATES = 2


# -- kernels ----------------------------------------------------------------------------------------------------------


def _rnn(*arguments: Any) -> list[Tensor]:
    return _forward(_Operands(*arguments[:_COUNT]), _Options(*arguments[_COUNT:]))


def _rnn_training(*arguments: Any) -> list[Tensor]:
    return _forward_training(_Operands(*arguments[:_COUNT]), _Options(*arguments[_COUNT:]))


def _rnn_backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, reserve: Tensor, *arguments: Any
) -> list[Tensor]:
    operands, options = _Operands(*arguments[:_COUNT]), _Options(*arguments[_COUNT:-1])
    return _backward((dy, dh_n, dc_n), reserve, operands, options, arguments[-1])


def _forward(operands: _Operands, options: _Options) -> list[Tensor]:
    if options.dropout:
        return _forward_training(operands, options)[:-1]
    network, problem = _network(operands, options), _problem(operands, options)
    y, final = kernels.infer(network, problem, operands.x, operands.states, operands.weights)
    return [y, *final]


def _forward_training(operands: _Operands, options: _Options) -> list[Tensor]:
    network, problem = _network(operands, options), _problem(operands, options)
    seed = _seed(operands)
    y, final, kept = kernels.train(network, problem, operands.x, operands.states, operands.weights, seed)
    return [y, *final, kept.reserve]


def _reserve_size(operands: _Operands, options: _Options, steps: int, batch: int) -> int:
    """Bytes of the reserve; T and N may be symbols."""
    engine: Any = _network(operands, options).engine
    size: int = engine.reserve_bytes(steps, batch, "gates")
    return size


def _backward(
    gradients: Sequence[Tensor | None], reserve: Tensor, operands: _Operands, options: _Options, needed: Sequence[bool]
) -> list[Tensor]:
    network, problem, count = _network(operands, options), _problem(operands, options), options.states
    kept = kernels.kept_again(network, problem, reserve, operands.weights, _seed(operands))
    dy, *dfinal = gradients
    wanted = [*needed[: 1 + count], *needed[_STATES + 1 :]]
    found = kernels.gradients(network, problem, kept, dy, dfinal[:count], wanted)
    return [gradient for gradient, want in zip(found, wanted, strict=True) if want and gradient is not None]


def _network(operands: _Operands, options: _Options) -> Network:
    # The sizes of weights never vary: torch may take I for a constant where it thinks in symbols.
    return Network.of(_spec(*options, int(operands.x.shape[-1]), str(operands.x.dtype).removeprefix("torch.")))


def _problem(operands: _Operands, options: _Options) -> Problem:
    x, _, _, _, lengths, batch_sizes, _ = operands
    _check(operands, options)
    return Problem(_network(operands, options), x, lengths, batch_sizes)


def _check(operands: _Operands, options: _Options) -> None:
    """What no one could look at before the values were there; the layers know the rest.

    Raises:
        ValueError: Naming the argument, what was given and what was expected.
    """
    x, lengths, batch_sizes = operands.x, operands.lengths, operands.batch_sizes
    if batch_sizes is not None and not support.checked_batch_sizes(batch_sizes, x.shape[0]):
        raise ValueError(f"batch_sizes must fall from N to 1 or more, their sum {x.shape[0]}; got {batch_sizes}")
    if lengths is not None:
        support.checked_lengths(lengths, x, batch_first=False)
    for name, state, size in zip(("h0", "c0"), (operands.h0, operands.c0), options.sizes, strict=False):
        batch = int(batch_sizes[0]) if batch_sizes is not None else x.shape[1]
        expected = (options.num_layers * (2 if options.bidirectional else 1), batch, size)
        if state is not None and state.shape != expected:
            raise ValueError(f"{name} must have shape {expected}; got {tuple(state.shape)}")


def _seed(operands: _Operands) -> int:
    return 0 if operands.seed is None else int(operands.seed)


@functools.lru_cache(maxsize=64)
def _spec(
    mode: str, hidden_size: int, num_layers: int, bidirectional: bool, dropout: float, projection_size: int,
    input_size: int, dtype: str,
) -> RNNSpec:  # fmt: skip
    return RNNSpec(
        mode, input_size, hidden_size, num_layers, bidirectional, dropout, projection_size or None, dtype
    )


# -- fakes ------------------------------------------------------------------------------------------------------------


def _fake_rnn(*arguments: Any) -> list[Tensor]:
    operands, options = _Operands(*arguments[:_COUNT]), _Options(*arguments[_COUNT:])
    x, directions = operands.x, 2 if options.bidirectional else 1
    y = x.new_empty((*x.shape[:-1], directions * options.sizes[0]))
    rows, batch = options.num_layers * directions, _sizes(operands)[1]
    return [y, *(x.new_empty((rows, batch, size)) for size in options.sizes)]


def _fake_training(*arguments: Any) -> list[Tensor]:
    operands, options = _Operands(*arguments[:_COUNT]), _Options(*arguments[_COUNT:])
    y, *final = _fake_rnn(*arguments)
    steps, batch = _sizes(operands)[0], final[0].shape[1]
    size = _reserve_size(operands, options, steps, batch)
    return [y, *final, operands.x.new_empty((size,), dtype=torch.uint8)]


def _sizes(operands: _Operands) -> tuple[int, int]:
    """T and N."""
    if operands.batch_sizes is None:
        return operands.x.shape[0], operands.x.shape[1]
    steps = operands.batch_sizes.shape[0]
    if operands.h0 is not None:
        return steps, operands.h0.shape[1]
    batch: Any = torch.library.get_ctx().new_dynamic_size()
    return steps, batch


def _fake_backward(dy: Any, dh_n: Any, dc_n: Any, reserve: Any, *arguments: Any) -> list[Tensor]:
    x, h0, c0, weights = arguments[:4]
    return [
        like.new_empty(like.shape)
        for like, wanted in zip((x, h0, c0, *weights), arguments[-1], strict=True)
        if wanted and like is not None
    ]


# -- autograd ---------------------------------------------------------------------------------------------------------


def _autograd(*arguments: Any) -> list[Tensor]:
    operands = _Operands(*arguments[:_COUNT])
    differentiable = (operands.x, operands.h0, operands.c0, *operands.weights)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        recorded: Any = _Recorded.apply
        return list(recorded(_Options(*arguments[_COUNT:]), operands[4:], *differentiable))
    with torch._C._AutoDispatchBelowAutograd():
        results: list[Tensor] = torch.ops.fusedrnn.rnn(*arguments)
    return results


class _Recorded(torch.autograd.Function):
    """A call in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, options: _Options, others: Sequence[Tensor | None], *tensors: Tensor | None) -> Any:
        x, h0, c0, *weights = tensors
        with torch._C._AutoDispatchBelowAutograd():
            *results, reserve = torch.ops.fusedrnn.forward_training(x, h0, c0, weights, *others, *options)
        ctx.save_for_backward(reserve, *others, *tensors)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        needed = ctx.needs_input_grad[2:]
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        reserve, lengths, batch_sizes, seed, x, h0, c0, *weights = ctx.saved_tensors
        dy, dh_n, dc_n = (*gradients, None)[:3]
        found = torch.ops.fusedrnn.backward(
            dy, dh_n, dc_n, reserve, x, h0, c0, weights, lengths, batch_sizes, seed, *ctx.options, list(needed)
        )
        gradients_in = iter(found)
        return (None, None, *(next(gradients_in) if wanted else None for wanted in needed))


# -- registration -----------------------------------------------------------------------------------------------------


def _register() -> Any:
    untyped: Any = torch.library
    library = untyped.Library("fusedrnn", "DEF")
    call = f"({_OPERANDS}, {_OPTIONS}) -> Tensor[]"
    gradients = "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor reserve"
    backward = f"({gradients}, {_OPERANDS}, {_OPTIONS}, bool[] needed) -> Tensor[]"
    for name, schema, kernel, fake in (
        ("rnn", call, _rnn, _fake_rnn),
        ("forward_training", call, _rnn_training, _fake_training),
        ("backward", backward, _rnn_backward, _fake_backward),
    ):
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CPU")
        untyped.register_fake(f"fusedrnn::{name}", fake, lib=library)
    library.impl("rnn", _autograd, "Autograd")
    exporting.register(torch.ops.fusedrnn.rnn.default)
    return library


# Kept: the operators go when it goes.
_LIBRARY = _register()
