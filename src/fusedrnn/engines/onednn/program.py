"""A network's primitives for one length and batch, and where the memory that they run on lies."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import prod

from fusedrnn.engines.onednn.library import Library, OneDNNError
from fusedrnn.engines.onednn.param_layout import Layout, Stack, cell_name
from fusedrnn.engines.onednn.primitives import (
    BIAS,
    DIFF,
    DST_ITER,
    DST_ITER_C,
    DST_LAYER,
    SCRATCHPAD,
    SRC_ITER,
    SRC_ITER_C,
    SRC_LAYER,
    WEIGHTS_ITER,
    WEIGHTS_LAYER,
    WEIGHTS_PEEPHOLE,
    WEIGHTS_PROJECTION,
    WORKSPACE,
    Descriptor,
    Primitive,
    Reorder,
    Run,
    Stream,
)
from fusedrnn.engines.onednn.weights import lines
from fusedrnn.spec import RNNSpec

_INFERENCE, _TRAINING, _BACKWARD = 96, 64, 128
_LEFT_TO_RIGHT, _RIGHT_TO_LEFT, _CONCATENATED = 1, 2, 3
_ACTIVATIONS = {"rnn_relu": 0x20, "rnn_tanh": 0x21}
_OVERWRITE = 1
"""The flag by which backward writes the gradients of weights; without it, it adds to what is there."""
_ITEM = 4
_MOST_IDLE = 4


class Places:
    """Where arrays of float32, or bytes, lie in one buffer."""

    def __init__(self) -> None:
        self._at: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.size = 0

    def add(self, name: str, *shape: int) -> None:
        """One more array."""
        self.add_bytes(name, prod(shape) * _ITEM, shape)

    def add_bytes(self, name: str, size: int, shape: tuple[int, ...] = ()) -> None:
        """One more of so many bytes."""
        self._at[name] = self.size, shape
        self.size += lines(size)

    def __getitem__(self, name: str) -> int:
        return self._at[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape it was added with."""
        return self._at[name][1]


class Step:
    """A stack's primitives for one length and batch.

    Args:
        library: The library.
        spec: The network.
        layout: How its parameters lie.
        stack: Which layers.
        steps: T.
        batch: N.
        training: Whether to prepare for backward.
    """

    def __init__(
        self, library: Library, spec: RNNSpec, layout: Layout, stack: Stack, steps: int, batch: int, training: bool
    ) -> None:
        self._library, self._spec, self._name = library, spec, cell_name(spec)
        self.stack = stack
        self.inputs = SRC_LAYER, SRC_ITER, *((SRC_ITER_C,) if spec.mode == "lstm" else ())
        self.weights = layout.arguments
        self.results = DST_LAYER, DST_ITER, *((DST_ITER_C,) if spec.mode == "lstm" else ())
        states = [(stack.layers, spec.num_directions, batch, spec.size_of(name)) for name in spec.state_names]
        shapes = dict(zip(self.inputs, [(steps, batch, stack.inputs), *states], strict=True))
        shapes |= zip(self.results, [(steps, batch, spec.output_size), *states], strict=True)
        shapes |= {argument: layout.dims(stack, argument) for argument in (*self.weights, BIAS)}
        free = {WEIGHTS_LAYER, WEIGHTS_ITER, WEIGHTS_PROJECTION}
        self._descriptors = {
            argument: Descriptor(library, shape, None) if argument in free else Descriptor.plain(library, *shape)
            for argument, shape in shapes.items()
        }
        self.forward = self._primitive("forward", _TRAINING if training else _INFERENCE)
        self.backward = self._primitive("backward", _BACKWARD, self.forward) if training else None

    def _primitive(self, direction: str, kind: int, hint: Primitive | None = None) -> Primitive:
        spec = self._spec
        way = _CONCATENATED if spec.bidirectional else _RIGHT_TO_LEFT if spec.reverse else _LEFT_TO_RIGHT
        optional = (WEIGHTS_PEEPHOLE, WEIGHTS_PROJECTION) if spec.mode == "lstm" else ()
        order = (*self.inputs, WEIGHTS_LAYER, WEIGHTS_ITER, *optional, BIAS, *self.results)
        handles = [self._descriptors[argument].handle if argument in self._descriptors else None for argument in order]
        activation = [_ACTIVATIONS[spec.mode]] if spec.mode in _ACTIVATIONS else []
        slopes = [0.0, 0.0] if activation else []
        flags, hints = (0, []) if hint is None else (_OVERWRITE, [hint.description])
        handles *= 1 if hint is None else 2  # a gradient has the layout of its array
        try:
            return Primitive(
                self._library, f"{self._name}_{direction}", self._library.engine, kind, *activation, way, *handles,
                flags, *slopes, *hints, self._library.attributes,
            )  # fmt: skip
        except OneDNNError as error:
            raise NotImplementedError(f"{spec} is not supported by oneDNN {self._library.version}: {error}") from None

    def arguments(self, primitive: Primitive) -> tuple[int, ...]:
        """The arguments of a primitive."""
        own = (*self.inputs, *self.weights, BIAS, *self.results)
        own += (WORKSPACE,) if self.backward is not None else ()
        own += tuple(DIFF + argument for argument in own if argument != WORKSPACE) if primitive is self.backward else ()
        return (*own, *((SCRATCHPAD,) if primitive.scratch else ()))


class ArgFrame:
    """Argument lists of a program's primitives, used by one call at a time.

    Args:
        library: The library.
        layout: How parameters lie.
        steps: The primitives, from below.
        backward: Whether it is for backward.

    Attributes:
        stream: The stream that they run on.
        runs: Each primitive.
        weight_layouts: The layout that each primitive needs for each of its weights.
        reorders: In backward, the reorders from the gradients of weights to the flat vector.
        scratch: Bytes of scratch that the reorders need.
    """

    def __init__(self, library: Library, layout: Layout, steps: Iterable[Step], backward: bool) -> None:
        self.stream = Stream(library)
        self.runs: list[Run] = []
        self.weight_layouts: list[dict[int, Descriptor]] = []
        self.reorders: list[dict[int, Reorder]] = []
        for step in steps:
            primitive = step.backward if backward else step.forward
            assert primitive is not None
            self.runs.append(Run(primitive, step.arguments(primitive)))
            self.weight_layouts.append({argument: primitive.descriptor(argument) for argument in step.weights})
            grad_layouts = {argument: primitive.descriptor(DIFF + argument) for argument in step.weights if backward}
            self.reorders.append(
                {
                    argument: Reorder(library, grad_layout, layout.in_place(step.stack, argument))
                    for argument, grad_layout in grad_layouts.items()
                }
            )
        self.scratch = max(
            (reorder.scratch for step_reorders in self.reorders for reorder in step_reorders.values()), default=0
        )


class Program:
    """What runs a network on sequences of T steps, N at a time.

    Args:
        library: The library.
        spec: The network.
        layout: How its parameters lie.
        steps: T.
        batch: N.
        training: Whether to prepare for backward.
        threads: How many it is made for, and runs on.

    Attributes:
        steps: The primitives, from below.
        shape: T and N.
        threads: As above.
        kept: What a training call keeps: its input, states, outputs, and oneDNN's workspaces.
        scratch: What a call needs while it runs: states and outputs, or the gradients of these and of all else.

    Raises:
        NotImplementedError: If the library has no such primitive.
    """

    def __init__(
        self, library: Library, spec: RNNSpec, layout: Layout, steps: int, batch: int, training: bool, threads: int
    ) -> None:
        self._library, self._layout = library, layout
        self.shape, self.threads = (steps, batch), threads
        self.steps = [Step(library, spec, layout, stack, steps, batch, training) for stack in layout.stacks]
        self._idle: dict[bool, deque[ArgFrame]] = {backward: deque(maxlen=_MOST_IDLE) for backward in (False, True)}
        self._lay_out(spec, training)

    def _lay_out(self, spec: RNNSpec, training: bool) -> None:
        steps, batch = self.shape
        states = dict(zip(spec.state_names, spec.state_shape(batch), strict=True))
        output = steps, batch, spec.output_size
        kept, scratch = self.kept, self.scratch = Places(), Places()
        # Outputs between stacks: one buffer is read while the other is written.
        for parity in range(2):
            scratch.add(f"y{parity}", *output)
        for name, shape in states.items():
            scratch.add(f"{name}0", *shape)
            scratch.add(f"{name}_n", *shape)
        if not training:
            scratch.add_bytes("scratchpad", max(step.forward.scratch for step in self.steps))
            return
        self._lay_out_gradients(spec)
        kept.add("x", steps, batch, spec.input_size)
        for name, shape in states.items():
            kept.add(f"{name}0", *shape)
            kept.add(f"{name}_n", *shape)
        for index, step in enumerate(self.steps):
            kept.add(f"y{index}", *output)
            kept.add_bytes(f"workspace{index}", step.forward.descriptor(WORKSPACE).nbytes)

    def _lay_out_gradients(self, spec: RNNSpec) -> None:
        scratch, largest = self.scratch, 0
        scratch.add("x", *self.shape, spec.input_size)
        scratch.add("theirs", spec.layout.size)
        for index, step in enumerate(self.steps):
            assert step.backward is not None
            largest = max(largest, step.forward.scratch, step.backward.scratch)
            scratch.add(f"{BIAS} {index}", *self._layout.dims(step.stack, BIAS))
            for argument in step.weights:
                scratch.add_bytes(f"{argument} {index}", step.backward.descriptor(DIFF + argument).nbytes)
        scratch.add_bytes("scratchpad", largest)

    def take(self, backward: bool) -> ArgFrame:
        """A frame that no other call uses. Needs no lock: a deque's operations are atomic."""
        try:
            return self._idle[backward].pop()
        except IndexError:
            return ArgFrame(self._library, self._layout, self.steps, backward)

    def give(self, frame: ArgFrame, backward: bool) -> None:
        """Return a frame for later calls."""
        self._idle[backward].append(frame)
