"""The engine that runs one spec on oneDNN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.backends.onednn.layout import Layout
from fusedrnn.backends.onednn.library import load
from fusedrnn.backends.onednn.primitives import BIAS, DIFF, DST_LAYER, SCRATCHPAD, SRC_LAYER, WORKSPACE
from fusedrnn.backends.onednn.program import Frame, Program
from fusedrnn.backends.onednn.threads import allowed, bounds
from fusedrnn.backends.onednn.weights import Keeper, Weights, floats, lines
from fusedrnn.engine.locks import Lock
from fusedrnn.engine.threads import get_num_threads
from fusedrnn.engine.workspace import Lease, Pool
from fusedrnn.gradients import Gradients, put
from fusedrnn.registry import Keep
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
# Programs that an engine keeps: each is for one length, batch and number of threads.
_MOST_PROGRAMS = 16
_MOST_IDLE = 4


@dataclass
class KeptCall:
    """What a training call keeps: all that its primitives read and wrote.

    Attributes:
        program: Its primitives.
        weights: Its parameters.
        lease: The memory, as ``program.kept`` says.
        nbytes: How much that is.
        fresh: One element while the workspaces are as forward left them: backward spoils them, once.
    """

    program: Program
    weights: Weights
    lease: Lease
    nbytes: int
    fresh: list[bool] = field(default_factory=lambda: [True])

    def array(self, name: str) -> Array:
        """One of the arrays."""
        places = self.program.kept
        return floats(self.lease, places[name], places.shape(name))


class OneDNNEngine:
    """Runs one spec on oneDNN's primitives.

    Those are made for a length, a batch and a number of threads, at the first call with these, and the last few kept.

    Args:
        spec: What to run.

    Raises:
        ImportError: If the library is not there.
    """

    def __init__(self, spec: RNNSpec) -> None:
        self.spec = spec
        self._library = load()
        self._bounded = bounds(self._library)
        self._layout = Layout(self._library, spec)
        self._keeper = Keeper(self._library, self._layout, spec.layout.size)
        self._programs: OrderedDict[tuple[int, int, bool, int], Program] = OrderedDict()
        self._lock = Lock()
        self._pool = Pool(_MOST_IDLE)
        self._states = [1 + number for number in range(len(spec.state_names))]
        self._program(1, 1, False, 1)  # a cell that the library has not shows now

    def compile(self, training: bool = False) -> None:
        """Nothing to do: what oneDNN compiles depends on sizes that only a call has."""

    def forward(
        self, x: Array, params: Array, states: Sequence[Array] | None, lengths: Array | None, y: Array
    ) -> tuple[Array, ...]:
        """Inference; see :class:`fusedrnn.registry.Engine`."""
        threads = allowed(get_num_threads())
        with self._bounded(threads):
            program = self._program(*x.shape[:2], False, threads)
            weights = self._keeper.at(params)
            places, lease = program.scratch, self._pool.lease(program.scratch.size)
            x = np.ascontiguousarray(x)
            final = tuple(np.empty(shape, np.float32) for shape in self.spec.state_shape(x.shape[1]))
            last = len(program.steps) - 1
            direct = y.flags.c_contiguous
            result = y if direct else floats(lease, places[f"y{last % 2}"], y.shape)
            outputs = [lease.address + places[f"y{index % 2}"] for index in range(last)] + [_address(result)]
            initial = [_address(state) for state in states or self._zeros(program, lease)]
            scratchpad = lease.address + places["scratchpad"]
            self._run_forward(program, weights, _address(x), initial, outputs, [_address(s) for s in final], scratchpad)
            if not direct:
                y[...] = result
        return final

    def train(
        self,
        x: Array,
        params: Array,
        states: Sequence[Array] | None,
        lengths: Array | None,
        y: Array,
        keep: Keep,
        seed: int,
    ) -> tuple[tuple[Array, ...], KeptCall]:
        """Training; see :class:`fusedrnn.registry.Engine`. Whatever ``keep`` asks for, oneDNN keeps the same."""
        threads = allowed(get_num_threads())
        with self._bounded(threads):
            program = self._program(*x.shape[:2], True, threads)
            size = program.kept.size
            kept = KeptCall(program, self._keeper.at(params), self._pool.lease(size), size)
            kept.array("x")[...] = x
            for index, name in enumerate(self.spec.state_names):
                kept.array(f"{name}0")[...] = 0 if states is None else states[index]
            self._fill(kept, kept.lease)
        y[...] = kept.array(f"y{len(program.steps) - 1}")
        return tuple(kept.array(f"{name}_n").copy() for name in self.spec.state_names), kept

    def backward(self, kept: KeptCall, dy: Array | None, dstates: Sequence[Array | None], gradients: Gradients) -> None:
        """The gradients; see :class:`fusedrnn.registry.Engine`. It runs on as many threads as its forward did."""
        program = kept.program
        with self._bounded(allowed(program.threads)):
            lease = kept.lease
            try:
                kept.fresh.pop()
            except IndexError:
                # An earlier backward has spoilt the workspaces, or another thread's is about to.
                lease = self._pool.lease(program.kept.size)
                for name in ("x", *(f"{name}0" for name in self.spec.state_names)):
                    floats(lease, program.kept[name], program.kept.shape(name))[...] = kept.array(name)
                self._fill(kept, lease)
            frame = program.take(True)
            scratch = self._pool.lease(program.scratch.size + lines(frame.scratch))
            self._run_backward(program, frame, kept.weights, lease, scratch, dy, dstates, gradients)
            program.give(frame, True)

    def reserve_bytes(self, steps: int, batch: int, keep: Keep) -> int:
        """The bytes of what a training call keeps, which do not depend on ``keep``."""
        threads = allowed(get_num_threads())
        with self._bounded(threads):
            return self._program(steps, batch, True, threads).kept.size

    def _program(self, steps: int, batch: int, training: bool, threads: int) -> Program:
        key = steps, batch, training, threads
        with self._lock:
            found = self._programs.pop(key, None)
            if found is None:
                found = Program(self._library, self.spec, self._layout, steps, batch, training, threads)
            self._programs[key] = found
            while len(self._programs) > _MOST_PROGRAMS:
                self._programs.popitem(last=False)
            return found

    def _zeros(self, program: Program, lease: Lease) -> list[Array]:
        zeros = []
        for name in self.spec.state_names:
            zeros.append(floats(lease, program.scratch[f"{name}0"], program.scratch.shape(f"{name}0")))
            zeros[-1].fill(0)
        return zeros

    def _fill(self, kept: KeptCall, lease: Lease) -> None:
        """Run a training call's forward in its memory, or in other memory like it."""
        program, places = kept.program, kept.program.kept
        scratch = self._pool.lease(program.scratch.size)
        begin = lease.address

        def at(*names: str) -> list[int]:
            return [begin + places[name] for name in names]

        count, states = len(program.steps), self.spec.state_names
        self._run_forward(
            program,
            kept.weights,
            *at("x"),
            at(*(f"{name}0" for name in states)),
            at(*(f"y{index}" for index in range(count))),
            at(*(f"{name}_n" for name in states)),
            scratch.address + program.scratch["scratchpad"],
            at(*(f"workspace{index}" for index in range(count))),
        )

    def _run_forward(
        self,
        program: Program,
        weights: Weights,
        x: int,
        initial: Sequence[int],
        outputs: Sequence[int],
        final: Sequence[int],
        scratchpad: int,
        workspaces: Sequence[int] | None = None,
    ) -> None:
        """Run all stacks on memory at these addresses."""
        frame = program.take(False)
        for index in range(len(program.steps)):
            given = self._weights(program, frame, weights, index)
            given |= {SRC_LAYER: x, DST_LAYER: outputs[index], SCRATCHPAD: scratchpad}
            given |= self._state_addresses(program, index, SRC_LAYER, initial)
            given |= self._state_addresses(program, index, DST_LAYER, final)
            if workspaces is not None:
                given[WORKSPACE] = workspaces[index]
            frame.runs[index](frame.stream.handle, given)
            x = outputs[index]
        frame.stream.wait()
        program.give(frame, False)

    def _run_backward(
        self,
        program: Program,
        frame: Frame,
        weights: Weights,
        lease: Lease,
        scratch: Lease,
        dy: Array | None,
        dstates: Sequence[Array | None],
        gradients: Gradients,
    ) -> None:
        spec, places, kept = self.spec, program.scratch, program.kept
        names = spec.state_names

        def scratch_array(name: str) -> Array:
            return floats(scratch, places[name], places.shape(name))

        def given_or_zero(array: Array | None, name: str) -> Array:
            """What the caller gave, or zeros, contiguous."""
            if array is not None and array.flags.c_contiguous:
                return array
            own = scratch_array(name)
            own[...] = 0 if array is None else array
            return own

        def written(into: Array | None, name: str, add: bool) -> Array:
            """Where a gradient is made: where it is wanted, if that will do."""
            there = into is not None and not add and into.flags.c_contiguous
            return into if into is not None and there else scratch_array(name)

        last = len(program.steps) - 1
        upper = given_or_zero(dy, f"y{last % 2}")
        final = [given_or_zero(one, f"{name}_n") for one, name in zip(dstates, names, strict=True)]
        dx = written(gradients.x, "x", gradients.add_x)
        wanted = gradients.states or (None,) * len(names)
        initial = [written(one, f"{n}0", gradients.add_states) for one, n in zip(wanted, names, strict=True)]
        theirs = written(None if self._layout.swaps else gradients.params, "theirs", gradients.add_params)
        above = _address(upper)
        for index in range(last, -1, -1):
            below = scratch.address + places[f"y{(index + 1) % 2}"] if index else _address(dx)
            given = self._weights(program, frame, weights, index)
            given |= {SRC_LAYER: lease.address + kept[f"y{index - 1}" if index else "x"]}
            given |= {DST_LAYER: lease.address + kept[f"y{index}"], WORKSPACE: lease.address + kept[f"workspace{index}"]}
            for first, suffix in ((SRC_LAYER, "0"), (DST_LAYER, "_n")):
                held = [lease.address + kept[f"{name}{suffix}"] for name in names]
                given |= self._state_addresses(program, index, first, held)
            given |= {DIFF + SRC_LAYER: below, DIFF + DST_LAYER: above}
            given |= self._state_addresses(program, index, DIFF + SRC_LAYER, [_address(one) for one in initial])
            given |= self._state_addresses(program, index, DIFF + DST_LAYER, [_address(one) for one in final])
            given |= {
                DIFF + argument: scratch.address + places[f"{argument} {index}"]
                for argument in (*self._layout.arguments, BIAS)
            }
            frame.runs[index](frame.stream.handle, given | {SCRATCHPAD: scratch.address + places["scratchpad"]})
            above = below
            if gradients.params is not None:
                self._collect(program, frame, index, scratch, theirs)
        frame.stream.wait()
        if gradients.x is not None and dx is not gradients.x:
            put(gradients.x, dx, gradients.add_x)
        for into, gradient in zip(gradients.states or (), initial, strict=gradients.states is not None):
            if into is not gradient:
                put(into, gradient, gradients.add_states)
        if gradients.params is not None and theirs is not gradients.params:
            self._layout.put(gradients.params, theirs, gradients.add_params)

    def _collect(self, program: Program, frame: Frame, index: int, scratch: Lease, theirs: Array) -> None:
        """Bring a stack's gradients of parameters to where they lie in the flat vector."""
        places, stack = program.scratch, program.steps[index].stack
        for argument, reorder in frame.reorders[index].items():
            source = scratch.address + places[f"{argument} {index}"]
            target = _address(theirs) + self._layout.offset(stack, argument)
            reorder(frame.stream.handle, source, target, scratch.address + places.size)
        frame.stream.wait()
        bias = floats(scratch, places[f"{BIAS} {index}"], places.shape(f"{BIAS} {index}"))
        self._layout.put_bias(stack, bias, theirs)

    def _weights(self, program: Program, frame: Frame, weights: Weights, index: int) -> dict[int, int]:
        """The addresses of a stack's parameters, in the layouts that its primitive wants."""
        wanted = frame.wanted[index]
        found = {
            argument: self._keeper.address(weights, index, argument, descriptor, frame.stream)
            for argument, descriptor in wanted.items()
        }
        return found | {BIAS: weights.biases[index]}

    def _state_addresses(self, program: Program, index: int, first: int, whole: Sequence[int]) -> dict[int, int]:
        """The addresses of a stack's part of each state, by the arguments that follow ``first``."""
        begin = program.steps[index].stack.first * self.spec.num_directions * program.shape[1]
        sizes = [self.spec.size_of(name) for name in self.spec.state_names]
        return {
            first + number: address + begin * size * np.dtype(np.float32).itemsize
            for number, address, size in zip(self._states, whole, sizes, strict=True)
        }


def _address(array: Array) -> int:
    found: int = array.ctypes.data
    return found
