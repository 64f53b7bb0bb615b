"""A call's operands as tensors on a device: packed rows, and weights in PyTorch's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.backends.cudnn import rnn

from fusedrnn.arrays import Array
from fusedrnn.layout import Kind, Parameter
from fusedrnn.spec import RNNSpec

# The order in which PyTorch's functions take the parameters of one direction of a layer.
_ORDER: tuple[Kind, ...] = ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias", "h2r_weight")


class PackedIndices(NamedTuple):
    """Which rows of padded arrays PyTorch gets.

    Attributes:
        rows: An index into arrays (T, N, ...): of all rows, or of those of a packed sequence, (rows, ...).
        sequences: An index into the N sequences: all, or those that are not empty, longest first.
        batch_sizes: Active sequences at each step of the packed sequence, int64; None if nothing is packed.
    """

    rows: Any
    sequences: Any = slice(None)
    batch_sizes: Array | None = None

    @property
    def empty(self) -> bool:
        """Whether no sequence has a step."""
        return self.batch_sizes is not None and not len(self.batch_sizes)


def packed_indices(spec: RNNSpec, lengths: Array | None, steps: int) -> PackedIndices:
    """The indices of one call. PyTorch takes sequences of different lengths only packed, and no empty ones.

    A reverse network of one direction runs as a forward one over reversed sequences.
    """
    if lengths is None:
        return PackedIndices((slice(None, None, -1 if spec.reverse else 1),))
    sequences = np.argsort(-lengths, kind="stable")
    sequences = sequences[lengths[sequences] > 0]
    valid = np.arange(steps)[:, None] < lengths[sequences]  # (T, sequences)
    step, column = np.nonzero(valid)  # step by step, as in a packed sequence
    sequence = sequences[column]
    batch_sizes = valid.sum(axis=1).astype(np.int64)
    rows = (lengths[sequence] - 1 - step if spec.reverse else step), sequence
    return PackedIndices(rows, sequences, batch_sizes[batch_sizes > 0])


class Operands(NamedTuple):
    """What a forward call reads, on the device."""

    x: Tensor  # (T, N, I), or packed (rows, I)
    states: tuple[Tensor, ...]  # each (L·D, sequences, size)
    weights: tuple[Tensor, ...]
    batch_sizes: Tensor | None


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages behind tensors, each storage counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def array_of(tensor: Tensor) -> Array:
    """A tensor's content as an array; on the CPU, without a copy."""
    return np.asarray(tensor.detach().cpu())


def _entries(spec: RNNSpec) -> Iterator[Parameter | None]:
    """The parameters in the order of PyTorch's functions; None for a bias that these take and the spec lacks."""
    for layer, direction, kind in product(range(spec.num_layers), range(spec.num_directions), _ORDER):
        if spec.layout.has(kind):
            yield spec.layout.entry(layer, direction, kind)
        elif kind == "h2h_bias" and spec.bias == "single":
            yield None


def split(spec: RNNSpec, flat: Tensor) -> tuple[Tensor, ...]:
    """The flat parameter vector as PyTorch's functions take it: copies of its parameters.

    cuDNN takes two biases or none: for a spec with one bias, the other is zero.
    """
    zero = flat.new_zeros(spec.num_gates * spec.hidden_size)
    return tuple(
        (zero if entry is None else flat[entry.offset : entry.offset + entry.size].view(entry.shape)).clone()
        for entry in _entries(spec)
    )


def join(spec: RNNSpec, weights: Iterable[Tensor]) -> Tensor:
    """The inverse of :func:`split`: a flat vector."""
    by_entry = dict(zip(_entries(spec), weights, strict=False))
    return torch.cat([by_entry[entry].reshape(-1) for entry in spec.layout])


def flatten(spec: RNNSpec, weights: Sequence[Tensor]) -> None:
    """Move the weights into one buffer in cuDNN's layout, as torch.nn does: else PyTorch copies them at every call."""
    mode = rnn.get_cudnn_mode(spec.mode_name.upper())  # type: ignore[no-untyped-call]
    per_direction = len(weights) // (spec.num_layers * spec.num_directions)
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(
            list(weights), per_direction, spec.input_size, mode, spec.hidden_size, spec.projection_size or 0,
            spec.num_layers, False, spec.bidirectional,
        )  # fmt: skip
