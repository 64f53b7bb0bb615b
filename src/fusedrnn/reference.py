"""The same maths in NumPy, unfused, cell by cell, in any float type: the oracle, and the baseline of the table.

Each step makes one GEMM for the input and one for the state and evaluates the cell's equations on whole arrays, as
MXNet's LSTMCell and its kin do when they are unrolled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.cells import CELLS
from fusedrnn.spec import RNNSpec
from fusedrnn.symbolic import Leaf, evaluate, trace

Array = NDArray[Any]


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


def step(mode: str, x_gates: Array, states: Sequence[Array], h2h_weight: Array, h2h_bias: Array) -> tuple[Array, ...]:
    """One step of a cell.

    ``x_gates`` (N, G·H) are the pre-activations from the input, ``states`` the previous states (N, size) each.
    Returns the new states, the output first.
    """
    cell = trace(CELLS[mode])
    size = h2h_weight.shape[0] // len(cell.gates)
    values: dict[Leaf, Array] = {("state", name): state for name, state in zip(cell.states, states, strict=True)}
    rows = {gate: slice(index * size, (index + 1) * size) for index, gate in enumerate(cell.gates)}
    values.update({("x", gate): x_gates[:, rows[gate]] for gate in cell.gates})
    for stage in cell.stages:
        operand = evaluate([stage.operand], values, NumpyArithmetic())[0]
        if stage.gates == cell.gates:
            h_gates = operand @ h2h_weight.T + h2h_bias
            values.update({("h", gate): h_gates[:, rows[gate]] for gate in stage.gates})
        else:
            for gate in stage.gates:
                values["h", gate] = operand @ h2h_weight[rows[gate]].T + h2h_bias[rows[gate]]
    return tuple(evaluate(cell.outputs, values, NumpyArithmetic()))


def unroll(
    spec: RNNSpec,
    x: Array,
    weights: dict[str, Array],
    states: Sequence[Array],
    lengths: Array | None,
    reverse: bool,
) -> tuple[Array, tuple[Array, ...]]:
    """One direction of one layer, step by step: ``x`` (T, N, in) to outputs (T, N, S) and last states (N, size)."""
    steps, batch = x.shape[:2]
    y = np.zeros((steps, batch, spec.state_size), x.dtype)
    states = tuple(states)
    for t in reversed(range(steps)) if reverse else range(steps):
        x_gates = x[t] @ weights["i2h_weight"].T + weights["i2h_bias"]
        new = step(spec.mode, x_gates, states, weights["h2h_weight"], weights["h2h_bias"])
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
    if spec.projection_size or spec.state_clip_min is not None:
        raise NotImplementedError("the reference has no projection and no state clipping yet")
    batch = x.shape[1]
    if states is None:
        states = [np.zeros(shape, x.dtype) for shape in spec.state_shape(batch)]
    last: list[tuple[Array, ...]] = []
    for layer in range(spec.num_layers):
        outputs = []
        for direction in range(spec.num_directions):
            weights = {
                kind: spec.layout.view(params, layer, direction, kind)
                for kind in ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias")
            }
            index = layer * spec.num_directions + direction
            y, after = unroll(spec, x, weights, [s[index] for s in states], lengths, reverse=direction == 1)
            outputs.append(y)
            last.append(after)
        x = outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=2)
    return x, tuple(np.stack(column) for column in zip(*last, strict=True))
