"""A network's primitives for one length and batch, the layout of the arrays that they use, and running them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from fusedrnn.arrays import Array
from fusedrnn.engines.onednn.arrays import ITEM, ArrayLayout, Arrays
from fusedrnn.engines.onednn.library import OneDNNError
from fusedrnn.engines.onednn.param_layout import ParamLayout, Stack, cell_name
from fusedrnn.engines.onednn.primitives import (
    BIAS,
    DIFF,
    DST,
    SCRATCHPAD,
    SRC,
    WEIGHTS_ITER,
    WEIGHTS_LAYER,
    WEIGHTS_PEEPHOLE,
    WEIGHTS_PROJECTION,
    WORKSPACE,
    BoundPrimitive,
    Descriptor,
    Primitive,
    Reorder,
    Stream,
)
from fusedrnn.engines.onednn.weights import WeightCache, Weights

_INFERENCE, _TRAINING, _BACKWARD = 96, 64, 128
_LEFT_TO_RIGHT, _RIGHT_TO_LEFT, _CONCATENATED = 1, 2, 3
_ACTIVATIONS = {"rnn_relu": 0x20, "rnn_tanh": 0x21}
# The flag that makes backward overwrite the gradients of weights; without the flag, backward adds to them.
_OVERWRITE = 1
_MAX_IDLE = 4


class StackPrimitives:
    """A stack's primitives for T steps of N sequences; ``backward`` is None in inference.

    Raises:
        NotImplementedError: If the library has no such primitive.
    """

    def __init__(self, layout: ParamLayout, stack: Stack, steps: int, batch: int, training: bool) -> None:
        self.layout, self.stack = layout, stack
        spec, library = layout.spec, layout.library
        states = [(stack.layers, spec.num_directions, batch, spec.size_of(name)) for name in spec.state_names]
        inputs = dict(zip(SRC, [(steps, batch, stack.inputs), *states], strict=False))
        outputs = dict(zip(DST, [(steps, batch, spec.output_size), *states], strict=False))
        shapes = inputs | {argument: layout.dims(stack, argument) for argument in (*layout.weights, BIAS)} | outputs
        any_layout = {WEIGHTS_LAYER, WEIGHTS_ITER, WEIGHTS_PROJECTION}
        self._descriptors: dict[int, Descriptor] = {
            argument: (Descriptor.any_layout if argument in any_layout else Descriptor.strided)(library, shape)
            for argument, shape in shapes.items()
        }
        optional = (WEIGHTS_PEEPHOLE, WEIGHTS_PROJECTION) if spec.mode == "lstm" else ()
        self._order = (*inputs, WEIGHTS_LAYER, WEIGHTS_ITER, *optional, BIAS, *outputs)
        self.arguments = tuple(shapes)
        self.forward = self._primitive("forward", _TRAINING if training else _INFERENCE)
        self.backward = self._primitive("backward", _BACKWARD, self.forward) if training else None

    def _primitive(self, function: str, kind: int, hint: Primitive | None = None) -> Primitive:
        spec, library = self.layout.spec, self.layout.library
        direction = _CONCATENATED if spec.bidirectional else _RIGHT_TO_LEFT if spec.reverse else _LEFT_TO_RIGHT
        activation, slopes = ([_ACTIVATIONS[spec.mode]], [0.0, 0.0]) if spec.mode in _ACTIVATIONS else ([], [])
        flags, hints = (0, []) if hint is None else (_OVERWRITE, [hint.description])
        # A gradient has the layout of its array.
        descriptors = [self._descriptors.get(argument) for argument in self._order] * (1 + len(hints))
        try:
            return Primitive(
                library, f"{cell_name(spec)}_{function}", library.engine, kind, *activation, direction, *descriptors,
                flags, *slopes, *hints, library.attributes,
            )  # fmt: skip
        except OneDNNError as error:
            raise NotImplementedError(f"{spec} is not supported by oneDNN {library.version}: {error}") from None


class BoundStack:
    """A stack's primitive for one pass with its arguments, used by one call at a time.

    Attributes:
        run: The primitive.
        conversions: How its weights are brought to the layouts in which it reads them.
        reorders: In backward, what copies the gradient of each of its weights to a flat vector.
    """

    def __init__(self, stack: StackPrimitives, weight_cache: WeightCache, backward: bool) -> None:
        primitive = stack.backward if backward else stack.forward
        assert primitive is not None
        workspace = () if stack.backward is None else (WORKSPACE,)
        gradients = [DIFF + argument for argument in stack.arguments if backward]
        self.run = BoundPrimitive(primitive, [*stack.arguments, *workspace, *gradients])
        layout = stack.layout
        self.conversions = [
            weight_cache.conversion(stack.stack, argument, primitive.descriptor(argument))
            for argument in layout.weights
        ]
        self.reorders: dict[int, Reorder] = {}
        for argument in layout.weights if backward else ():
            source, target = primitive.descriptor(DIFF + argument), layout.descriptor(stack.stack, argument)
            self.reorders[argument] = Reorder(layout.library, source, target)


class BoundProgram(NamedTuple):
    """All stacks' primitives for one pass, and the stream that they run on, used by one call at a time."""

    stream: Stream
    stacks: list[BoundStack]


class Program:
    """Runs a network on T steps of N sequences. Any number of threads may call it at once.

    Its arrays have names: ``x``; the states, such as ``h0`` and ``h_n``; ``y0``, the output of the first stack, and so
    on; ``scratchpad``.

    Attributes:
        threads: The number of threads that it runs on.
        output: The name of the network's output.
        reserve: The arrays that a training call saves: input, states, outputs and each stack's workspace.
        scratch: The arrays that a call needs while it runs: states and outputs, or the gradients of all operands.

    Raises:
        NotImplementedError: If the library has no such primitive.
    """

    def __init__(
        self, layout: ParamLayout, weight_cache: WeightCache, steps: int, batch: int, training: bool, threads: int
    ) -> None:
        self._layout, self._weight_cache = layout, weight_cache
        self._shape, self.threads = (steps, batch), threads
        self._stacks = [StackPrimitives(layout, stack, steps, batch, training) for stack in layout.stacks]
        self.output = f"y{len(self._stacks) - 1}"
        self._idle: dict[bool, deque[BoundProgram]] = {backward: deque(maxlen=_MAX_IDLE) for backward in (False, True)}
        self.reserve, self.scratch = ArrayLayout(), ArrayLayout()
        self._lay_out(training)

    def _lay_out(self, training: bool) -> None:
        spec, (steps, batch) = self._layout.spec, self._shape
        reserve, scratch = self.reserve, self.scratch
        for arrays in (scratch, reserve) if training else (scratch,):
            for name, shape in zip(spec.state_names, spec.state_shape(batch), strict=True):
                arrays.add(f"{name}0", *shape)
                arrays.add(f"{name}_n", *shape)
        # Outputs take turns in two buffers: a stack reads one and writes the other.
        for index in range(min(2, len(self._stacks))):
            scratch.add(f"y{index}", steps, batch, spec.output_size)
        for index in range(2, len(self._stacks)):
            scratch.arrays[f"y{index}"] = scratch.arrays[f"y{index - 2}"]
        scratchpads = [stack.forward.scratch for stack in self._stacks]
        if training:
            for arrays in scratch, reserve:
                arrays.add("x", steps, batch, spec.input_size)
            scratch.add("params", spec.layout.size)
            for index, stack in enumerate(self._stacks):
                assert stack.backward is not None
                reserve.add(f"y{index}", steps, batch, spec.output_size)
                reserve.add_bytes(f"workspace{index}", stack.forward.descriptor(WORKSPACE).nbytes)
                scratch.add(f"{BIAS} {index}", *self._layout.dims(stack.stack, BIAS))
                for argument in self._layout.weights:
                    scratch.add_bytes(f"{argument} {index}", stack.backward.descriptor(DIFF + argument).nbytes)
                scratchpads.append(stack.backward.scratch)
        scratch.add_bytes("scratchpad", max(scratchpads))

    def _acquire(self, backward: bool) -> BoundProgram:
        """Bound primitives that no other call uses. Needs no lock: a deque's operations are atomic."""
        try:
            return self._idle[backward].pop()
        except IndexError:
            stacks = [BoundStack(stack, self._weight_cache, backward) for stack in self._stacks]
            return BoundProgram(Stream(self._layout.library), stacks)

    def forward(self, weights: Weights, addresses: Mapping[str, int]) -> None:
        """Write the outputs, final states and workspaces."""
        bound = self._acquire(False)
        scratchpad = {SCRATCHPAD: addresses["scratchpad"]}
        for index, stack in enumerate(bound.stacks):
            stack.run(bound.stream, self._data(index, addresses) | self._weights(bound, weights, index) | scratchpad)
        bound.stream.wait()
        self._idle[False].append(bound)

    def backward(self, weights: Weights, saved: Mapping[str, int], scratch: Arrays, dparams: Array | None) -> None:
        """Write the gradients of all operands to ``scratch``, which holds the gradients of the results.

        ``saved`` are the addresses of the call's reserve, whose workspaces are overwritten. ``dparams`` is the vector
        for the gradient of the parameters, with gates in oneDNN's order; None if it is not requested.
        """
        bound, gradients = self._acquire(True), scratch.addresses
        scratchpad = gradients["scratchpad"]
        for index, stack in reversed([*enumerate(bound.stacks)]):
            arguments = self._data(index, saved) | self._weights(bound, weights, index)
            targets = self._data(index, gradients)
            targets |= {argument: gradients[f"{argument} {index}"] for argument in (*self._layout.weights, BIAS)}
            arguments |= {DIFF + argument: address for argument, address in targets.items()}
            stack.run(bound.stream, arguments | {SCRATCHPAD: scratchpad})
        bound.stream.wait()
        if dparams is not None:
            for index, stack in enumerate(bound.stacks):
                for argument, reorder in stack.reorders.items():
                    target = dparams.ctypes.data + self._layout.offset(self._layout.stacks[index], argument)
                    reorder.copy(bound.stream, gradients[f"{argument} {index}"], target)
                self._layout.write_bias_gradient(self._layout.stacks[index], scratch[f"{BIAS} {index}"], dparams)
            bound.stream.wait()
        self._idle[True].append(bound)

    def _weights(self, bound: BoundProgram, weights: Weights, index: int) -> dict[int, int]:
        addresses = self._weight_cache.addresses(weights, bound.stacks[index].conversions, bound.stream)
        return addresses | {BIAS: weights.arrays.addresses[f"bias{index}"]}

    def _data(self, index: int, addresses: Mapping[str, int]) -> dict[int, int]:
        """The addresses of the data that a stack reads and writes, among them its part of each state."""
        spec = self._layout.spec
        row = self._layout.stacks[index].first * spec.num_directions * self._shape[1]
        arguments = {SRC[0]: addresses[f"y{index - 1}" if index else "x"], DST[0]: addresses[f"y{index}"]}
        for source, target, name in zip(SRC[1:], DST[1:], spec.state_names, strict=False):
            offset = row * spec.size_of(name) * ITEM
            arguments[source] = addresses[f"{name}0"] + offset
            arguments[target] = addresses[f"{name}_n"] + offset
        if f"workspace{index}" in addresses:
            arguments[WORKSPACE] = addresses[f"workspace{index}"]
        return arguments
