"""A spec with the executor that runs it, and the shape of one call."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedrnn.engines.cpu.kernels.lowered_cell import STATE_LETTERS
from fusedrnn.engines.cpu.launch.kernel_args import state_symbols
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.spec import RNNSpec
from fusedrnn.torch.saved_operands import saved_operands

Tensors = Sequence[Tensor | None]
Results = tuple[Any, tuple[Tensor, ...]]
"""The output, None for a cell, and the final states."""

_MAX_NETWORKS = 256
_MAX_PATTERNS = 64
# New tensors are made like these, which are created at import: a network may be created while new tensors are fake.
with torch.inference_mode(False):
    _LIKE = {
        dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64, torch.uint8)
    }


@functools.lru_cache(maxsize=1024)
def template(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor without memory of its own; ``torch.empty_like`` of it takes half the time of ``new_empty(shape)``."""
    # A tensor of one element would pass its strides on.
    like = _LIKE[dtype]
    return like.new_empty(shape) if math.prod(shape) == 1 else like.expand(shape)


class Network:
    """A spec, its executor, and properties of the spec that calls need.

    Attributes:
        item: The number of bytes of an element.
        state_sizes: Features of each state.
        state_rows: L·D.
        weight_shapes: The shapes of the weights, in the operator's order.
        adjacent_weights: Ranges of weights, as first and last + 1, whose gradients kernels write to adjacent memory:
            the vectors and the scalars of a user cell. Packing takes an address for each weight.
        like: A tensor whose ``new_empty`` creates others.
        saved_operands: The cached function that returns the numbers of the operands of a call that are saved, and of
            those that are not; see :func:`fusedrnn.torch.saved_operands.saved_operands`.
    """

    _cache: dict[int, Network] = {}  # noqa: RUF012 -- shared by all instances

    def __init__(self, spec: RNNSpec) -> None:
        self.spec = spec
        self.executor = RNNOp.get(spec).by_address()
        self.drops = spec.drops
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.item = self.dtype.itemsize
        self.state_sizes = [spec.size_of(name) for name in spec.state_names]
        self.num_states = len(self.state_sizes)
        self.state_rows = spec.num_layers * spec.num_directions
        self.output_size = spec.output_size
        self.weight_shapes = [entry.shape for entry in spec.layout.by_layer_direction]
        self.adjacent_weights = list(self._adjacent_weights())
        self.like = _LIKE[self.dtype]
        self.saved_operands = functools.lru_cache(_MAX_PATTERNS)(self._saved_operands)

    def _adjacent_weights(self) -> Iterator[tuple[int, int]]:
        spec, kinds = self.spec, self.spec.layout.kinds
        for group in (spec.vector_kinds, spec.scalar_kinds):
            if len(group) > 1:
                for begin in range(0, self.state_rows * len(kinds), len(kinds)):
                    first = begin + kinds.index(group[0])
                    yield first, first + len(group)

    def _saved_operands(
        self, needs_grad: tuple[bool, ...], several_steps: bool, under_autocast: bool = False
    ) -> tuple[list[int], list[int]]:
        flags = saved_operands(self.spec, needs_grad, several_steps, under_autocast)
        return [i for i, save in enumerate(flags) if save], [i for i, save in enumerate(flags) if not save]

    def state_symbols(self, form: str) -> list[str]:
        """The symbols of kernel arguments for the states, such as h0 and c0 in the form ``"{}0"``."""
        return state_symbols(STATE_LETTERS[: self.num_states], form)

    def state_addresses(self, states: Tensors) -> tuple[int, ...]:
        """The addresses of states, as the executor takes them; 0 for a missing state."""
        addresses = [0 if state is None else state.data_ptr() for state in states]
        return (*addresses, *(0,) * (max(2, self.num_states) - len(addresses)))

    @classmethod
    def of(cls, spec: RNNSpec) -> Network:
        """The network of this spec, cached by the spec's identity."""
        network = cls._cache.get(id(spec))
        if network is None:
            if len(cls._cache) >= _MAX_NETWORKS:
                cls._cache.clear()
            network = cls._cache[id(spec)] = cls(spec)
        return network


def check_trainable(spec: RNNSpec) -> None:
    """Refuse a format without gradients.

    Raises:
        RuntimeError: If the format has no gradients; the message names it, and says how to call without gradients.
    """
    if not spec.is_trainable:
        raise RuntimeError(
            f"compute={spec.compute!r} is for inference only: call it under torch.no_grad() or torch.inference_mode(), "
            "or with parameters, input and states that require no gradient"
        )


class CallShape:
    """T and N of one call of a network, its sequence lengths, and the shapes of its states and its output.

    Args:
        network: The network that runs.
        x: Input (T, N, I), or (rows, I) with ``batch_sizes``; for a cell, (N, I) or (I,).
        lengths: Valid steps of each sequence, int64 (N,); None for T everywhere.
        batch_sizes: The batch sizes of a packed sequence, int64 (T,).
        resets: Where sequences begin anew, bools (T, N); None for nowhere. With resets, the states of a call are the
            initial states followed by the states after resets, or the initial states alone if resets are to zeros.
        all_states: Whether the states of every step of the last layer that the output does not hold are results, after
            the final states.
        is_cell: Whether it is a step of a cell: states are (N, size) or (size,), and there is no other output.

    Attributes:
        resets: A copy of the marks, in the executor's form; None for none.
        backwards: The prepared backward calls of a call that repeats, see :mod:`fusedrnn.torch.guarded_backward`;
            else None.
    """

    __slots__ = (
        "all_states", "backwards", "batch", "is_cell", "leading", "network", "output_strides", "resets",
        "state_shapes", "steps", "varlen",
    )  # fmt: skip

    def __init__(
        self, network: Network, x: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None, is_cell: bool = False,
        resets: Tensor | None = None, all_states: bool = False,
    ) -> None:  # fmt: skip
        self.network, self.is_cell, self.all_states = network, is_cell, all_states
        self.backwards: dict[Any, Any] | None = None
        self.varlen: Any = None
        self.leading: tuple[int, ...]
        if is_cell:
            self.leading = tuple(x.shape[:-1])
            self.steps, self.batch = 1, self.leading[0] if self.leading else 1
        elif batch_sizes is not None:
            sizes = batch_sizes.numpy()
            self.steps, self.batch = len(sizes), int(sizes[0])
            self.varlen = network.executor.varlen_packed(sizes)
            self.leading = (x.shape[0],)
        else:
            self.steps, self.batch, _ = x.shape
            self.leading = self.steps, self.batch
            if lengths is not None:
                self.varlen = network.executor.varlen(lengths.numpy().astype(np.int64), self.steps)
        self.resets = None if resets is None else self._marks(resets)
        row = network.output_size * network.item
        self.output_strides = self.batch * row if batch_sizes is None and not is_cell else 0, row
        rows = self.leading if is_cell else (network.state_rows, self.batch)
        self.state_shapes = [(*rows, size) for size in network.state_sizes]

    def _marks(self, resets: Tensor) -> Any:
        marks = np.array(resets.numpy(), order="C")  # the caller may change them before backward
        if self.varlen is not None:
            marks &= np.arange(self.steps)[:, None] < self.varlen.lengths
        return marks

    def new(self, x: Tensor, features: int) -> Tensor:
        """A new tensor with this many features at each step, like ``x``, zero in the padding."""
        padded = self.varlen is not None and self.varlen.row_offsets is None
        return (x.new_zeros if padded else x.new_empty)((*self.leading, features))

    def new_all_states(self, x: Tensor) -> tuple[Tensor, ...]:
        """New tensors for the states of every step that the output does not hold; none unless they are results."""
        features = self.network.spec.other_state_features if self.all_states else ()
        return tuple([self.new(x, size) for size in features])

    def new_states(self, x: Tensor) -> tuple[Tensor, ...]:
        """New tensors for the states, like ``x``."""
        return tuple([x.new_empty(shape) for shape in self.state_shapes])
