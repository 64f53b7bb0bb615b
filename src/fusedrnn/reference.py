"""The same maths in NumPy, unfused, cell by cell, in any float type: the oracle, and the baseline of the table.

Each step makes one GEMM for the input and one for the state and evaluates the cell's equations on whole arrays, as
MXNet's LSTMCell and its kin do when they are unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.cells import CELLS
from fusedrnn.spec import RNNSpec
from fusedrnn.symbolic import Leaf, TracedCell, evaluate, trace

Array = NDArray[Any]
Advance = Callable[[Array, tuple[Array, ...]], tuple[Array, ...]]
"""From the input of a step (N, in) and the states before it to those after it."""


class NumpyArithmetic:
    """The operations of a cell on NumPy arrays."""

    const = staticmethod(float)
    add = staticmethod(np.add)
    sub = staticmethod(np.subtract)
    mul = staticmethod(np.multiply)
    tanh = staticmethod(np.tanh)

    @staticmethod
    def sigmoid(x: Array) -> Array:
        """1 / (1 + exp(-x)), its overflow to a quotient of zero meant."""
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-x))

    @staticmethod
    def relu(x: Array) -> Array:
        """max(x, 0), NaN staying NaN."""
        return np.maximum(x, 0)

    @staticmethod
    def pass_positive(gate: Array, value: Array) -> Array:
        """``value`` where the gate is positive or NaN, else zero."""
        return np.where(gate <= 0, 0, value)


def step(mode: str, x_gates: Array, states: Sequence[Array], h2h_weight: Array, h2h_bias: Array) -> tuple[Array, ...]:
    """One step of a cell.

    ``x_gates`` (N, G·H) are the pre-activations from the input, ``states`` the previous states (N, size) each.
    Returns the new states, the output first.
    """
    cell = trace(CELLS[mode])
    return tuple(evaluate(cell.outputs, step_leaves(cell, x_gates, states, h2h_weight, h2h_bias), NumpyArithmetic()))


def step_leaves(
    cell: TracedCell, x_gates: Array, states: Sequence[Array], h2h_weight: Array, h2h_bias: Array
) -> dict[Leaf, Array]:
    """The values of all leaves of a cell, its recurrent GEMMs done; the arguments are those of :func:`step`."""
    rows = gate_rows(cell, len(h2h_weight))
    values: dict[Leaf, Array] = {("state", name): state for name, state in zip(cell.states, states, strict=True)}
    values.update({("x", gate): x_gates[:, rows[gate]] for gate in cell.gates})
    for stage in cell.stages:
        operand = evaluate([stage.operand], values, NumpyArithmetic())[0]
        if stage.gates == cell.gates:
            h_gates = operand @ h2h_weight.T + h2h_bias
            values.update({("h", gate): h_gates[:, rows[gate]] for gate in stage.gates})
        else:
            for gate in stage.gates:
                values["h", gate] = operand @ h2h_weight[rows[gate]].T + h2h_bias[rows[gate]]
    return values


def gate_rows(cell: TracedCell, count: int) -> dict[str, slice]:
    """Which of the ``count`` rows of a weight are each gate's."""
    size = count // len(cell.gates)
    return {gate: slice(index * size, (index + 1) * size) for index, gate in enumerate(cell.gates)}


def unroll(
    x: Array, states: Sequence[Array], lengths: Array | None, reverse: bool, advance: Advance
) -> tuple[Array, tuple[Array, ...]]:
    """One direction of one layer, step by step: ``x`` (T, N, in) to outputs (T, N, S) and last states (N, size)."""
    steps, batch = x.shape[:2]
    states = tuple(states)
    y = np.zeros((steps, batch, states[0].shape[1]), x.dtype)
    for t in reversed(range(steps)) if reverse else range(steps):
        new = advance(x[t], states)
        if lengths is None:
            states, y[t] = new, new[0]
        else:
            alive = (t < lengths)[:, None]
            states = tuple(np.where(alive, after, before) for after, before in zip(new, states, strict=True))
            y[t] = np.where(alive, new[0], 0)
    return y, states


def forward(
    spec: RNNSpec, x: Array, params: Array, states: Sequence[Array] | None = None, lengths: Array | None = None
) -> tuple[Array, tuple[Array, ...]]:
    """Every layer and direction of ``spec`` in inference, in the float type of ``x``.

    ``x`` (T, N, I), flat ``params``, ``states`` each (L·D, N, size) or None for zeros, ``lengths`` (N,) or None for T
    everywhere. Returns the output (T, N, D·S) and the final states. Arguments are taken as valid.
    """
    states = initial_states(spec, x, states)
    last: list[tuple[Array, ...]] = []
    for layer in range(spec.num_layers):
        outputs = []
        for direction in range(spec.num_directions):
            advance = partial(_advance, spec, layer_weights(spec, params, layer, direction))
            start = [state[len(last)] for state in states]
            y, after = unroll(x, start, lengths, direction == 1, advance)
            outputs.append(y)
            last.append(after)
        x = join(outputs)
    return x, tuple(np.stack(column) for column in zip(*last, strict=True))


def _advance(spec: RNNSpec, weights: dict[str, Array], x: Array, states: tuple[Array, ...]) -> tuple[Array, ...]:
    x_gates = x @ weights["i2h_weight"].T + weights["i2h_bias"]
    return step(spec.mode, x_gates, states, weights["h2h_weight"], weights["h2h_bias"])


def initial_states(spec: RNNSpec, x: Array, states: Sequence[Array] | None) -> Sequence[Array]:
    """The states to start from, zeros if none are given.

    Raises:
        NotImplementedError: If the network has a projection or clips its states.
    """
    if spec.projection_size or spec.state_clip_min is not None:
        raise NotImplementedError("the reference has no projection and no state clipping yet")
    return [np.zeros(shape, x.dtype) for shape in spec.state_shape(x.shape[1])] if states is None else states


def layer_weights(spec: RNNSpec, params: Array, layer: int, direction: int) -> dict[str, Array]:
    """The weights and biases of one direction of a layer by kind, as views of ``params``."""
    entries = [entry for entry in spec.layout if (entry.layer, entry.direction) == (layer, direction)]
    return {entry.kind: spec.layout.view(params, layer, direction, entry.kind) for entry in entries}


def join(outputs: Sequence[Array]) -> Array:
    """The outputs of a layer's directions side by side: what the next layer reads."""
    return outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=2)
