"""Inference in NumPy, step by step, in any float type.

Each step does one GEMM for the input and one for the state, then evaluates the cell's equations on whole arrays, as
MXNet's LSTMCell and its siblings do when they are unrolled. :mod:`fusedrnn.engines.reference.naive` is shorter to read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from fusedrnn.cell.expr import Leaf, evaluate
from fusedrnn.cell.leaves import Peephole, PreH, PreX, Projected, State
from fusedrnn.cell.primitives import ArrayArithmetic
from fusedrnn.cell.trace import TracedCell, traced_cell
from fusedrnn.spec import Array, RNNSpec

Step = Callable[[Array, tuple[Array, ...]], tuple[Array, ...]]
"""From the input of a step (N, in) and the states before it to the states after it, the output first."""


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # where exp overflows, the quotient is 0, which is the right value
        return 1 / (1 + np.exp(-x))


NUMPY = ArrayArithmetic(np, {"sigmoid": _sigmoid})
"""Evaluates expressions on NumPy arrays."""


def forward(
    spec: RNNSpec, x: Array, params: Array, states: Sequence[Array] | None = None, lengths: Array | None = None
) -> tuple[Array, tuple[Array, ...]]:
    """All layers and directions of ``spec`` in inference, in the float type of ``x``. Arguments are not validated.

    Args:
        spec: The network.
        x: (T, N, I).
        params: The flat parameters.
        states: The initial states, (L·D, N, size) each; None for zeros.
        lengths: (N,); None for T everywhere.

    Returns:
        The output (T, N, D·S) and the final states.
    """
    states = initial_states(spec, x, states)
    final: list[tuple[Array, ...]] = []
    for layer in range(spec.num_layers):
        outputs = []
        for direction in range(spec.num_directions):
            weights = layer_weights(spec, params, layer, direction)
            before = [state[len(final)] for state in states]
            y, after = unroll(x, before, lengths, spec.reverses(direction), partial(_step, spec, weights))
            outputs.append(y)
            final.append(after)
        x = concatenate_directions(outputs)
    return x, tuple(np.stack(column) for column in zip(*final, strict=True))


def _step(spec: RNNSpec, weights: dict[str, Array], x: Array, states: tuple[Array, ...]) -> tuple[Array, ...]:
    return step(traced_cell(spec.variant), input_gates(x, weights), states, weights)


def initial_states(spec: RNNSpec, x: Array, states: Sequence[Array] | None) -> Sequence[Array]:
    """The initial states, zeros for None."""
    return [np.zeros(shape, x.dtype) for shape in spec.state_shape(x.shape[1])] if states is None else states


def layer_weights(spec: RNNSpec, params: Array, layer: int, direction: int) -> dict[str, Array]:
    """The weights and biases of one direction of a layer by kind, as views of ``params``."""
    return {kind: spec.layout.view(params, layer, direction, kind) for kind in spec.layout.kinds}


def unroll(
    x: Array, states: Sequence[Array], lengths: Array | None, reverse: bool, step: Step
) -> tuple[Array, tuple[Array, ...]]:
    """One direction of one layer: from ``x`` (T, N, in) to the output (T, N, S) and the final states (N, size)."""
    steps, batch = x.shape[:2]
    states = tuple(states)
    y = np.zeros((steps, batch, states[0].shape[1]), x.dtype)
    for t in reversed(range(steps)) if reverse else range(steps):
        new = step(x[t], states)
        if lengths is None:
            states, y[t] = new, new[0]
        else:
            active = (t < lengths)[:, None]
            states = tuple(np.where(active, after, before) for after, before in zip(new, states, strict=True))
            y[t] = np.where(active, new[0], 0)
    return y, states


def concatenate_directions(outputs: Sequence[Array]) -> Array:
    """The output of a layer, (T, N, D·S), from those of its directions."""
    return outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=2)


def step(
    cell: TracedCell, x_gates: Array, states: Sequence[Array], weights: Mapping[str, Array]
) -> tuple[Array, ...]:
    """One step of a cell.

    Args:
        cell: The cell.
        x_gates: The pre-activations from the input, (N, G·H).
        states: The states before the step, (N, size) each.
        weights: Those of :func:`layer_weights`.

    Returns:
        The states after the step, the output first.
    """
    return tuple(evaluate(cell.outputs, step_leaves(cell, x_gates, states, weights), NUMPY))


def step_leaves(
    cell: TracedCell, x_gates: Array, states: Sequence[Array], weights: Mapping[str, Array]
) -> dict[Leaf, Array]:
    """The value of every leaf of a cell: runs the GEMMs of a step. The arguments are those of :func:`step`."""
    weight, bias = weights["h2h_weight"], weights.get("h2h_bias")
    rows = gate_rows(cell, len(weight))
    values: dict[Leaf, Array] = {State(name): state for name, state in zip(cell.states, states, strict=True)}
    values.update({PreX(gate): x_gates[:, rows[gate]] for gate in cell.gates})
    values.update(peephole_leaves(cell, weights))
    for stage in cell.stages:
        (operand,) = evaluate([stage.operand], values, NUMPY)
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


def input_gates(x: Array, weights: Mapping[str, Array]) -> Array:
    """The pre-activations from the input of a step, (N, G·H)."""
    return linear(x, weights["i2h_weight"], weights.get("i2h_bias"))


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """``x @ weight.T``, plus ``bias`` if there is one."""
    product: Array = x @ weight.T
    return product if bias is None else product + bias


def peephole_leaves(cell: TracedCell, weights: Mapping[str, Array]) -> dict[Leaf, Array]:
    """The peephole weights (H,) by leaf."""
    if not cell.peepholes:
        return {}
    peepholes = np.split(weights["peephole_weight"], len(cell.peepholes))
    return {Peephole(gate): weight for gate, weight in zip(cell.peepholes, peepholes, strict=True)}


def gate_rows(cell: TracedCell, count: int) -> dict[str, slice]:
    """The rows of each gate among the ``count`` rows of a weight."""
    size = count // len(cell.gates)
    return {gate: slice(index * size, (index + 1) * size) for index, gate in enumerate(cell.gates)}
