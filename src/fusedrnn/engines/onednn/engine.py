"""The engine that runs one spec on oneDNN's primitives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.interface import SavePolicy
from fusedrnn.engines.onednn.arrays import Arrays
from fusedrnn.engines.onednn.library import load
from fusedrnn.engines.onednn.param_layout import ParamLayout
from fusedrnn.engines.onednn.program import Program
from fusedrnn.engines.onednn.threads import thread_limit
from fusedrnn.engines.onednn.weights import WeightCache, Weights
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands, write_or_add
from fusedrnn.locks import Lock
from fusedrnn.runtime.buffers import BufferPool
from fusedrnn.runtime.thread_pool import get_num_threads
from fusedrnn.spec import RNNSpec

# Programs that an engine caches, each for one length, batch and number of threads.
MAX_PROGRAMS = 16
_MAX_IDLE = 4


@dataclass
class OnednnResiduals:
    """What a training call saves: all that its primitives read and wrote.

    Attributes:
        program: Its primitives.
        weights: Its parameters.
        reserve: The arrays, as in ``program.reserve``.
        nbytes: Bytes of these.
        intact: One element, until a backward call takes the workspaces to overwrite them.
    """

    program: Program
    weights: Weights
    reserve: Arrays
    nbytes: int
    intact: list[bool] = field(default_factory=lambda: [True])


class OneDNNEngine:
    """Runs one spec on oneDNN's primitives.

    Primitives are created at the first call with a length, batch and number of threads; those used last are cached.

    Args:
        spec: What to run.

    Raises:
        ImportError: If the library is not installed.
        NotImplementedError: If it has no such cell.
    """

    def __init__(self, spec: RNNSpec) -> None:
        self.spec = spec
        library = load()
        self._limit_threads = thread_limit(library)
        self._layout = ParamLayout(library, spec)
        self._weight_cache = WeightCache(self._layout)
        self._programs: OrderedDict[tuple[int, int, bool, int], Program] = OrderedDict()
        self._lock = Lock()
        self._pool = BufferPool(_MAX_IDLE)
        with self._limit_threads(1):
            self._program(1, 1, True, 1)  # raises now if the library lacks the cell

    def compile(self, training: bool = False) -> None:
        """Check whether training is possible. What oneDNN compiles depends on sizes that only a call has.

        Raises:
            NotImplementedError: If ``training`` is true and oneDNN corrupts memory when it trains this spec.
        """
        if training:
            _check_training(self.spec)

    def forward(self, operands: ForwardOperands) -> tuple[Array, ...]:
        """Inference; see :class:`fusedrnn.engines.interface.Engine`."""
        x = np.ascontiguousarray(operands.x)
        steps, batch = x.shape[:2]
        with self._limit_threads(get_num_threads()) as threads:
            program = self._program(steps, batch, False, threads)
            arrays = Arrays(program.scratch, self._pool)
            arrays.replace("x", x)
            for name, state in self._named(operands.states):
                arrays.read(f"{name}0", state)
            final = [np.empty(shape, np.float32) for shape in self.spec.state_shape(batch)]
            for name, state in zip(self.spec.state_names, final, strict=True):
                arrays.replace(f"{name}_n", state)
            y = arrays.write(program.output, operands.y)
            program.forward(self._weight_cache.at(operands.params), arrays.addresses)
            if y is not operands.y:
                operands.y[...] = y
        return tuple(final)

    def train(
        self, operands: ForwardOperands, save: SavePolicy, seed: int
    ) -> tuple[tuple[Array, ...], OnednnResiduals]:
        """Training; see :class:`fusedrnn.engines.interface.Engine`. oneDNN saves the same for every ``save``.

        Raises:
            NotImplementedError: If oneDNN corrupts memory when it trains this spec.
        """
        _check_training(self.spec)
        steps, batch = operands.x.shape[:2]
        with self._limit_threads(get_num_threads()) as threads:
            program = self._program(steps, batch, True, threads)
            reserve = Arrays(program.reserve, self._pool)
            weights = self._weight_cache.at(operands.params)
            residuals = OnednnResiduals(program, weights, reserve, program.reserve.nbytes)
            reserve["x"][...] = operands.x
            for name, state in self._named(operands.states):
                reserve[f"{name}0"][...] = 0 if state is None else state
            self._run_forward(residuals, reserve)
        operands.y[...] = reserve[program.output]
        return tuple(reserve[f"{name}_n"].copy() for name in self.spec.state_names), residuals

    def backward(self, residuals: OnednnResiduals, operands: BackwardOperands) -> None:
        """The gradients; see :class:`fusedrnn.engines.interface.Engine`. Runs on as many threads as its forward."""
        program, grads = residuals.program, operands.grads
        with self._limit_threads(program.threads):
            scratch = Arrays(program.scratch, self._pool)
            scratch.read(program.output, operands.dy)
            for name, dstate in self._named(operands.dstates):
                scratch.read(f"{name}_n", dstate)
            initial = [(f"{name}0", buffer, grads.add_states) for name, buffer in self._named(grads.states)]
            buffers = [("x", grads.x, grads.add_x), *initial]
            targets = [scratch.write(name, None if add else buffer) for name, buffer, add in buffers]
            in_place = not (grads.add_params or self._layout.reorders_gates)
            dparams = grads.params if grads.params is None or in_place else scratch["params"]
            reserve = self._intact_reserve(residuals)  # in use until the end of this call
            program.backward(residuals.weights, reserve.addresses, scratch, dparams)
            for (_, buffer, add), target in zip(buffers, targets, strict=True):
                if buffer is not None and buffer is not target:
                    write_or_add(buffer, target, add)
            if grads.params is not None and not in_place:
                self._layout.write_gradient(grads.params, scratch["params"], grads.add_params)

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy) -> int:
        """The bytes of what a training call saves, which do not depend on ``save``."""
        with self._limit_threads(get_num_threads()) as threads:
            return self._program(steps, batch, True, threads).reserve.nbytes

    def _named(self, states: Sequence[Array | None] | None) -> list[tuple[str, Array | None]]:
        """The array of each state with the state's name; None instead of the arrays stands for one None each."""
        names = self.spec.state_names
        return list(zip(names, (None,) * len(names) if states is None else states, strict=True))

    def _program(self, steps: int, batch: int, training: bool, threads: int) -> Program:
        key = steps, batch, training, threads
        with self._lock:
            program = self._programs.pop(key, None)
            if program is None:
                program = Program(self._layout, self._weight_cache, *key)
            self._programs[key] = program
            while len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
            return program

    def _run_forward(self, residuals: OnednnResiduals, reserve: Arrays) -> None:
        """Run a training call's forward in its reserve, or in another one that holds its input and initial states."""
        program = residuals.program
        scratch = Arrays(program.scratch, self._pool)
        scratchpad = {"scratchpad": scratch.addresses["scratchpad"]}
        program.forward(residuals.weights, reserve.addresses | scratchpad)

    def _intact_reserve(self, residuals: OnednnResiduals) -> Arrays:
        """A reserve with intact workspaces: the call's own, or a recomputed one if a backward call has taken that."""
        try:
            residuals.intact.pop()
            return residuals.reserve
        except IndexError:
            reserve = Arrays(residuals.program.reserve, self._pool)
            for name in ("x", *(f"{name}0" for name in self.spec.state_names)):
                reserve[name][...] = residuals.reserve[name]
            self._run_forward(residuals, reserve)
            return reserve


def _check_training(spec: RNNSpec) -> None:
    """Reject training that corrupts memory: oneDNN 3.13, reset_after=False, inputs wider than hidden_size."""
    widest = max(spec.layer_input_size(layer) for layer in range(spec.num_layers))
    if not spec.reset_after and widest > spec.hidden_size:
        raise NotImplementedError(
            f"training with reset_after=False where a layer reads {widest} features, more than hidden_size "
            f"({spec.hidden_size}), is not supported by engine 'onednn': oneDNN 3.13 writes past its memory there"
        )
