"""The NumPy reference as an engine: slow and unfused; tests compare the other engines with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.cell.trace import traced_cell
from fusedrnn.engines.grad_buffers import Gradients, put
from fusedrnn.engines.reference.backward import Tape, backward, step_vjp, train
from fusedrnn.engines.reference.forward import forward
from fusedrnn.engines.registry import Keep
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class NumpyResiduals:
    """A tape, and the bytes of the tape and of the copies that it refers to, lengths excepted."""

    tape: Tape
    nbytes: int


class ReferenceEngine:
    """Runs one spec on NumPy.

    The tape holds every intermediate value that a gradient uses, whatever ``keep`` says: nothing is recomputed, and the
    bits are the same.
    """

    def __init__(self, spec: RNNSpec) -> None:
        self.spec = spec

    def compile(self, training: bool = False) -> None:
        """Nothing to do."""

    def forward(
        self, x: Array, params: Array, states: Sequence[Array] | None, lengths: Array | None, y: Array
    ) -> tuple[Array, ...]:
        """Inference; see :class:`fusedrnn.engines.registry.Engine`."""
        result, final = forward(self.spec, x, params, states, lengths)
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
    ) -> tuple[tuple[Array, ...], NumpyResiduals]:
        """Training; see :class:`fusedrnn.engines.registry.Engine`."""
        # The tape refers to these arrays, which the caller may change.
        x, params = x.copy(), params.copy()
        states = None if states is None else [state.copy() for state in states]
        lengths = None if lengths is None else lengths.copy()
        result, final, tape = train(self.spec, x, params, states, lengths, seed)
        _copy(y, result, lengths)
        return final, NumpyResiduals(tape, tape.nbytes + self._copied_bytes(*x.shape[:2]))

    def backward(
        self, kept: NumpyResiduals, dy: Array | None, dstates: Sequence[Array | None], gradients: Gradients
    ) -> None:
        """The gradients; see :class:`fusedrnn.engines.registry.Engine`."""
        tape = kept.tape
        dx, dparams, dinitial = backward(self.spec, tape, dy, dstates)
        if gradients.x is not None:
            ends = [len(dx)] * dx.shape[1] if tape.lengths is None else tape.lengths
            for row, end in enumerate(ends):
                put(gradients.x[:end, row], dx[:end, row], gradients.add_x)
        if gradients.params is not None:
            put(gradients.params, dparams, gradients.add_params)
        for into, gradient in zip(gradients.states or (), dinitial, strict=gradients.states is not None):
            put(into, gradient, gradients.add_states)

    def reserve_bytes(self, steps: int, batch: int, keep: Keep) -> int:
        """The bytes of the tape and of its copies; ``keep`` does not change them."""
        spec = self.spec
        item = np.dtype(spec.dtype).itemsize
        outputs = (spec.num_layers - 1) * steps * batch * spec.output_size
        layer_dirs = spec.num_layers * spec.num_directions
        per_step = sum(prod(shape) for shape in spec.state_shape(batch))
        per_step += layer_dirs * batch * spec.hidden_size * len(step_vjp(traced_cell(spec.variant)).saved)
        masks = outputs if spec.dropout else 0
        return (outputs + steps * per_step) * item + masks + self._copied_bytes(steps, batch)

    def _copied_bytes(self, steps: int, batch: int) -> int:
        """Bytes of the input, the parameters and the initial states."""
        states = sum(prod(shape) for shape in self.spec.state_shape(batch))
        count = steps * batch * self.spec.input_size + self.spec.layout.size + states
        return count * np.dtype(self.spec.dtype).itemsize


def _copy(y: Array, result: Array, lengths: Array | None) -> None:
    """Write the output, but not after the end of a sequence."""
    where: Any = True if lengths is None else (np.arange(len(y))[:, None] < lengths)[:, :, None]
    np.copyto(y, result, where=where)
