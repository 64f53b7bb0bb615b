"""A call of the operators in torch's registry, and the checks that all their operands fit each other.

The operators are public as soon as a graph holds them: a program may be moved to another dtype, and anyone may call
``torch.ops.fusedrnn``. Kernels work by address, so that each of them checks every operand first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from fusedrnn.spec import RNNSpec
from fusedrnn.torch import support
from torch import Tensor

SCHEMA = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor?[] weights, Tensor? lengths, Tensor? batch_sizes, Tensor? seed, "
    "str mode, int hidden_size, int num_layers, bool bidirectional, float dropout, int projection_size"
)
STATES = ("h0", "c0")
_GRADIENTS = ("dy", "dh_n", "dc_n")
_DTYPE_NAMES = {torch.float32: "float32", torch.float64: "float64"}


class Options(NamedTuple):
    """The arguments that are no tensors, in the order of the schema."""

    mode: str
    hidden_size: int
    num_layers: int
    bidirectional: bool
    dropout: float
    projection_size: int

    @property
    def directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    @property
    def rows(self) -> int:
        """L·D."""
        return self.num_layers * self.directions

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Features of h, and of an LSTM's c."""
        sizes = self.projection_size or self.hidden_size, self.hidden_size
        return sizes if self.mode == "lstm" else sizes[:1]


class Call(NamedTuple):
    """The tensors of a call, in the order of the schema, and its options."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor | None]
    lengths: Tensor | None
    batch_sizes: Tensor | None
    seed: Tensor | None
    options: Options

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> Call:
        """The call with these arguments of the schema."""
        return cls._make((*arguments[:_TENSORS], Options(*arguments[_TENSORS:])))

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        """h0, and c0 of an LSTM; None for zeros."""
        return (self.h0, self.c0)[: len(self.options.state_sizes)]

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The operands that may have a gradient: x, h0, c0, then the weights."""
        return self.x, self.h0, self.c0, *self.weights

    def wanted(self, needed: Sequence[bool]) -> list[bool]:
        """Whether x, each state that the mode has and each weight is there and needs a gradient."""
        return [
            want and operand is not None
            for index, (want, operand) in enumerate(zip(needed, self.differentiable, strict=True))
            if index <= len(self.states) or index > len(STATES)
        ]

    @property
    def spec(self) -> RNNSpec:
        """What the options and the input describe.

        Raises:
            ValueError: If there is no such network.
        """
        return self.signature[0]

    @property
    def signature(self) -> tuple[RNNSpec, tuple[torch.Size, ...]]:
        """The spec, and the shapes of its weights in order."""
        return _signature(self.options, int(self.x.shape[-1]), self.x.dtype)


_TENSORS = len(Call._fields) - 1


@functools.lru_cache(maxsize=64)
def _signature(options: Options, input_size: int, dtype: torch.dtype) -> tuple[RNNSpec, tuple[torch.Size, ...]]:
    mode, hidden_size, num_layers, bidirectional, dropout, projection_size = options
    spec = RNNSpec(
        mode, input_size, hidden_size, num_layers, bidirectional, dropout, projection_size or None, _DTYPE_NAMES[dtype]
    )
    return spec, tuple(torch.Size(entry.shape) for entry in spec.layout.by_layer_direction)


def check(call: Call) -> RNNSpec:
    """What the call describes; operands whose dtype, shape, device or presence does not fit are refused.

    That is all that is known without values.
    Sizes that are symbols, in a graph that is being made, are left to the call.

    Raises:
        RuntimeError: Naming the operand, what was given and what was expected.
        ValueError: If the options describe no network; the same.
    """
    x, options = call.x, call.options
    dims = 3 if call.batch_sizes is None else 2
    if x.dim() != dims:
        raise RuntimeError(f"x must have {dims} dimensions{' if packed' if dims == 2 else ''}; got shape {_text(x)}")
    if x.dtype not in _DTYPE_NAMES:
        raise RuntimeError(f"x must be of dtype torch.float32 or torch.float64; got {x.dtype}")
    if call.lengths is not None and call.batch_sizes is not None:
        raise ValueError("lengths must be None for a packed sequence, which has batch_sizes")
    if options.mode != "lstm" and call.c0 is not None:
        raise RuntimeError(f"c0 must be None in mode {options.mode!r}; got shape {_text(call.c0)}")
    spec, shapes = call.signature  # refuses options that no network has, before what follows from them
    number = options.rows * (5 if options.projection_size else 4)
    if len(call.weights) != number:
        raise RuntimeError(f"weights must be {number}; got {len(call.weights)}")
    dtype, device = x.dtype, x.device
    for index, (weight, shape) in enumerate(zip(call.weights, shapes, strict=True)):
        if weight is not None:
            if weight.dtype is not dtype or weight.device != device or weight.shape != shape:
                _refuse(f"weights[{index}]", weight, shape, x)
        elif len(shape) == 2:
            raise RuntimeError(f"weights[{index}] must have shape {tuple(shape)}; got None")
    batch = x.shape[1] if call.batch_sizes is None else None
    for name, state, size in zip(STATES, call.states, options.state_sizes, strict=False):
        if state is not None:
            check_tensor(name, state, (options.rows, batch, size), x)
    return spec


def check_gradients(
    call: Call, gradients: Sequence[Tensor | None], reserve: Tensor, needed: Sequence[bool]
) -> None:
    """The same for what the operator ``backward`` takes beside the operands of the call.

    Args:
        call: The call that was.
        gradients: dy, dh_n and dc_n; None for zeros.
        reserve: What the call in training returned last.
        needed: Which of ``call.differentiable`` need a gradient.

    Raises:
        RuntimeError: As :func:`check` raises it.
    """
    x, options = call.x, call.options
    batch = x.shape[1] if call.batch_sizes is None else None
    sizes = options.state_sizes
    expected = [(*x.shape[:-1], options.directions * sizes[0]), *((options.rows, batch, size) for size in sizes)]
    for index, (name, gradient) in enumerate(zip(_GRADIENTS, gradients, strict=True)):
        if gradient is None:
            continue
        if index >= len(expected):
            raise RuntimeError(f"{name} must be None in mode {options.mode!r}; got shape {_text(gradient)}")
        check_tensor(name, gradient, expected[index], x)
    if reserve.dtype is not torch.uint8 or reserve.dim() != 1:
        raise RuntimeError(f"reserve must be bytes of one dimension; got {reserve.dtype} of shape {_text(reserve)}")
    if len(needed) != len(call.differentiable):
        raise RuntimeError(f"needed must have {len(call.differentiable)} entries; got {len(needed)}")


def check_tensor(name: str, tensor: Tensor, shape: Sequence[Any], x: Tensor) -> None:
    """Refuse a tensor that has not that shape, None for a size that is not known, or not the dtype and device of x.

    Raises:
        RuntimeError: Naming the tensor, what was given and what was expected.
    """
    fits = tensor.dim() == len(shape) and not any(
        isinstance(size, int) and isinstance(expected, int) and size != expected
        for size, expected in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype is not x.dtype or tensor.device != x.device:
        _refuse(name, tensor, shape, x)


def _refuse(name: str, tensor: Tensor, shape: Sequence[Any], x: Tensor) -> None:
    expected = ", ".join("N" if size is None else str(size) for size in shape)
    raise RuntimeError(
        f"{name} must have shape ({expected}), dtype {x.dtype} and device {x.device}, as x has; "
        f"got shape {_text(tensor)}, {tensor.dtype}, {tensor.device}"
    )


def _text(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_values(call: Call) -> None:
    """Refuse empty input, and lengths, batch sizes and seeds whose values no call can have.

    Raises:
        TypeError: If lengths are not integers.
        ValueError: Naming the argument, what was given and what was expected.
        RuntimeError: If the input is empty, or a state has not the N of a packed sequence.
    """
    x, options = call.x, call.options
    if not x.numel():
        raise RuntimeError(f"x must not be empty; got shape {_text(x)}")
    if call.lengths is not None:
        support.checked_lengths(call.lengths, x, batch_first=False)
    if call.batch_sizes is not None:
        if not support.checked_batch_sizes(call.batch_sizes, x.shape[0]):
            raise ValueError(
                f"batch_sizes must fall from N to 1 or more, their sum {x.shape[0]}; got {call.batch_sizes}"
            )
        batch = int(call.batch_sizes[0])
        for name, state, size in zip(STATES, call.states, options.state_sizes, strict=False):
            if state is not None:
                check_tensor(name, state, (options.rows, batch, size), x)
    seed_of(call)


def seed_of(call: Call) -> int:
    """What dropout depends on; 0 where nothing is dropped.

    Raises:
        ValueError: If there must be one and it is missing, or it is none.
    """
    seed = call.seed
    if not call.options.dropout or call.options.num_layers == 1:
        return 0
    if seed is None or seed.dtype is not torch.int64 or seed.dim():
        got = None if seed is None else f"{seed.dtype} of shape {_text(seed)}"
        raise ValueError(f"seed must be an int64 tensor of no dimensions where dropout is not 0; got {got}")
    value = int(seed)
    if value < 0:
        raise ValueError(f"seed must be from 0 to 2**63 - 1; got {value}")
    return value


def in_memory(call: Call) -> Call:
    """The same call with operands whose values lie in memory as kernels read them: weights contiguous."""
    weights = [None if weight is None else written_out(weight).contiguous() for weight in call.weights]
    return call._replace(x=written_out(call.x), h0=written_out(call.h0), c0=written_out(call.c0), weights=weights)


def written_out(tensor: Any) -> Any:
    """The tensor, or None, itself; a copy of views that negate and of zeros that take no memory."""
    if tensor is None:
        return None
    return torch.zeros_like(tensor) if tensor._is_zerotensor() else tensor.resolve_neg()
