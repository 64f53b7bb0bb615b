"""The parameters in oneDNN's terms: the layers that one primitive runs, the order of gates, and strides of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.onednn.arrays import ITEM
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
from fusedrnn.layout import Kind
from fusedrnn.runtime.fingerprint import MEMORY_RANGE
from fusedrnn.spec import RNNSpec

_WEIGHTS: dict[int, Kind] = {
    WEIGHTS_LAYER: "i2h_weight",
    WEIGHTS_ITER: "h2h_weight",
    WEIGHTS_PEEPHOLE: "peephole_weight",
    WEIGHTS_PROJECTION: "h2r_weight",
}
# oneDNN's GRU has the gates update, reset, candidate: our z, r, n. Here is the place there of each of our r, z, n.
_GRU_GATES = (1, 0, 2)


def cell_name(spec: RNNSpec) -> str:
    """The cell's name in oneDNN's functions."""
    if spec.mode == "gru":
        return "lbr_gru" if spec.reset_after else "gru"
    return "lstm" if spec.mode == "lstm" else "vanilla_rnn"


@dataclass(frozen=True)
class Stack:
    """Layers that one primitive runs: the first, how many, and the features that each reads."""

    first: int
    layers: int
    inputs: int


def stacks(spec: RNNSpec) -> tuple[Stack, ...]:
    """The stacks of a network, from the first layer on.

    One primitive runs several layers only if all of them read the same number of features. Its two directions would be
    independent of each other, so a network whose layers read both directions of the layer below has a stack per layer.
    """
    if spec.bidirectional:
        return tuple(Stack(layer, 1, spec.layer_input_size(layer)) for layer in range(spec.num_layers))
    if spec.num_layers == 1 or spec.input_size == spec.output_size:
        return (Stack(0, spec.num_layers, spec.input_size),)
    return Stack(0, 1, spec.input_size), Stack(1, spec.num_layers - 1, spec.output_size)


class ParamLayout:
    """A spec's flat parameter vector, as oneDNN reads it: the same vector, but a GRU's gates in oneDNN's order.

    Attributes:
        stacks: See :func:`stacks`.
        weights: The numbers of the arguments of a primitive that are weights, without the bias.
        reorders_gates: Whether oneDNN's order of gates differs from ours.
        ranges: Ranges of our vector to copy, rows of :data:`fusedrnn.runtime.fingerprint.MEMORY_RANGE`: byte offsets
            in our vector, sizes, and byte offsets in oneDNN's.
    """

    def __init__(self, library: Library, spec: RNNSpec) -> None:
        self.library, self.spec = library, spec
        self.stacks = stacks(spec)
        self.weights = tuple(argument for argument, kind in _WEIGHTS.items() if spec.layout.has(kind))
        self.reorders_gates = spec.mode == "gru"
        self.ranges = np.array(list(self._ranges()), np.int64).reshape(-1, len(MEMORY_RANGE))

    def _ranges(self) -> Iterator[tuple[int, int, int]]:
        if not self.reorders_gates:
            yield 0, self.spec.layout.size * ITEM, 0
            return
        for entry in self.spec.layout:
            size = entry.size // len(_GRU_GATES)
            for gate, onednn_gate in enumerate(_GRU_GATES):
                yield (entry.offset + gate * size) * ITEM, size * ITEM, (entry.offset + onednn_gate * size) * ITEM

    def _offset(self, stack: Stack, argument: int, layer: int = 0, direction: int = 0) -> int:
        return self.spec.layout.entry(stack.first + layer, direction, _WEIGHTS[argument]).offset

    def offset(self, stack: Stack, argument: int) -> int:
        """The byte offset of a stack's weights in the flat vector."""
        return self._offset(stack, argument) * ITEM

    def dims(self, stack: Stack, argument: int) -> tuple[int, ...]:
        """The shape of a stack's weights or bias: layers, directions, then the dimensions of oneDNN's argument."""
        spec = self.spec
        H, G = spec.hidden_size, spec.num_gates
        inner = {
            WEIGHTS_LAYER: (stack.inputs, G, H),
            WEIGHTS_ITER: (spec.state_size, G, H),
            WEIGHTS_PEEPHOLE: (3, H),
            WEIGHTS_PROJECTION: (H, spec.state_size),
            BIAS: (G + (cell_name(spec) == "lbr_gru"), H),
        }
        return stack.layers, spec.num_directions, *inner[argument]

    def descriptor(self, stack: Stack, argument: int) -> Descriptor:
        """The layout of a stack's weights in the flat vector, from :meth:`offset` on."""
        dims, first = self.dims(stack, argument), self._offset(stack, argument)
        layer = self._offset(stack, argument, layer=1) - first if stack.layers > 1 else self.spec.layout.size
        direction = self._offset(stack, argument, direction=1) - first if dims[1] > 1 else layer
        # In memory a matrix has a row for each index of oneDNN's last dimensions; the first inner one is contiguous.
        special = {WEIGHTS_PEEPHOLE: (dims[-1], 1), WEIGHTS_PROJECTION: (1, dims[2])}
        inner: tuple[int, ...] = special.get(argument, (1, dims[-1] * dims[2], dims[2]))
        return Descriptor.strided(self.library, dims, (layer, direction, *inner))

    def read_bias(self, stack: Stack, params: Array, bias: Array) -> None:
        """Write a stack's bias (layers, D, rows, H) from a vector in oneDNN's order of gates.

        The two biases of a gate are added. The recurrent bias of an ``lbr_gru``'s candidate, which r multiplies, has a
        row of its own.
        """
        bias.fill(0)
        for view, rows, into in self._biases(stack, params, bias):
            into[rows] += view

    def write_bias_gradient(self, stack: Stack, gradient: Array, dparams: Array) -> None:
        """Write the gradient of a stack's bias to the gradients of the biases that it is the sum of."""
        for view, rows, summed in self._biases(stack, dparams, gradient):
            view[...] = summed[rows]

    def _biases(self, stack: Stack, params: Array, bias: Array) -> Iterator[tuple[Array, list[int], Array]]:
        """Each bias (G, H) of a stack as a view of the flat vector, and its rows in an array (rows, H) of oneDNN's."""
        gates = list(range(self.spec.num_gates))
        rows: dict[Kind, list[int]] = {"i2h_bias": gates, "h2h_bias": [*gates[:-1], bias.shape[2] - 1]}
        for layer, direction in np.ndindex(*bias.shape[:2]):
            for kind in filter(self.spec.layout.has, rows):
                view = self.spec.layout.view(params, stack.first + layer, direction, kind)
                yield view.reshape(len(gates), -1), rows[kind], bias[layer, direction]

    def write_gradient(self, buffer: Array, dparams: Array, add: bool) -> None:
        """Write or add a gradient in oneDNN's order of gates to one in ours."""
        if not self.reorders_gates:
            write_or_add(buffer, dparams, add)
            return
        for begin, size, onednn_begin in self.ranges // ITEM:
            write_or_add(buffer[begin : begin + size], dparams[onednn_begin : onednn_begin + size], add)
