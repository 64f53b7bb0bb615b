"""Forward in NumPy, step by step, in any float type: inference, and training, which records a tape.

Each step does one GEMM for the input and one for the state, then evaluates the cell's equations on whole arrays, as
MXNet's LSTMCell and its siblings do when they are unrolled. A tape holds every intermediate value that a gradient uses.
:mod:`fusedrnn.engines.reference.naive` is shorter to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from fusedrnn import dropout
from fusedrnn.arrays import Array
from fusedrnn.cell.expr import Leaf
from fusedrnn.cell.leaves import PreH, PreX, Projected, RawInput, State
from fusedrnn.cell.primitives import ArrayArithmetic
from fusedrnn.cell.trace import TracedCell, traced_cell
from fusedrnn.cell.traversal import evaluate
from fusedrnn.cell.weights import gate_rows, parameter_leaves
from fusedrnn.engines.reference import heads
from fusedrnn.engines.reference.masks import StepMasks, expected_masks, random_masks
from fusedrnn.engines.reference.reductions import moments
from fusedrnn.engines.reference.resets import Resets
from fusedrnn.engines.reference.rounding import OperandRounding, RowRounding, unrounded_operand
from fusedrnn.engines.reference.step_vjp import step_vjp
from fusedrnn.engines.reference.tape import DirectionTape, Tape
from fusedrnn.engines.reference.unroll import store_states, unroll
from fusedrnn.quantized_params import Params, QuantizedParams
from fusedrnn.spec import RNNSpec

_MATRICES = "i2h_weight", "h2h_weight", "h2r_weight"


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # where exp overflows, the quotient is 0, which is the right value
        return 1 / (1 + np.exp(-x))


NUMPY = ArrayArithmetic(np, {"sigmoid": _sigmoid})
"""Evaluates expressions on NumPy arrays."""


def forward(
    spec: RNNSpec,
    x: Array,
    params: Params,
    states: Sequence[Array] | None = None,
    lengths: Array | None = None,
    tape: Tape | None = None,
    seed: int = 0,
    rounding: OperandRounding | None = None,
    resets: Resets | None = None,
    all_states: Sequence[Array] = (),
) -> tuple[Array, tuple[Array, ...]]:
    """All layers and directions of ``spec``, in the float type of ``x``. Arguments are not validated.

    Args:
        spec: The network.
        x: (T, N, I).
        params: The flat parameters, or quantized ones.
        states: The initial states, (L·D, N, size) each; None for zeros.
        lengths: (N,); None for T everywhere.
        tape: An empty tape to fill, in training; None in inference.
        seed: Determines which elements training drops, as in :func:`fusedrnn.dropout.mask`.
        rounding: How operands are rounded; None for what the spec and the parameters say.
        resets: Where states are replaced inside a sequence; None for nowhere.
        all_states: Arrays to fill with the states of every step of the last layer that the output does not show,
            (T, N, D·size) each.

    Returns:
        The output (T, N, D·S) and the final states.
    """
    if states is None:
        states = [np.zeros(shape, x.dtype) for shape in spec.state_shape(x.shape[1])]
    cell, rounding = traced_cell(spec.variant), rounding or OperandRounding.of(spec, params)
    flat = params.dequantize() if isinstance(params, QuantizedParams) else params
    final: list[tuple[Array, ...]] = []
    for layer in range(spec.num_layers):
        if tape is not None and spec.dropout_of(layer):
            mask = dropout.mask(seed, spec.dropout_of(layer), dropout.input_stream(layer), *x.shape)
            tape.masks[layer] = mask
            x = drop(x, mask, spec.dropout_of(layer))
        if tape is not None:
            tape.inputs.append(x)
        outputs = []
        for direction in range(spec.num_directions):
            own_tape = None if tape is None else DirectionTape()
            # Weights are rounded once; the rows that they multiply are rounded step by step.
            weights = layer_weights(spec, flat, layer, direction)
            weights |= {kind: rounding.weights(weights[kind]) for kind in _MATRICES if kind in weights}
            if spec.heads > 1:
                weights["h2h_weight"] = heads.to_full(weights["h2h_weight"], spec.hidden_size)
            before = [state[len(final)] for state in states]
            reverse, history = spec.reverses(direction), [tuple(before)]
            masks = expected_masks(cell, x.dtype)
            if tape is not None:
                shape = x.shape[1], spec.hidden_size
                masks = random_masks(cell, seed, len(final), len(x), shape, x.dtype, reverse)
            run_step = partial(_run_step, cell, weights, own_tape, partial(rounding.rows, len(final)), masks)
            own_resets = None if resets is None else resets.of(len(final))
            keeps_history = tape is not None or len(all_states) > 0
            y, after = unroll(x, before, lengths, reverse, run_step, own_resets, history if keeps_history else None)
            if tape is not None and own_tape is not None:
                own_tape.states = history
                tape.directions.append(own_tape)
            if layer == spec.num_layers - 1:
                others = [states[spec.output_is_state :] for states in history]
                store_states(all_states, others, lengths, direction, reverse)
            outputs.append(y)
            final.append(after)
        y = outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=2)
        x = _plus_input(y, x, lengths) if spec.adds_input(layer) else y
    return x, tuple(np.stack(column) for column in zip(*final, strict=True))


def train(
    spec: RNNSpec,
    x: Array,
    params: Array,
    states: Sequence[Array] | None = None,
    lengths: Array | None = None,
    seed: int = 0,
    resets: Resets | None = None,
    all_states: Sequence[Array] = (),
) -> tuple[Array, tuple[Array, ...], Tape]:
    """:func:`forward` in training: the output, the final states and the tape for backward."""
    tape = Tape(params, lengths, None if resets is None else resets.marks)
    return *forward(spec, x, params, states, lengths, tape, seed, None, resets, all_states), tape


def _run_step(
    cell: TracedCell,
    weights: Mapping[str, Array],
    tape: DirectionTape | None,
    rounded: RowRounding,
    masks: Iterator[StepMasks],
    x: Array,
    states: tuple[Array, ...],
) -> tuple[Array, tuple[Array, ...]]:
    """One step. In training it has a tape, and extends it."""
    own_masks = next(masks)
    x_gates = linear(rounded(0, x), weights["i2h_weight"], weights.get("i2h_bias"))
    if tape is None:
        return step(cell, x_gates, states, weights, rounded, x, own_masks)
    leaves = step_leaves(cell, x_gates, states, weights, rounded, x, own_masks)
    values = evaluate((*cell.outputs, *step_vjp(cell).saved), leaves, NUMPY)
    new, saved = values[: len(cell.outputs)], values[len(cell.outputs) :]
    like = leaves[PreX(cell.x_gates[0])] if cell.x_gates else states[0]
    tape.before.append(states)
    tape.saved.append(tuple(_own_array(value, like) for value in saved))
    return _output_and_states(new, states)


def _output_and_states(new: Sequence[Array], states: Sequence[Array]) -> tuple[Array, tuple[Array, ...]]:
    """The output and the states after a step, in the shapes of the states before it.

    ``new`` are the states, then the output if it is none of them; else the first state is the output.
    """
    own_output = new[len(states) :]
    after = tuple(in_rows(value, state) for value, state in zip(new, states, strict=False))
    return in_rows(own_output[0], after[0]) if own_output else after[0], after


def _own_array(value: Array | float, like: Array) -> Array:
    """A value in the shape of ``like``, never as a view. It may be a number, or depend on parameters alone."""
    rows = in_rows(value, like)
    # A view of one gate would keep the pre-activations of all gates in memory.
    return rows if rows.base is None and rows.shape == like.shape else np.broadcast_to(rows, like.shape).copy()


def drop(values: Array, mask: Array, p: float) -> Array:
    """Apply dropout of probability ``p``: to a layer's input in forward, to its gradient in backward."""
    values = values * mask
    values *= values.dtype.type(dropout.scale(p))
    return values


def _plus_input(y: Array, x: Array, lengths: Array | None) -> Array:
    """The output of a layer plus its input, but zeros after the end of a sequence."""
    if lengths is None:
        return y + x
    active = np.arange(len(x))[:, None] < lengths
    return np.where(active[:, :, None], y + x, 0)


def layer_weights(spec: RNNSpec, params: Array, layer: int, direction: int) -> dict[str, Array]:
    """The weights and biases of one direction of a layer by kind, as views of ``params``."""
    return {kind: spec.layout.view(params, layer, direction, kind) for kind in spec.layout.kinds}


def step(
    cell: TracedCell,
    x_gates: Array,
    states: Sequence[Array],
    weights: Mapping[str, Array],
    rounded: RowRounding = unrounded_operand,
    x: Array | None = None,
    masks: StepMasks | None = None,
) -> tuple[Array, tuple[Array, ...]]:
    """The output of a step and the states after it (N, size), from the states before it and the weights by kind.

    ``x_gates`` (N, G·H) are the pre-activations from the input; ``rounded`` rounds the rows of GEMM operands; ``x``
    (N, H) is the input itself, for cells that read it; ``masks`` are those of the step.
    """
    new = evaluate(cell.outputs, step_leaves(cell, x_gates, states, weights, rounded, x, masks), NUMPY)
    return _output_and_states(new, states)


def step_leaves(
    cell: TracedCell,
    x_gates: Array,
    states: Sequence[Array],
    weights: Mapping[str, Array],
    rounded: RowRounding = unrounded_operand,
    x: Array | None = None,
    masks: StepMasks | None = None,
) -> dict[Leaf, Array]:
    """The value of every leaf of a cell: runs the GEMMs of a step. The arguments are those of :func:`step`."""
    bias = weights.get("h2h_bias")
    x_rows, h_rows = gate_rows(cell, x_gates.shape[1], len(weights.get("h2h_weight", ())))
    values: dict[Leaf, Array] = {State(name): state for name, state in zip(cell.states, states, strict=True)}
    values.update({PreX(gate): x_gates[:, own] for gate, own in x_rows.items()})
    values.update(parameter_leaves(cell, weights))
    values.update(masks or {})
    if x is not None:
        values[RawInput()] = x
    like, num_products = values[PreX(cell.x_gates[0])] if cell.x_gates else states[0], 0
    for stage in cell.stages:
        if stage.reductions:
            values.update(moments(stage, [in_rows(value, like) for value in evaluate(stage.values, values, NUMPY)]))
        if not stage.multiplies:
            continue
        (operand,) = evaluate([stage.operand], values, NUMPY)
        num_products += 1
        operand = rounded(num_products, in_rows(operand, like))
        if stage.projects:
            values[Projected()] = linear(operand, weights["h2r_weight"], None)
        elif stage.gates == cell.gates:
            h_gates = linear(operand, weights["h2h_weight"], bias)
            values.update({PreH(gate): h_gates[:, own] for gate, own in h_rows.items()})
        else:
            for gate in stage.gates:
                own = h_rows[gate]
                values[PreH(gate)] = linear(operand, weights["h2h_weight"][own], None if bias is None else bias[own])
    return values


def in_rows(value: Array | float, like: Array) -> Array:
    """A value in the shape (N, H) of ``like``. It may be a number; (H,) or (1,) if it depends on parameters alone."""
    if isinstance(value, float):  # such as the expectation of a mask
        return np.full_like(like, value)
    return value if value.ndim > 1 else np.broadcast_to(value, like.shape)


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """``x @ weight.T``, plus ``bias`` if there is one."""
    product: Array = x @ weight.T
    return product if bias is None else product + bias
