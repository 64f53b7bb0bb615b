"""The NumPy reference as an engine: slow and unfused; tests compare the other engines with it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.cell.trace import traced_cell
from fusedrnn.engines.interface import SavePolicy
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands, write_or_add
from fusedrnn.engines.reference.backward import backward
from fusedrnn.engines.reference.forward import forward, train
from fusedrnn.engines.reference.resets import Resets
from fusedrnn.engines.reference.step_vjp import step_vjp
from fusedrnn.engines.reference.tape import Tape
from fusedrnn.spec import RNNSpec


@dataclass(frozen=True)
class ReferenceResiduals:
    """A tape, and the bytes of the tape and of the copies that it refers to, except the lengths."""

    tape: Tape
    nbytes: int


class ReferenceEngine:
    """Runs one spec on NumPy.

    The tape holds every intermediate value that a gradient uses, whatever the save policy says: nothing is recomputed,
    and the bits are the same.
    """

    def __init__(self, spec: RNNSpec) -> None:
        self.spec = spec

    def compile(self, training: bool = False) -> None:
        """Nothing to do."""

    def forward(self, operands: ForwardOperands) -> tuple[Array, ...]:
        """Inference; see :class:`fusedrnn.engines.interface.Engine`."""
        x, params, states, lengths, y, *_ = operands
        result, final = forward(
            self.spec, x, params, states, lengths, resets=_resets(operands), all_states=operands.all_states
        )
        _copy(y, result, lengths)
        return final

    def train(
        self, operands: ForwardOperands, save: SavePolicy, seed: int
    ) -> tuple[tuple[Array, ...], ReferenceResiduals]:
        """Training; see :class:`fusedrnn.engines.interface.Engine`."""
        # The tape refers to its operands, which the caller may change.
        x, params = operands.x.copy(), operands.params.copy()
        states = None if operands.states is None else [state.copy() for state in operands.states]
        lengths = None if operands.lengths is None else operands.lengths.copy()
        resets = _resets(operands)
        result, final, tape = train(self.spec, x, params, states, lengths, seed, resets, operands.all_states)
        _copy(operands.y, result, lengths)
        return final, ReferenceResiduals(tape, tape.nbytes + self._copied_bytes(*x.shape[:2]))

    def backward(self, residuals: ReferenceResiduals, operands: BackwardOperands) -> None:
        """The gradients; see :class:`fusedrnn.engines.interface.Engine`."""
        tape, grads = residuals.tape, operands.grads
        dresets = tuple(np.zeros_like(buffer) for buffer in grads.reset_states or ())
        gradients = operands.dy, operands.dstates, operands.dall_states
        dx, dparams, dinitial = backward(self.spec, tape, *gradients, dresets)
        for buffer, gradient in zip(grads.reset_states or (), dresets, strict=True):
            write_or_add(buffer, gradient, grads.add_reset_states)
        if grads.x is not None:
            lengths = [len(dx)] * dx.shape[1] if tape.lengths is None else tape.lengths
            for index, length in enumerate(lengths):
                write_or_add(grads.x[:length, index], dx[:length, index], grads.add_x)
        if grads.params is not None:
            write_or_add(grads.params, dparams, grads.add_params)
        for buffer, gradient in zip(grads.states or (), dinitial, strict=grads.states is not None):
            write_or_add(buffer, gradient, grads.add_states)

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy) -> int:
        """The bytes of the tape and its copies, which do not depend on ``save``."""
        spec = self.spec
        item = np.dtype(spec.dtype).itemsize
        outputs = (spec.num_layers - 1) * steps * batch * spec.output_size
        layer_dirs = spec.num_layers * spec.num_directions
        per_step = sum(prod(shape) for shape in spec.state_shape(batch))
        per_step += layer_dirs * batch * spec.hidden_size * len(step_vjp(traced_cell(spec.variant)).saved)
        inputs = steps * batch * spec.input_size if spec.input_dropout else 0
        masks = outputs if spec.dropout else 0
        return (inputs + outputs + steps * per_step) * item + inputs + masks + self._copied_bytes(steps, batch)

    def _copied_bytes(self, steps: int, batch: int) -> int:
        """Bytes of the input, the parameters and the initial states."""
        states = sum(prod(shape) for shape in self.spec.state_shape(batch))
        count = steps * batch * self.spec.input_size + self.spec.layout.size + states
        return count * np.dtype(self.spec.dtype).itemsize


def _resets(operands: ForwardOperands) -> Resets | None:
    """The resets of a call."""
    return None if operands.resets is None else Resets(operands.resets, operands.reset_states)


def _copy(y: Array, result: Array, lengths: Array | None) -> None:
    """Write the output, but not after the end of a sequence."""
    where: Any = True if lengths is None else (np.arange(len(y))[:, None] < lengths)[:, :, None]
    np.copyto(y, result, where=where)
