"""The same maths in NumPy, unfused, cell by cell, in any float type: the oracle, and the baseline of the table.

Each step makes one GEMM for the input and one for the state and evaluates the cell's equations on whole arrays, as
MXNet's LSTMCell and its kin do when they are unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.cell.expr import Leaf, evaluate
from fusedrnn.cell.leaves import Peephole, PreH, PreX, Projected, State
from fusedrnn.cell.primitives import ArrayArithmetic
from fusedrnn.cell.trace import TracedCell, traced_cell
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
Advance = Callable[[Array, tuple[Array, ...]], tuple[Array, ...]]
"""From the input of a step (N, in) and the states before it to those after it."""


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp overflows to inf, and the quotient is then zero, as it should be
        return 1 / (1 + np.exp(-x))


NUMPY = ArrayArithmetic(np, {"sigmoid": _sigmoid})
"""Expressions on NumPy arrays."""


def step(
    cell: TracedCell, x_gates: Array, states: Sequence[Array], weights: Mapping[str, Array]
) -> tuple[Array, ...]:
    """One step of a cell.

    ``x_gates`` (N, G·H) are the pre-activations from the input, ``states`` the previous states (N, size) each,
    ``weights`` those of :func:`layer_weights`. Returns the new states, the output first.
    """
    return tuple(evaluate(cell.outputs, step_leaves(cell, x_gates, states, weights), NUMPY))


def step_leaves(
    cell: TracedCell, x_gates: Array, states: Sequence[Array], weights: Mapping[str, Array]
) -> dict[Leaf, Array]:
    """The values of all leaves of a cell, its GEMMs done; the arguments are those of :func:`step`."""
    weight, bias = weights["h2h_weight"], weights.get("h2h_bias")
    rows = gate_rows(cell, len(weight))
    values: dict[Leaf, Array] = {State(name): state for name, state in zip(cell.states, states, strict=True)}
    values.update({PreX(gate): x_gates[:, rows[gate]] for gate in cell.gates})
    values.update(vector_leaves(cell, weights))
    for stage in cell.stages:
        operand = evaluate([stage.operand], values, NUMPY)[0]
        if stage.projects:
            values[Projected()] = operand @ weights["h2r_weight"].T
        elif stage.gates == cell.gates:
            h_gates = linear(operand, weight, bias)
            values.update({PreH(gate): h_gates[:, rows[gate]] for gate in stage.gates})
        else:
            for gate in stage.gates:
                own = rows[gate]
                values[PreH(gate)] = linear(operand, weight[own], None if bias is None else bias[own])
    return values


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """``x @ weight.T + bias``, or without a bias."""
    product: Array = x @ weight.T
    return product if bias is None else product + bias


def vector_leaves(cell: TracedCell, weights: Mapping[str, Array]) -> dict[Leaf, Array]:
    """The weights that multiply element by element, (H,) each."""
    if not cell.peepholes:
        return {}
    parts = np.split(weights["peephole_weight"], len(cell.peepholes))
    return {Peephole(gate): part for gate, part in zip(cell.peepholes, parts, strict=True)}


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
            y, after = unroll(x, start, lengths, spec.reverses(direction), advance)
            outputs.append(y)
            last.append(after)
        x = join(outputs)
    return x, tuple(np.stack(column) for column in zip(*last, strict=True))


def _advance(spec: RNNSpec, weights: dict[str, Array], x: Array, states: tuple[Array, ...]) -> tuple[Array, ...]:
    return step(traced_cell(spec.variant), input_gates(x, weights), states, weights)


def input_gates(x: Array, weights: Mapping[str, Array]) -> Array:
    """The pre-activations (N, G·H) from the input of a step."""
    return linear(x, weights["i2h_weight"], weights.get("i2h_bias"))


def initial_states(spec: RNNSpec, x: Array, states: Sequence[Array] | None) -> Sequence[Array]:
    """The states to start from, zeros if none are given."""
    return [np.zeros(shape, x.dtype) for shape in spec.state_shape(x.shape[1])] if states is None else states


def layer_weights(spec: RNNSpec, params: Array, layer: int, direction: int) -> dict[str, Array]:
    """The weights and biases of one direction of a layer by kind, as views of ``params``."""
    entries = [entry for entry in spec.layout if (entry.layer, entry.direction) == (layer, direction)]
    return {entry.kind: spec.layout.view(params, layer, direction, entry.kind) for entry in entries}


def join(outputs: Sequence[Array]) -> Array:
    """The outputs of a layer's directions side by side: what the next layer reads."""
    return outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=2)
