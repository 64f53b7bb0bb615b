"""How our parameters lie for oneDNN: which layers it runs at once, in which order it has gates, where weights are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.onednn.library import Library
from fusedrnn.engines.onednn.primitives import (
    BIAS,
    WEIGHTS_ITER,
    WEIGHTS_LAYER,
    WEIGHTS_PEEPHOLE,
    WEIGHTS_PROJECTION,
    Descriptor,
)
from fusedrnn.engines.operands import write_or_add
from fusedrnn.layout import Kind, Parameter
from fusedrnn.runtime.fingerprint import MEMORY_RANGE
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
WEIGHTS: dict[int, Kind] = {
    WEIGHTS_LAYER: "i2h_weight",
    WEIGHTS_ITER: "h2h_weight",
    WEIGHTS_PEEPHOLE: "peephole_weight",
    WEIGHTS_PROJECTION: "h2r_weight",
}
"""What each argument of a primitive is made from; the bias is made from two."""
_ITEM = 4
_SWAPPED = (1, 0, 2)
"""The GRU's gates, which are r z n here, and update, reset, candidate there: z is the update."""


def cell_name(spec: RNNSpec) -> str:
    """What oneDNN calls the cell in its functions' names."""
    if spec.mode == "gru":
        return "lbr_gru" if spec.reset_after else "gru"
    return "lstm" if spec.mode == "lstm" else "vanilla_rnn"


def bias_rows(spec: RNNSpec) -> int:
    """Rows of a bias: one more in a GRU whose candidate has a recurrent bias of its own."""
    return spec.num_gates + (cell_name(spec) == "lbr_gru")


@dataclass(frozen=True)
class Stack:
    """Layers that one primitive runs: the first, how many, and what they read at each step."""

    first: int
    layers: int
    inputs: int

    def rows(self, spec: RNNSpec) -> slice:
        """Its part of the states."""
        directions = spec.num_directions
        return slice(self.first * directions, (self.first + self.layers) * directions)


def stacks(spec: RNNSpec) -> tuple[Stack, ...]:
    """The primitives of a network, from below.

    One runs several layers only if all of them read equally much. Of both directions oneDNN makes two stacks that know
    nothing of each other: a network whose layers read both directions of the one below is a primitive for each.
    """
    if spec.bidirectional:
        return tuple(Stack(layer, 1, spec.layer_input_size(layer)) for layer in range(spec.num_layers))
    if spec.num_layers == 1 or spec.input_size == spec.output_size:
        return (Stack(0, spec.num_layers, spec.input_size),)
    return Stack(0, 1, spec.input_size), Stack(1, spec.num_layers - 1, spec.output_size)


class Layout:
    """A spec's flat vector as oneDNN sees it: *theirs* is the same vector with each GRU's gates in oneDNN's order.

    Args:
        library: The library.
        spec: The network.

    Attributes:
        stacks: See :func:`stacks`.
        parts: Where ours lies and where it goes in theirs, rows of :data:`fusedrnn.runtime.fingerprint.MEMORY_RANGE`.
        arguments: The weights, without the bias, that a primitive is given.
    """

    def __init__(self, library: Library, spec: RNNSpec) -> None:
        self._library, self._spec = library, spec
        self.stacks = stacks(spec)
        self.swaps = spec.mode == "gru"
        self.parts = np.array(list(self._parts()), np.int64).reshape(-1, len(MEMORY_RANGE))
        self.arguments = tuple(argument for argument, kind in WEIGHTS.items() if spec.layout.has(kind))

    def _parts(self) -> Iterator[tuple[int, int, int]]:
        if not self.swaps:
            yield 0, self._spec.layout.size * _ITEM, 0
            return
        for entry in self._spec.layout:
            size = entry.size // len(_SWAPPED)
            for gate, there in enumerate(_SWAPPED):
                yield (entry.offset + gate * size) * _ITEM, size * _ITEM, (entry.offset + there * size) * _ITEM

    def _entry(self, stack: Stack, kind: Kind, layer: int = 0, direction: int = 0) -> Parameter:
        return self._spec.layout.entry(stack.first + layer, direction, kind)

    def offset(self, stack: Stack, argument: int) -> int:
        """Where in the flat vector an argument's weights begin, in bytes."""
        return self._entry(stack, WEIGHTS[argument]).offset * _ITEM

    def dims(self, stack: Stack, argument: int) -> tuple[int, ...]:
        """The shape of an argument: layers, directions, then as oneDNN has it."""
        spec = self._spec
        H, G = spec.hidden_size, spec.num_gates
        inner = {
            WEIGHTS_LAYER: (stack.inputs, G, H),
            WEIGHTS_ITER: (spec.state_size, G, H),
            WEIGHTS_PEEPHOLE: (3, H),
            WEIGHTS_PROJECTION: (H, spec.state_size),
            BIAS: (bias_rows(spec), H),
        }
        return stack.layers, spec.num_directions, *inner[argument]

    def in_place(self, stack: Stack, argument: int) -> Descriptor:
        """The weights of an argument as they lie in the flat vector, from :meth:`offset` on."""
        dims, kind = self.dims(stack, argument), WEIGHTS[argument]
        first = self._entry(stack, kind).offset
        layer = self._entry(stack, kind, layer=1).offset - first if stack.layers > 1 else self._spec.layout.size
        direction = self._entry(stack, kind, direction=1).offset - first if dims[1] > 1 else layer
        if argument == WEIGHTS_PEEPHOLE:
            inner: tuple[int, ...] = dims[3], 1
        elif argument == WEIGHTS_PROJECTION:
            inner = 1, dims[2]
        else:
            inner = 1, dims[4] * dims[2], dims[2]
        return Descriptor(self._library, dims, (layer, direction, *inner))

    def fill_bias(self, stack: Stack, theirs: Array, bias: Array) -> None:
        """Make an argument's bias of the flat vector's.

        A gate's two biases are added, but the recurrent one of a GRU's candidate, which r multiplies, has its own row.
        """
        spec = self._spec
        gates = spec.num_gates
        bias.fill(0)
        for layer, direction in np.ndindex(*bias.shape[:2]):
            into = bias[layer, direction]
            for kind, rows in self._bias_rows():
                entry = self._entry(stack, kind, layer, direction)
                into[rows] += theirs[entry.offset : entry.offset + entry.size].reshape(gates, -1)

    def put_bias(self, stack: Stack, gradient: Array, theirs: Array) -> None:
        """The reverse of a gradient."""
        for layer, direction in np.ndindex(*gradient.shape[:2]):
            for kind, rows in self._bias_rows():
                entry = self._entry(stack, kind, layer, direction)
                theirs[entry.offset : entry.offset + entry.size] = gradient[layer, direction][rows].ravel()

    def _bias_rows(self) -> Iterator[tuple[Kind, list[int]]]:
        """Of each kind there is, the rows of oneDNN's bias that it belongs to."""
        gates = list(range(self._spec.num_gates))
        recurrent = [*gates[:-1], len(gates)] if cell_name(self._spec) == "lbr_gru" else gates
        kinds: tuple[tuple[Kind, list[int]], ...] = ("i2h_bias", gates), ("h2h_bias", recurrent)
        yield from ((kind, rows) for kind, rows in kinds if self._spec.layout.has(kind))

    def put(self, into: Array, theirs: Array, add: bool) -> None:
        """Write or add a gradient in oneDNN's order of gates into one in ours."""
        if not self.swaps:
            write_or_add(into, theirs, add)
            return
        for begin, size, there in self.parts // _ITEM:
            write_or_add(into[begin : begin + size], theirs[there : there + size], add)
