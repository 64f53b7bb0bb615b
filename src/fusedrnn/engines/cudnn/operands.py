"""What cuDNN is given of a call, as tensors on a device: packed rows, weights in its order; and what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedrnn.layout import Kind, Parameter
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
# The order in which PyTorch's functions want the weights of one direction of a layer.
_ORDER: tuple[Kind, ...] = ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias", "h2r_weight")


@dataclass(frozen=True)
class Places:
    """Where the rows that PyTorch is given lie in padded arrays.

    Attributes:
        rows: An index into arrays (T, N, ...): of all of it, or of the rows of a packed sequence, (rows, ...).
        order: An index into the N sequences: those that are not empty, longest first, or all.
        batch_sizes: How many sequences are alive at each step of the packed sequence; None if nothing is packed.
    """

    rows: Any
    order: Any = field(default_factory=lambda: slice(None))
    batch_sizes: Array | None = None

    @property
    def empty(self) -> bool:
        """Whether no sequence has a step."""
        return self.batch_sizes is not None and not len(self.batch_sizes)


def places(spec: RNNSpec, lengths: Array | None, steps: int) -> Places:
    """The places of one call: PyTorch knows sequences that end early only as packed ones, and empty ones not at all.

    A reverse network of one direction runs as a forward one over each sequence in reverse order.
    """
    if lengths is None:
        return Places((slice(None, None, -1 if spec.reverse else 1),))
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    alive = np.arange(steps)[:, None] < lengths[order]  # (T, sequences)
    step, place = np.nonzero(alive)  # step by step, as packing has it
    sequence = order[place]
    when = lengths[sequence] - 1 - step if spec.reverse else step
    sizes = alive.sum(axis=1).astype(np.int64)
    return Places((when, sequence), order, sizes[sizes > 0])


@dataclass(frozen=True)
class Operands:
    """What one forward pass reads, on the device, and what gradients are asked of."""

    x: Tensor  # (T, N, I), or packed (rows, I)
    states: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    batch_sizes: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that have gradients."""
        return (self.x, *self.states, *self.weights)


class Memory:
    """Adds up the memory behind tensors, that of each storage once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """How much it is."""
        return sum(self._sizes.values())

    def add(self, tensor: Tensor) -> Tensor:
        """Count what is behind a tensor, which is returned."""
        storage = tensor.untyped_storage()
        self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def array_of(tensor: Tensor) -> Array:
    """What is in a tensor; on the processor, its memory."""
    array: Array = tensor.detach().cpu().numpy()
    return array


def _entries(spec: RNNSpec) -> Iterator[Parameter | None]:
    """The parameters in the order of PyTorch's functions; None for a bias that they want and we lack."""
    for layer in range(spec.num_layers):
        for direction in range(spec.num_directions):
            for kind in _ORDER:
                if spec.layout.has(kind):
                    yield spec.layout.entry(layer, direction, kind)
                elif kind == "h2h_bias" and spec.bias == "single":
                    yield None


def split(spec: RNNSpec, flat: Tensor) -> tuple[Tensor, ...]:
    """The flat parameter vector as PyTorch's functions take it, each weight in memory of its own.

    cuDNN takes two biases or none: a spec with one bias gets zeros for the other.
    """
    zero = flat.new_zeros(spec.num_gates * spec.hidden_size)
    return tuple(
        (zero if entry is None else flat[entry.offset : entry.offset + entry.size].view(entry.shape)).clone()
        for entry in _entries(spec)
    )


def join(spec: RNNSpec, weights: Iterable[Tensor]) -> Tensor:
    """The inverse of :func:`split`: one flat vector."""
    by_entry = dict(zip(_entries(spec), weights, strict=False))
    return torch.cat([by_entry[entry].reshape(-1) for entry in spec.layout])


def flatten(spec: RNNSpec, weights: Sequence[Tensor]) -> None:
    """Move the weights into one piece of memory, in cuDNN's layout.

    It is what torch.nn's modules do. Otherwise PyTorch would copy them at every call, and warn.
    """
    from torch.backends.cudnn import rnn

    mode = rnn.get_cudnn_mode(spec.mode.upper())  # type: ignore[no-untyped-call]
    each = len(weights) // (spec.num_layers * spec.num_directions)
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(
            list(weights), each, spec.input_size, mode, spec.hidden_size, spec.projection_size or 0, spec.num_layers,
            False, spec.bidirectional,
        )  # fmt: skip


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch had no memory for something, on the device or on the processor."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
