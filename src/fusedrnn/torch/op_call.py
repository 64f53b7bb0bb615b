"""The arguments of the operators in torch's registry, and checks that the operands match.

The operators are public, since graphs hold them: a program may be moved to another dtype, and any code may call
``torch.ops.fusedrnn``. The kernels take addresses, so every operand is checked first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn.spec import RNNSpec
from fusedrnn.torch.cell_references import cell_of
from fusedrnn.torch.eligibility import DTYPE_NAMES, are_batch_sizes, checked_lengths
from fusedrnn.torch.network import Tensors
from fusedrnn.torch.op_operands import check_tensor, has_shape, mismatch, name_of, shape_of

ARGUMENTS = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor?[] weights, Tensor? lengths, Tensor? batch_sizes, Tensor? seed, "
    "str mode, int hidden_size, int num_layers, bool bidirectional, float dropout, int projection_size"
)
# These are last and have defaults, so that programs still run that were exported before the arguments existed.
LATER_ARGUMENTS = (
    "str? compute=None, Tensor[]? more_states=None, Tensor? resets=None, bool all_states=False, str? residual=None, "
    "float input_dropout=0.0, Tensor[]? reset_states=None"
)
SCHEMA = f"{ARGUMENTS}, {LATER_ARGUMENTS}"
_STATES = ("h0", "c0")


class CallOptions(NamedTuple):
    """The arguments of a call that are no tensors, and the numbers of further states and of states after resets."""

    mode: str
    hidden_size: int
    num_layers: int
    bidirectional: bool
    dropout: float
    projection_size: int
    compute: str | None
    all_states: bool
    residual: str | None
    input_dropout: float
    num_more_states: int
    num_reset_states: int


class OpCall(NamedTuple):
    """The arguments of a call, in the order of the schema."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: Tensors
    lengths: Tensor | None
    batch_sizes: Tensor | None
    seed: Tensor | None
    mode: str
    hidden_size: int
    num_layers: int
    bidirectional: bool
    dropout: float
    projection_size: int
    # torch's dispatcher drops trailing arguments that have their defaults.
    compute: str | None = None
    more_states: Tensors | None = None
    resets: Tensor | None = None
    all_states: bool = False
    residual: str | None = None
    input_dropout: float = 0.0
    reset_states: Tensors | None = None

    @classmethod
    def of(cls, tensors: Tensors, others: Tensors, options: CallOptions) -> OpCall:
        """The call with ``tensors`` as :attr:`differentiable`, and with these :attr:`others` and :attr:`options`."""
        first_reset = 3 + options.num_more_states
        first_weight = first_reset + options.num_reset_states
        *varlen_and_seed, resets = others
        arguments: list[Any] = [*tensors[:3], list(tensors[first_weight:]), *varlen_and_seed]
        fields: dict[str, Any] = {name: getattr(options, name) for name in _PLAIN_OPTIONS}
        fields["more_states"] = list(tensors[3:first_reset]) or None
        fields["reset_states"] = list(tensors[first_reset:first_weight]) or None
        return cls(*arguments, **fields, resets=resets)  # type: ignore[misc]

    @property
    def others(self) -> Tensors:
        """Its tensors that have no gradients: lengths, batch sizes, the seed and resets."""
        return self.lengths, self.batch_sizes, self.seed, self.resets

    @property
    def options(self) -> CallOptions:
        """Its arguments that are no tensors."""
        fields: list[Any] = [getattr(self, name) for name in _PLAIN_OPTIONS]
        fields += len(self.more_states or ()), len(self.reset_states or ())
        return CallOptions(*fields)

    @property
    def spec(self) -> RNNSpec:
        """The network that the options and the input describe.

        Raises:
            ValueError: If there is no such network.
        """
        return _spec(
            self.mode, self.hidden_size, self.num_layers, self.bidirectional, self.dropout, self.projection_size,
            int(self.x.shape[-1]), self.x.dtype, self.compute, self.residual, self.input_dropout,
        )  # fmt: skip

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        """The initial states, and then the states after resets if there are any."""
        return *self.initial_states, *(self.reset_states or ())

    @property
    def initial_states(self) -> tuple[Tensor | None, ...]:
        """h0 and the further states of the mode; None for zeros."""
        num_states = _num_states(self.mode)
        states = self.h0, self.c0, *(self.more_states or (None,) * (num_states - len(_STATES)))
        return states[:num_states]

    @property
    def all_state_shapes(self) -> list[tuple[Any, ...]]:
        """The shapes of the states of every step that the output does not hold, if they are results."""
        features = self.spec.other_state_features if self.all_states else ()
        return [(*self.x.shape[:-1], size) for size in features]

    @property
    def batch(self) -> Any:
        """N; None for a packed sequence, whose N is the value of a tensor."""
        return self.x.shape[1] if self.batch_sizes is None else None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The operands that may have a gradient: x, h0, c0, further states, states after resets, then the weights."""
        return self.x, self.h0, self.c0, *(self.more_states or ()), *(self.reset_states or ()), *self.weights

    def grads_needed(self, needed: Sequence[bool]) -> list[bool]:
        """Whether x, each state of this mode and each weight is present and needs a gradient."""
        flags = [need and operand is not None for need, operand in zip(needed, self.differentiable, strict=True)]
        num_states, first_reset = _num_states(self.mode), 3 + len(self.more_states or ())
        states = [*flags[1:first_reset], *[False] * num_states]  # further states may be absent, which stands for zeros
        return [flags[0], *states[:num_states], *flags[first_reset:]]


_PLAIN_OPTIONS = CallOptions._fields[:-2]
"""Those options that are arguments of a call. The other options are numbers of states."""


@functools.lru_cache(maxsize=256)
def _num_states(mode: str) -> int:
    cell = cell_of(mode)
    size = 1 if isinstance(cell, str) else cell.heads
    return len(RNNSpec(cell, size, size).state_names)


@functools.lru_cache(maxsize=64)
def _spec(
    mode: str, hidden_size: int, num_layers: int, bidirectional: bool, dropout: float, projection_size: int,
    input_size: int, dtype: torch.dtype, compute: str | None, residual: str | None, input_dropout: float,
) -> RNNSpec:  # fmt: skip
    return RNNSpec(
        cell_of(mode), input_size, hidden_size, num_layers, bidirectional, dropout, projection_size or None,
        DTYPE_NAMES[dtype], compute=compute, residual=residual, input_dropout=input_dropout,
    )  # fmt: skip


def checked(*arguments: Any) -> OpCall:
    """The call with these arguments, after checking dtype, shape, device and presence of each; values are not read.

    While a graph is traced, sizes may be symbolic; these are checked when the graph runs.

    Raises:
        RuntimeError: If an operand does not match; the message names it, what was given and what was expected.
        ValueError: If the options describe no network; the message is of the same form.
    """
    call = OpCall(*arguments)
    x = call.x
    dims = 3 if call.batch_sizes is None else 2
    if x.dim() != dims:
        raise RuntimeError(f"x must have {dims} dimensions{' if packed' if dims == 2 else ''}; got shape {shape_of(x)}")
    if x.dtype not in DTYPE_NAMES:
        raise RuntimeError(f"x must be of dtype torch.float32 or torch.float64; got {x.dtype}")
    if call.lengths is not None and call.batch_sizes is not None:
        raise ValueError("lengths must be None for a packed sequence, which has batch_sizes")
    spec = call.spec
    num_more = max(0, len(spec.state_names) - len(_STATES))
    if len(spec.state_names) < len(_STATES) and call.c0 is not None:
        raise RuntimeError(f"c0 must be None in mode {spec.mode_name!r}; got shape {shape_of(call.c0)}")
    if len(call.more_states or ()) not in (0, num_more):
        raise RuntimeError(f"more_states must be {num_more}, or None for zeros; got {len(call.more_states or ())}")
    parameters = spec.layout.by_layer_direction
    if len(call.weights) != len(parameters):
        raise RuntimeError(f"weights must be {len(parameters)}; got {len(call.weights)}")
    for index, (weight, parameter) in enumerate(zip(call.weights, parameters, strict=True)):
        if weight is not None:
            if weight.dtype is not x.dtype or weight.device != x.device or weight.shape != parameter.shape:
                raise mismatch(f"weights[{index}]", weight, parameter.shape, x)
        elif len(parameter.shape) == 2:
            raise RuntimeError(f"weights[{index}] must have shape {parameter.shape}; got None")
    _check_states(call, call.batch)
    _check_resets(call, call.batch)
    return call


def _check_states(call: OpCall, batch: Any) -> None:
    shapes = call.spec.state_shape(batch)
    for index, (state, shape) in enumerate(zip(call.initial_states, shapes, strict=True)):
        if state is not None:
            check_tensor(name_of(_STATES, "more_states", index), state, shape, call.x)
    if call.reset_states is None:
        return
    if call.resets is None:
        raise RuntimeError("reset_states must be None without resets")
    if len(call.reset_states) != len(shapes):
        raise RuntimeError(f"reset_states must be {len(shapes)}, or None for zeros; got {len(call.reset_states)}")
    for index, (replacing, shape) in enumerate(zip(call.reset_states, shapes, strict=True)):
        assert replacing is not None
        check_tensor(f"reset_states[{index}]", replacing, shape, call.x)


def _check_resets(call: OpCall, batch: Any) -> None:
    if call.resets is None:
        return
    shape = (call.x if call.batch_sizes is None else call.batch_sizes).shape[0], batch
    if not has_shape(call.resets, shape) or call.resets.dtype is not torch.bool or call.resets.device != call.x.device:
        raise mismatch("resets", call.resets, shape, call.x, torch.bool)


def check_values(call: OpCall) -> int:
    """Check what depends on values: that the input is not empty, the lengths, the batch sizes and the seed.

    Returns:
        The seed of dropout; 0 if nothing is dropped.

    Raises:
        TypeError: If lengths are not integers.
        ValueError: If an argument has a wrong value, or the seed is missing; the message names the argument, what was
            given and what was expected.
        RuntimeError: If the input is empty, or a state does not have the N of a packed sequence.
    """
    x = call.x
    if not x.numel():
        raise RuntimeError(f"x must not be empty; got shape {shape_of(x)}")
    if call.lengths is not None:
        checked_lengths(call.lengths, x, batch_first=False)
    if call.batch_sizes is not None:
        if not are_batch_sizes(call.batch_sizes, x.shape[0]):
            raise ValueError(
                f"batch_sizes must fall from N to 1 or more, their sum {x.shape[0]}; got {call.batch_sizes}"
            )
        _check_states(call, int(call.batch_sizes[0]))
        _check_resets(call, int(call.batch_sizes[0]))
    return _checked_seed(call.seed) if call.spec.drops else 0


def _checked_seed(seed: Tensor | None) -> int:
    if seed is None or seed.dtype is not torch.int64 or seed.dim():
        got = None if seed is None else f"{seed.dtype} of shape {shape_of(seed)}"
        raise ValueError(f"seed must be an int64 tensor of no dimensions where something is dropped; got {got}")
    value = int(seed)
    if value < 0:
        raise ValueError(f"seed must be from 0 to 2**63 - 1; got {value}")
    return value


def materialized(tensor: Any) -> Any:
    """A tensor or None, unchanged; but a copy of a lazily negated tensor, or of zeros without memory."""
    if tensor is None:
        return None
    return torch.zeros_like(tensor) if tensor._is_zerotensor() else tensor.resolve_neg()
