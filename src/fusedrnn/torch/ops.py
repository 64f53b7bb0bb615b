"""The operator as torch sees it: ``torch.ops.fusedrnn``, for torch.compile and torch.export.

``rnn`` is what a model calls. Where autograd records, it becomes ``forward_training``, whose last result is what
``backward`` needs. Each has a real kernel for the CPU and a fake one, which knows the shapes of the results only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedrnn.operator import RNNOp
from fusedrnn.spec import RNNSpec
from fusedrnn.torch import exporting

_OPERANDS = "Tensor x, Tensor? h0, Tensor? c0, Tensor?[] weights, Tensor? lengths, Tensor? batch_sizes, Tensor? seed"
_OPTIONS = "str mode, int hidden_size, int num_layers, bool bidirectional, float dropout"
# Seeds are below this: what fits int64.
_SEEDS = 2**63 - 1


class Network(Protocol):
    """What :func:`run` reads of a network's description; an :class:`fusedrnn.RNNSpec` has it."""

    @property
    def mode(self) -> str:
        """One of ``"rnn_relu"``, ``"rnn_tanh"``, ``"lstm"``, ``"gru"``."""

    @property
    def hidden_size(self) -> int:
        """H."""

    @property
    def num_layers(self) -> int:
        """L."""

    @property
    def bidirectional(self) -> bool:
        """Whether D is 2."""

    @property
    def dropout(self) -> float:
        """Probability of dropping an element between layers, in [0, 1)."""


def run(
    spec: Network,
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
        spec: What to run; its dropout counts, in inference too.
        x: Input (T, N, I), float32 or float64, any strides; with ``batch_sizes`` the data of a packed sequence
            (rows, I).
        states: Initial states ``(h0,)`` or ``(h0, c0)``, each (L·D, N, H); None for zeros. Under torch.compile a
            packed sequence without them breaks the graph: only they tell N before ``batch_sizes`` is read.
        weights: For each layer, for each direction: i2h weight, h2h weight, i2h bias, h2h bias; None for no bias.
        lengths: Valid steps of each sequence, int64 (N,), on the CPU; None for T everywhere.
        batch_sizes: Of a packed sequence: how many sequences have each step, int64 (T,), on the CPU.
        seed: What dropout depends on, int64, of no dimensions; None to draw one, in the graph, if anything is dropped.

    Returns:
        The output (T, N, D·H), or packed (rows, D·H); and the final states, a tuple like ``states``.
    """
    dropout = spec.dropout if spec.num_layers > 1 else 0.0
    if dropout and seed is None:
        seed = torch.randint(_SEEDS, (), dtype=torch.int64, device="cpu")
    h0, c0 = (*(states or ()), None, None)[:2]
    y, *final = torch.ops.fusedrnn.rnn(
        x, h0, c0, list(weights), lengths, batch_sizes, seed if dropout else None,
        spec.mode, spec.hidden_size, spec.num_layers, spec.bidirectional, dropout,
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


class _Options(NamedTuple):
    """What is no tensor, in the order of the schema."""

    mode: str
    hidden_size: int
    num_layers: int
    bidirectional: bool
    dropout: float

    @property
    def states(self) -> int:
        return 2 if self.mode == "lstm" else 1


_COUNT = len(_Operands._fields)


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
    return _Problem(operands, options).forward(training=options.dropout > 0)[0]


def _forward_training(operands: _Operands, options: _Options) -> list[Tensor]:
    return [*_forward(operands, options), operands.x.new_empty(_reserve_size(operands, options), dtype=torch.uint8)]


def _reserve_size(operands: _Operands, options: _Options) -> Any:
    return 0


def _backward(
    gradients: Sequence[Tensor | None], reserve: Tensor, operands: _Operands, options: _Options, needed: Sequence[bool]
) -> list[Tensor]:
    return _Problem(operands, options).backward(gradients, needed)


class _Problem:
    """A call on NumPy arrays."""

    def __init__(self, operands: _Operands, options: _Options) -> None:
        self.operands, self.options = operands, options
        x = _array(operands.x)
        self.spec = _spec(*options, x.shape[-1], x.dtype.name)
        self.lengths = None if operands.lengths is None else _array(operands.lengths)
        self.alive: NDArray[np.bool_] | None = None
        if operands.batch_sizes is not None:
            sizes = _array(operands.batch_sizes)
            self.alive = np.arange(sizes[0]) < sizes[:, None]
            self.lengths = self.alive.sum(0)
        self.x = self.pad(x)
        flat = np.zeros(self.spec.layout.size, x.dtype)
        self.entries = list(zip(self.spec.layout.by_pass, operands.weights, strict=True))
        for entry, weight in self.entries:
            if weight is not None:
                self.spec.layout.view(flat, entry.layer, entry.direction, entry.kind)[...] = _array(weight)
        self.params = flat

    def pad(self, data: NDArray[Any]) -> NDArray[Any]:
        if self.alive is None:
            return data
        padded = np.zeros((*self.alive.shape, data.shape[-1]), data.dtype)
        padded[self.alive] = data
        return padded

    def pack(self, padded: NDArray[Any]) -> NDArray[Any]:
        return padded if self.alive is None else padded[self.alive]

    def forward(self, training: bool) -> tuple[list[Tensor], Any]:
        states = [_array(state) for state in self.operands[1:3] if state is not None] or None
        seed = None if self.operands.seed is None else int(self.operands.seed)
        y, final, reserve = RNNOp.get(self.spec).forward(
            self.x, self.params, states, training=training, lengths=self.lengths, seed=seed
        )
        return [torch.from_numpy(array) for array in (self.pack(y), *final)], reserve

    def backward(self, gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
        reserve = self.forward(training=True)[1]
        dy, *dstates = (None if gradient is None else _array(gradient) for gradient in gradients)
        dstates = dstates[: self.options.states]
        given = None if all(gradient is None for gradient in dstates) else dstates
        dx, dparams, dinitial = RNNOp.get(self.spec).backward(None if dy is None else self.pad(dy), given, reserve)
        views = [self.spec.layout.view(dparams, e.layer, e.direction, e.kind).copy() for e, _ in self.entries]
        found = [self.pack(dx), *dinitial, *([None] if len(dinitial) == 1 else []), *views]
        return [torch.from_numpy(array) for array, wanted in zip(found, needed, strict=True) if wanted]


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().numpy()
    return array


@functools.lru_cache(maxsize=64)
def _spec(
    mode: str, hidden_size: int, num_layers: int, bidirectional: bool, dropout: float, input_size: int, dtype: str
) -> RNNSpec:
    return RNNSpec(mode, input_size, hidden_size, num_layers, bidirectional, dropout, dtype=dtype)


# -- fakes ------------------------------------------------------------------------------------------------------------


def _fake_rnn(*arguments: Any) -> list[Tensor]:
    operands, options = _Operands(*arguments[:_COUNT]), _Options(*arguments[_COUNT:])
    x, h0 = operands.x, operands.h0
    directions = 2 if options.bidirectional else 1
    if operands.batch_sizes is None:
        batch = x.shape[1]
    elif h0 is not None:
        batch = h0.shape[1]
    else:
        batch = torch.library.get_ctx().new_dynamic_size()
    y = x.new_empty((*x.shape[:-1], directions * options.hidden_size))
    state = (options.num_layers * directions, batch, options.hidden_size)
    return [y, *(x.new_empty(state) for _ in range(options.states))]


def _fake_training(*arguments: Any) -> list[Tensor]:
    operands, options = _Operands(*arguments[:_COUNT]), _Options(*arguments[_COUNT:])
    return [*_fake_rnn(*arguments), operands.x.new_empty((_reserve_size(operands, options),), dtype=torch.uint8)]


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
        return list(_Recorded.apply(_Options(*arguments[_COUNT:]), operands[4:], *differentiable))
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


def _register() -> torch.library.Library:
    library = torch.library.Library("fusedrnn", "DEF")
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
        torch.library.register_fake(f"fusedrnn::{name}", fake, lib=library)
    library.impl("rnn", _autograd, "Autograd")
    exporting.register(torch.ops.fusedrnn.rnn.default)
    return library


# Kept: the operators go when it goes.
_LIBRARY = _register()
