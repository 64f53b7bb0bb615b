"""The engine that runs one spec on oneDNN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.interface import SavePolicy
from fusedrnn.engines.onednn.library import load
from fusedrnn.engines.onednn.param_layout import Layout
from fusedrnn.engines.onednn.program import Program
from fusedrnn.engines.onednn.runner import Operands, Runner, address_of, array_in
from fusedrnn.engines.onednn.threads import clamp_threads, thread_limit
from fusedrnn.engines.onednn.weights import WeightCache, Weights, lines
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands, GradBuffers, write_or_add
from fusedrnn.locks import Lock
from fusedrnn.runtime.buffers import BufferPool, Lease
from fusedrnn.runtime.thread_pool import get_num_threads
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
# Programs that an engine keeps: each is for one length, batch and number of threads.
_MOST_PROGRAMS = 16
_MOST_IDLE = 4


@dataclass
class OnednnResiduals:
    """What a training call keeps: all that its primitives read and wrote.

    Attributes:
        program: Its primitives.
        weights: Its parameters.
        lease: The memory, as ``program.kept`` says.
        nbytes: How much that is.
        fresh: One element while the workspaces are as forward left them: backward spoils them.
    """

    program: Program
    weights: Weights
    lease: Lease
    nbytes: int
    fresh: list[bool] = field(default_factory=lambda: [True])

    def array(self, name: str) -> Array:
        """One of the arrays."""
        return array_in(self.lease, self.program, name, kept=True)


class OneDNNEngine:
    """Runs one spec on oneDNN's primitives.

    Those are made for a length, a batch and a number of threads, at the first call with these, and the last few kept.

    Args:
        spec: What to run.

    Raises:
        ImportError: If the library is not installed.
        NotImplementedError: If it has no such cell.
    """

    def __init__(self, spec: RNNSpec) -> None:
        self.spec = spec
        self._library = load()
        self._thread_limit = thread_limit(self._library)
        self._layout = Layout(self._library, spec)
        self._weight_cache = WeightCache(self._library, self._layout, spec.layout.size)
        self._runner = Runner(spec, self._layout, self._weight_cache)
        self._programs: OrderedDict[tuple[int, int, bool, int], Program] = OrderedDict()
        self._lock = Lock()
        self._pool = BufferPool(_MOST_IDLE)
        with self._thread_limit(clamp_threads(self._library, 1)):
            self._program(1, 1, True, 1)  # raises now if the library lacks the cell

    def compile(self, training: bool = False) -> None:
        """Look whether training is possible; what oneDNN compiles depends on sizes that only a call has.

        Raises:
            NotImplementedError: If ``training`` is true and oneDNN corrupts memory when it trains this spec.
        """
        if training:
            _check_training(self.spec)

    def forward(self, operands: ForwardOperands) -> tuple[Array, ...]:
        """Inference; see :class:`fusedrnn.engines.interface.Engine`."""
        params, states, y = operands.params, operands.states, operands.y
        x = np.ascontiguousarray(operands.x)
        steps, batch = x.shape[:2]
        final = tuple(np.empty(shape, np.float32) for shape in self.spec.state_shape(batch))
        threads = clamp_threads(self._library, get_num_threads())
        with self._thread_limit(threads):
            program = self._program(steps, batch, False, threads)
            lease = self._pool.lease(program.scratch.size)
            begin, places, last = lease.address, program.scratch, len(program.steps) - 1
            result = y if y.flags.c_contiguous else array_in(lease, program, f"y{last % 2}")
            if states is None:
                states = [array_in(lease, program, f"{name}0") for name in self.spec.state_names]
                for state in states:
                    state.fill(0)
            addresses = Operands(
                address_of(x),
                [address_of(state) for state in states],
                [begin + places[f"y{index % 2}"] for index in range(last)] + [address_of(result)],
                [address_of(state) for state in final],
            )
            self._runner.forward(program, self._weight_cache.at(params), addresses, begin + places["scratchpad"])
            if result is not y:
                y[...] = result
        return final

    def train(
        self, operands: ForwardOperands, save: SavePolicy, seed: int
    ) -> tuple[tuple[Array, ...], OnednnResiduals]:
        """Training; see :class:`fusedrnn.engines.interface.Engine`. oneDNN saves the same for every ``save``.

        Raises:
            NotImplementedError: If oneDNN corrupts memory when it trains this spec.
        """
        _check_training(self.spec)
        steps, batch = operands.x.shape[:2]
        threads = clamp_threads(self._library, get_num_threads())
        with self._thread_limit(threads):
            program = self._program(steps, batch, True, threads)
            size = program.kept.size
            kept = OnednnResiduals(program, self._weight_cache.at(operands.params), self._pool.lease(size), size)
            kept.array("x")[...] = operands.x
            for index, name in enumerate(self.spec.state_names):
                kept.array(f"{name}0")[...] = 0 if operands.states is None else operands.states[index]
            self._fill(kept, kept.lease)
        operands.y[...] = kept.array(f"y{len(program.steps) - 1}")
        return tuple(kept.array(f"{name}_n").copy() for name in self.spec.state_names), kept

    def backward(self, residuals: OnednnResiduals, operands: BackwardOperands) -> None:
        """The gradients; see :class:`fusedrnn.engines.interface.Engine`. Runs on as many threads as its forward."""
        program, grads = residuals.program, operands.grads
        with self._thread_limit(clamp_threads(self._library, program.threads)):
            frame = program.take(True)
            scratch = self._pool.lease(program.scratch.size + lines(frame.scratch))
            arrays = _GradientArrays(self.spec, program, scratch, grads)
            saved = self._operands(program, self._fresh_workspace(residuals))
            gradients = arrays.operands(operands.dy, operands.dstates)
            self._runner.backward(program, frame, residuals.weights, saved, gradients, scratch)
            arrays.finish()
            if grads.params is not None:
                direct = not (grads.add_params or self._layout.swaps)
                theirs = grads.params if direct else array_in(scratch, program, "theirs")
                self._runner.collect(program, frame, scratch, theirs)
                if not direct:
                    self._layout.put(grads.params, theirs, grads.add_params)
            program.give(frame, True)

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy) -> int:
        """The bytes of what a training call keeps, which do not depend on ``save``."""
        threads = clamp_threads(self._library, get_num_threads())
        with self._thread_limit(threads):
            return self._program(steps, batch, True, threads).kept.size

    def _program(self, steps: int, batch: int, training: bool, threads: int) -> Program:
        key = steps, batch, training, threads
        with self._lock:
            program = self._programs.pop(key, None)
            if program is None:
                program = Program(self._library, self.spec, self._layout, steps, batch, training, threads)
            self._programs[key] = program
            while len(self._programs) > _MOST_PROGRAMS:
                self._programs.popitem(last=False)
            return program

    def _operands(self, program: Program, lease: Lease) -> Operands:
        """What a training call's memory holds."""

        def at(*names: str) -> list[int]:
            return [lease.address + program.kept[name] for name in names]

        stacks, states = range(len(program.steps)), self.spec.state_names
        return Operands(
            lease.address + program.kept["x"],
            at(*(f"{name}0" for name in states)),
            at(*(f"y{index}" for index in stacks)),
            at(*(f"{name}_n" for name in states)),
            at(*(f"workspace{index}" for index in stacks)),
        )

    def _fill(self, kept: OnednnResiduals, lease: Lease) -> None:
        """Run a training call's forward in its memory, or in other memory like it."""
        program = kept.program
        scratch = self._pool.lease(program.scratch.size)
        scratchpad = scratch.address + program.scratch["scratchpad"]
        self._runner.forward(program, kept.weights, self._operands(program, lease), scratchpad)

    def _fresh_workspace(self, kept: OnednnResiduals) -> Lease:
        """Memory with intact workspaces: the call's own, or a recomputed copy once a backward has taken that."""
        try:
            kept.fresh.pop()
            return kept.lease
        except IndexError:
            lease = self._pool.lease(kept.program.kept.size)
            for name in ("x", *(f"{name}0" for name in self.spec.state_names)):
                array_in(lease, kept.program, name, kept=True)[...] = kept.array(name)
            self._fill(kept, lease)
            return lease


class _GradientArrays:
    """Arrays that backward writes gradients of data to: the caller's buffers where possible, else scratch."""

    def __init__(self, spec: RNNSpec, program: Program, scratch: Lease, grads: GradBuffers) -> None:
        self._spec, self._program, self._scratch, self._grads = spec, program, scratch, grads
        self._x = self._written(grads.x, "x", grads.add_x)
        buffers = grads.states or (None,) * len(spec.state_names)
        self._initial = [
            self._written(buffer, f"{name}0", grads.add_states)
            for buffer, name in zip(buffers, spec.state_names, strict=True)
        ]

    def operands(self, dy: Array | None, dstates: Sequence[Array | None]) -> Operands:
        """The addresses of all gradients, from the gradients of the results."""
        program, last = self._program, len(self._program.steps) - 1
        begin = self._scratch.address
        self._result_grads = [self._read(dy, f"y{last % 2}")]
        self._result_grads += [
            self._read(array, f"{n}_n") for array, n in zip(dstates, self._spec.state_names, strict=True)
        ]
        upper, *final = [address_of(array) for array in self._result_grads]
        between = [begin + program.scratch[f"y{index % 2}"] for index in range(last)]
        return Operands(address_of(self._x), [address_of(array) for array in self._initial], [*between, upper], final)

    def finish(self) -> None:
        """Copy or add gradients from scratch to the caller's buffers."""
        grads = self._grads
        if grads.x is not None and self._x is not grads.x:
            write_or_add(grads.x, self._x, grads.add_x)
        for buffer, gradient in zip(grads.states or (), self._initial, strict=grads.states is not None):
            if buffer is not gradient:
                write_or_add(buffer, gradient, grads.add_states)

    def _read(self, array: Array | None, name: str) -> Array:
        """The caller's array, copied if it is not contiguous; zeros for None."""
        if array is not None and array.flags.c_contiguous:
            return array
        own = array_in(self._scratch, self._program, name)
        own[...] = 0 if array is None else array
        return own

    def _written(self, into: Array | None, name: str, add: bool) -> Array:
        if into is not None and not add and into.flags.c_contiguous:
            return into
        return array_in(self._scratch, self._program, name)


def _check_training(spec: RNNSpec) -> None:
    """Reject training that corrupts memory: oneDNN 3.13, reset_after=False, inputs wider than hidden_size."""
    widest = max(spec.layer_input_size(layer) for layer in range(spec.num_layers))
    if not spec.reset_after and widest > spec.hidden_size:
        raise NotImplementedError(
            f"training with reset_after=False where a layer reads {widest} features, more than hidden_size "
            f"({spec.hidden_size}), is not supported by engine 'onednn': oneDNN 3.13 writes past its memory there"
        )
