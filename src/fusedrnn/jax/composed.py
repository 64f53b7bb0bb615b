"""A call of the operator by JAX's own operations, a scan over the steps, for any device and any order of derivatives.

The equations come from the same definition of the cell as the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fusedrnn.cell.expr import Leaf
from fusedrnn.cell.leaves import PreH, PreX, Projected, RawInput, State
from fusedrnn.cell.stage import Stage
from fusedrnn.cell.trace import traced_cell
from fusedrnn.cell.traversal import evaluate
from fusedrnn.cell.weights import gate_rows, parameter_leaves
from fusedrnn.dropout import scale
from fusedrnn.jax.cell_arithmetic import ARITHMETIC
from fusedrnn.jax.mesh_types import zeros_that_vary
from fusedrnn.jax.philox import input_mask, step_masks
from fusedrnn.spec import RNNSpec

Array = Any
Weights = Mapping[str, Array]


class _Steps(NamedTuple):
    """What a scan reads at each step: the input, its pre-activations, which sequences are active, resets, masks."""

    x: Array
    x_gates: Array
    valid: Array | None
    resets: Array | None
    masks: tuple[Array, ...]


def forward(
    spec: RNNSpec, x: Array, params: Array, states: Sequence[Array] | None = None, lengths: Array | None = None,
    resets: Array | None = None, seed: Array | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    """The output and the final states.

    Args:
        spec: The network.
        x: (T, N, I).
        params: The flat parameter vector.
        states: (L·D, N, size) each; None for zeros.
        lengths: (N,); None for T everywhere.
        resets: (T, N); None for nowhere.
        seed: The words of the seed of dropout, uint32 (2,); None for no dropout.

    Raises:
        NotImplementedError: If the format of GEMM operands is for inference only.
    """
    if not spec.is_trainable:
        raise NotImplementedError(f"compute={spec.compute!r} runs on the CPU alone, and has no gradients")
    steps, batch = x.shape[:2]
    valid = None if lengths is None else jnp.arange(steps)[:, None] < lengths[None]
    if valid is not None:
        # NaN in the padding would turn the padding's zero derivative into NaN.
        x = jnp.where(valid[:, :, None], x, 0)
        resets = None if resets is None else resets & valid
    if states is None:
        states = [zeros_that_vary(x, shape) for shape in spec.state_shape(batch)]
    final: list[tuple[Array, ...]] = []
    for layer in range(spec.num_layers):
        p = spec.dropout_of(layer)
        if seed is not None and p:
            keeps = input_mask(seed, p, layer, steps, batch, spec.layer_input_size(layer))
            x = jnp.where(keeps, x * scale(p), 0)
        columns = []
        for direction in range(spec.num_directions):
            before = tuple(state[len(final)] for state in states)
            weights = _weights(spec, params, layer, direction)
            masks = _masks(spec, seed, len(final), steps, batch, x.dtype)
            y, after = _scan(spec, x, before, weights, valid, spec.reverses(direction), resets, masks)
            columns.append(y)
            final.append(after)
        y = jnp.concatenate(columns, axis=2)
        if spec.adds_input(layer):
            y = y + x
        x = y if valid is None else jnp.where(valid[:, :, None], y, 0)
    return x, *(jnp.stack(rows) for rows in zip(*final, strict=True))


def _weights(spec: RNNSpec, params: Array, layer: int, direction: int) -> dict[str, Array]:
    """The parameters of a layer-direction by kind, with matrices rounded to the format of GEMM operands."""
    weights: dict[str, Array] = {}
    for kind in spec.layout.kinds:
        entry = spec.layout.entry(layer, direction, kind)
        weight = params[entry.offset : entry.offset + entry.size].reshape(entry.shape)
        weights[kind] = _rounding(spec)(weight) if weight.ndim > 1 else weight
    if spec.heads > 1:
        weights["h2h_weight"] = _full(weights["h2h_weight"], spec.heads)
    return weights


def _full(blocks: Array, heads: int) -> Array:
    """Block-diagonal weights (rows, H / heads) as a full matrix (rows, H)."""
    size = blocks.shape[1]
    diagonal = jnp.eye(heads, dtype=blocks.dtype).reshape(1, heads, 1, heads, 1)
    return (blocks.reshape(-1, heads, size, 1, size) * diagonal).reshape(-1, heads * size)


def _masks(
    spec: RNNSpec, seed: Array | None, layer_dir: int, steps: int, batch: int, dtype: Any
) -> tuple[Array, ...]:
    """The masks inside the steps of a cell, each (T, N, H), in the order of the traced cell's.

    Without a seed, they are their expectations, each (T, 1, 1).
    """
    masks: list[Array] = []
    for number, mask in enumerate(traced_cell(spec.variant).masks):
        if seed is None:
            masks.append(jnp.full((steps, 1, 1), mask.keep, dtype))
        else:
            size = spec.hidden_size
            drawn = step_masks(seed, mask.keep, number, layer_dir, mask.per_sequence, steps, batch, size)
            masks.append(drawn.astype(dtype))
    return tuple(masks)


def _scan(
    spec: RNNSpec, x: Array, states: tuple[Array, ...], weights: Weights, valid: Array | None, reverse: bool,
    resets: Array | None, masks: tuple[Array, ...],
) -> tuple[Array, tuple[Array, ...]]:  # fmt: skip
    """One direction of one layer: the output of every step, and the final states."""
    x_gates = _linear(_rounding(spec)(x), weights["i2h_weight"], weights.get("i2h_bias"))
    if resets is not None and reverse:
        # A piece ends before the mark of the next piece, so a reverse run sets the states to zero one step earlier in
        # time.
        resets = jnp.concatenate([resets[1:], jnp.zeros_like(resets[:1])])

    def body(states: tuple[Array, ...], step: _Steps) -> tuple[tuple[Array, ...], Array]:
        if step.resets is not None:
            states = tuple(jnp.where(step.resets[:, None], 0, state) for state in states)
        if step.valid is None:
            output, after = _step(spec, step, states, weights)
            return after, output
        is_valid = step.valid[:, None]
        # The results of padding are unused, but they are differentiated, so states that may be infinite must not enter
        # them.
        before = tuple(jnp.where(is_valid, state, 0) for state in states)
        output, after = _step(spec, step, before, weights)
        kept = tuple(jnp.where(is_valid, new, old) for new, old in zip(after, states, strict=True))
        return kept, output

    final, y = jax.lax.scan(body, states, _Steps(x, x_gates, valid, resets, masks), reverse=reverse)
    return y, final


def _linear(x: Array, weight: Array, bias: Array | None) -> Array:
    product = jnp.matmul(x, weight.T, precision="highest")
    return product if bias is None else product + jnp.expand_dims(bias, range(product.ndim - 1))


def _rounding(spec: RNNSpec) -> Callable[[Array], Array]:
    """The rounding of GEMM operands, whose derivative is 1."""
    return _to_bfloat16 if spec.compute == "bfloat16" else lambda operand: operand


def _to_bfloat16(operand: Array) -> Array:
    # Both the difference and the sum are exact. With an infinity, they would be NaN.
    own = jax.lax.stop_gradient(operand)
    change = jax.lax.reduce_precision(own, exponent_bits=8, mantissa_bits=7) - own
    return jnp.where(jnp.isfinite(change), operand + change, operand)


def _in_rows(value: Array | float, like: Array) -> Array:
    """A value in the shape (N, H) of ``like``; it may be a number, a mean, or depend on parameters alone."""
    return jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape)


def _moments(stage: Stage, values: Mapping[Leaf, Array], like: Array) -> dict[Leaf, Array]:
    """The means and variances (N, 1) of a stage of reductions."""
    moments: dict[Leaf, Array] = {}
    for reduction in stage.reductions:
        parts = evaluate(reduction.values, values, ARITHMETIC)
        row = jnp.concatenate([_in_rows(part, like) for part in parts], axis=1)
        moments[reduction.mean] = row.mean(axis=1, keepdims=True)
        if reduction.variance is not None:
            moments[reduction.variance] = row.var(axis=1, keepdims=True)
    return moments


def _step(
    spec: RNNSpec, step: _Steps, states: Sequence[Array], weights: Weights
) -> tuple[Array, tuple[Array, ...]]:
    """The output of a step, and the states after it."""
    cell = traced_cell(spec.variant)
    rounded = _rounding(spec)
    x_rows, h_rows = gate_rows(cell, step.x_gates.shape[1], len(weights.get("h2h_weight", ())))
    values: dict[Leaf, Array] = {State(name): state for name, state in zip(cell.states, states, strict=True)}
    values.update(zip(cell.masks, step.masks, strict=True))
    values.update({PreX(gate): step.x_gates[:, own] for gate, own in x_rows.items()})
    values.update({leaf: weight[None] for leaf, weight in parameter_leaves(cell, weights).items()})
    if cell.reads_raw_input:
        values[RawInput()] = step.x
    for stage in cell.stages:
        if stage.reductions:
            values.update(_moments(stage, values, states[0]))
        if not stage.multiplies:
            continue
        (operand,) = evaluate([stage.operand], values, ARITHMETIC)
        if spec.projection_size is None:  # with a projection, an operand may be wider than h
            operand = _in_rows(operand, states[0])
        if stage.projects:
            values[Projected()] = _linear(rounded(operand), weights["h2r_weight"], None)
        if stage.gates:
            stacked = slice(h_rows[stage.gates[0]].start, h_rows[stage.gates[-1]].stop)
            bias = weights.get("h2h_bias")
            own_bias = None if bias is None else bias[stacked]
            product = _linear(rounded(operand), weights["h2h_weight"][stacked], own_bias)
            pieces = jnp.split(product, len(stage.gates), axis=1)
            values.update(zip(map(PreH, stage.gates), pieces, strict=True))
    new = evaluate(cell.outputs, values, ARITHMETIC)
    after = tuple(_in_rows(value, state) for value, state in zip(new, states, strict=False))
    return after[0] if cell.output is None else _in_rows(new[-1], states[0]), after
