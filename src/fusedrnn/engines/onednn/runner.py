"""Runs a program: hands every primitive of a network, from below or from above, the memory that it works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.onednn.param_layout import Layout
from fusedrnn.engines.onednn.primitives import BIAS, DIFF, DST_LAYER, SCRATCHPAD, SRC_LAYER, WORKSPACE
from fusedrnn.engines.onednn.program import ArgFrame, Program
from fusedrnn.engines.onednn.weights import WeightCache, Weights, floats
from fusedrnn.runtime.buffers import Lease
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
_ITEM = 4


@dataclass(frozen=True)
class Operands:
    """Addresses of a network's data, or of the gradients of all of it.

    Attributes:
        x: Of the input.
        initial: Of each initial state.
        outputs: Of each stack's output.
        final: Of each final state.
        workspaces: Of what oneDNN keeps of each stack for backward; none in inference.
    """

    x: int
    initial: Sequence[int]
    outputs: Sequence[int]
    final: Sequence[int]
    workspaces: Sequence[int] = ()


class Runner:
    """Runs the programs of one spec. Any number of threads may call it at once.

    Args:
        spec: The network.
        layout: The layout of its parameters.
        weight_cache: Holds its parameters in oneDNN's layouts.
    """

    def __init__(self, spec: RNNSpec, layout: Layout, weight_cache: WeightCache) -> None:
        self._spec, self._layout, self._weight_cache = spec, layout, weight_cache
        self._sizes = [spec.size_of(name) for name in spec.state_names]

    def forward(self, program: Program, weights: Weights, operands: Operands, scratchpad: int) -> None:
        """Fill the outputs, final states and workspaces."""
        frame = program.take(False)
        for index, run in enumerate(frame.runs):
            args = self._data(program, index, operands) | self._weights(frame, weights, index)
            run(frame.stream.handle, args | {SCRATCHPAD: scratchpad})
        frame.stream.wait()
        program.give(frame, False)

    def backward(
        self,
        program: Program,
        frame: ArgFrame,
        weights: Weights,
        operands: Operands,
        gradients: Operands,
        scratch: Lease,
    ) -> None:
        """Fill the gradients of input, initial states and, in ``scratch``, of parameters; overwrites workspaces."""
        places = program.scratch
        for index in reversed(range(len(frame.runs))):
            args = self._data(program, index, operands) | self._weights(frame, weights, index)
            changes = self._data(program, index, gradients)
            changes |= {
                argument: scratch.address + places[f"{argument} {index}"]
                for argument in (*self._layout.arguments, BIAS)
            }
            args |= {DIFF + argument: address for argument, address in changes.items()}
            frame.runs[index](frame.stream.handle, args | {SCRATCHPAD: scratch.address + places["scratchpad"]})
        frame.stream.wait()

    def collect(self, program: Program, frame: ArgFrame, scratch: Lease, theirs: Array) -> None:
        """Bring the gradients of parameters from ``scratch`` to where they lie in the flat vector."""
        places, begin = program.scratch, theirs.ctypes.data
        for index, step in enumerate(program.steps):
            for argument, reorder in frame.reorders[index].items():
                source = scratch.address + places[f"{argument} {index}"]
                target = begin + self._layout.offset(step.stack, argument)
                reorder(frame.stream.handle, source, target, scratch.address + places.size)
            name = f"{BIAS} {index}"
            self._layout.put_bias(step.stack, floats(scratch, places[name], places.shape(name)), theirs)
        frame.stream.wait()

    def _weights(self, frame: ArgFrame, weights: Weights, index: int) -> dict[int, int]:
        """The addresses of a stack's parameters, in the layouts that its primitive needs."""
        addresses = {
            argument: self._weight_cache.address(weights, index, argument, descriptor, frame.stream)
            for argument, descriptor in frame.weight_layouts[index].items()
        }
        return addresses | {BIAS: weights.biases[index]}

    def _data(self, program: Program, index: int, operands: Operands) -> dict[int, int]:
        """The addresses of what a stack reads and writes: its part of each state."""
        begin = program.steps[index].stack.first * self._spec.num_directions * program.shape[1]
        args = {SRC_LAYER: operands.outputs[index - 1] if index else operands.x, DST_LAYER: operands.outputs[index]}
        for number, size in enumerate(self._sizes, 1):
            for first, whole in ((SRC_LAYER, operands.initial), (DST_LAYER, operands.final)):
                args[first + number] = whole[number - 1] + begin * size * _ITEM
        if operands.workspaces:
            args[WORKSPACE] = operands.workspaces[index]
        return args


def array_in(lease: Lease, program: Program, name: str, *, kept: bool = False) -> Array:
    """An array in a call's scratch, or in what it keeps."""
    places = program.kept if kept else program.scratch
    return floats(lease, places[name], places.shape(name))


def address_of(array: Array) -> int:
    """The address of an array's first element."""
    address: int = np.asarray(array).ctypes.data
    return address
