"""The NumPy reference as an engine: slow, unfused, and what the others are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.cell.trace import traced_cell
from fusedrnn.engines.grad_buffers import Gradients, put
from fusedrnn.engines.reference import backward as reference_training
from fusedrnn.engines.reference import forward as reference
from fusedrnn.engines.reference.backward import Tape, flows
from fusedrnn.engines.registry import Keep
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class KeptTape:
    """A tape, and the memory it holds: its own, and the copies of what it was made from (lengths left out)."""

    tape: Tape
    nbytes: int


class ReferenceEngine:
    """Runs one spec on :mod:`fusedrnn.engines.reference.forward`.

    Whatever a call asks to be kept, its tape holds every intermediate value that a gradient uses, so that nothing is
    computed again and the bits are the same.
    """

    def __init__(self, spec: RNNSpec) -> None:
        self.spec = spec

    def compile(self, training: bool = False) -> None:
        """Nothing to do."""

    def forward(
        self, x: Array, params: Array, states: Sequence[Array] | None, lengths: Array | None, y: Array
    ) -> tuple[Array, ...]:
        """Inference; see :class:`fusedrnn.engines.registry.Engine`."""
        result, final = reference.forward(self.spec, x, params, states, lengths)
        _copy(y, result, lengths)
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
    ) -> tuple[tuple[Array, ...], KeptTape]:
        """Training; see :class:`fusedrnn.engines.registry.Engine`."""
        # The tape refers to what it is made from, which is the caller's.
        x, params = x.copy(), params.copy()
        states = None if states is None else [state.copy() for state in states]
        lengths = None if lengths is None else lengths.copy()
        result, final, tape = reference_training.train(self.spec, x, params, states, lengths, seed)
        _copy(y, result, lengths)
        return final, KeptTape(tape, tape.nbytes + self._copied_bytes(*x.shape[:2]))

    def backward(self, kept: KeptTape, dy: Array | None, dstates: Sequence[Array | None], gradients: Gradients) -> None:
        """The gradients; see :class:`fusedrnn.engines.registry.Engine`."""
        tape = kept.tape
        dx, dparams, dinitial = reference_training.backward(self.spec, tape, dy, dstates)
        if gradients.x is not None:
            ends = [len(dx)] * dx.shape[1] if tape.lengths is None else tape.lengths
            for row, end in enumerate(ends):
                put(gradients.x[:end, row], dx[:end, row], gradients.add_x)
        if gradients.params is not None:
            put(gradients.params, dparams, gradients.add_params)
        for into, gradient in zip(gradients.states or (), dinitial, strict=gradients.states is not None):
            put(into, gradient, gradients.add_states)

    def reserve_bytes(self, steps: int, batch: int, keep: Keep) -> int:
        """The bytes of the tape and its copies, which do not depend on ``keep``."""
        spec = self.spec
        item = np.dtype(spec.dtype).itemsize
        outputs = (spec.num_layers - 1) * steps * batch * spec.output_size
        passes = spec.num_layers * spec.num_directions
        per_step = sum(prod(shape) for shape in spec.state_shape(batch))
        per_step += passes * batch * spec.hidden_size * len(flows(traced_cell(spec.variant)).kept)
        masks = outputs if spec.dropout else 0
        return (outputs + steps * per_step) * item + masks + self._copied_bytes(steps, batch)

    def _copied_bytes(self, steps: int, batch: int) -> int:
        """Bytes of input, parameters and initial states."""
        states = sum(prod(shape) for shape in self.spec.state_shape(batch))
        count = steps * batch * self.spec.input_size + self.spec.layout.size + states
        return count * np.dtype(self.spec.dtype).itemsize


def _copy(y: Array, result: Array, lengths: Array | None) -> None:
    """Write the output, but not behind the sequences' lengths."""
    where: Any = True if lengths is None else (np.arange(len(y))[:, None] < lengths)[:, :, None]
    np.copyto(y, result, where=where)
