"""Bounds on the errors that rounded GEMM operands cause, for each format, in one product and in a whole sequence.

docs/guides/reproducibility.md derives them. They hold for every input, so typical errors are far below. Tests check
results against typical errors, which are in format_tolerance.py.
"""

from __future__ import annotations

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.number_formats import INT8_MAX
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.tolerance import longest_sum, tolerance

BFLOAT16_ERROR = 2.0**-8
"""The largest relative error of rounding to bfloat16: half a step of its eight significant bits."""
_OPERANDS = {"int8_weights": ("float32", "int8")}
"""The formats of rows and of weights, where these differ."""
_ROUNDINGS_IN_FLOAT32 = 1.0 + 2.0**-12
"""Integers and scales are computed in float32, so an error exceeds half a step of int8 by at most this factor."""
_SIGMOID_SLOPE = 0.25


def operand_error(compute: str, rows: Array) -> Array:
    """The largest error of each element of rows (..., K) that are rounded to a format: float64 (..., K).

    Args:
        compute: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        rows: Finite numbers of float32.
    """
    magnitude = np.abs(np.asarray(rows, np.float64))
    if compute == "bfloat16":
        return magnitude * BFLOAT16_ERROR
    if compute == "int8":
        half_step = magnitude.max(axis=-1, keepdims=True) / (2 * INT8_MAX)
        magnitude = np.broadcast_to(half_step * _ROUNDINGS_IN_FLOAT32, magnitude.shape)
        return magnitude
    return np.zeros_like(magnitude)


def product_error(compute: str, rows: Array, weights: Array) -> Array:
    """The largest error of each product of rows (..., K) and weights (M, K) in a format of a spec: float64 (..., M).

    It is Σ |a|·e(w) + e(a)·|w| + e(a)·e(w) over the K pairs, plus the error of a sum in float32. It never decreases
    when a magnitude increases.
    """
    row_format, weight_format = _OPERANDS.get(compute, (compute, compute))
    row_error, weight_error = operand_error(row_format, rows), operand_error(weight_format, weights)
    rows, weights = np.abs(np.asarray(rows, np.float64)), np.abs(np.asarray(weights, np.float64))
    exact_sum: Array = rows @ weights.T
    rounding = (rows.shape[-1] + 2) * float(np.finfo(np.float32).eps)
    operands: Array = (rows + row_error) @ (weights + weight_error).T - exact_sum
    result: Array = operands + rounding * (exact_sum + operands)
    return result


def forward_error(spec: RNNSpec, params: Array, x: Array, largest_c0: float = 0.0) -> Array:
    """The largest error of h at each step, compared with exact arithmetic on the same numbers: float64 (T,), at most 2.

    It grows from step to step by the largest sum of magnitudes in a row of the recurrent weights. Random errors grow
    more slowly.

    Args:
        spec: A network of one layer that runs forward: vanilla with tanh, LSTM or GRU, without further options.
        params: The flat parameter vector.
        x: The input (T, N, I).
        largest_c0: The largest magnitude of an LSTM's initial cell state; that of h0 must be at most one.

    Raises:
        ValueError: If no bound is derived for the spec.
    """
    _check_bounded(spec)
    weights, recurrent = (spec.layout.view(params, 0, 0, kind) for kind in ("i2h_weight", "h2h_weight"))
    input_error = product_error(spec.operand_format, x, weights).max(axis=1)
    recurrent_error = product_error(spec.operand_format, np.ones(spec.hidden_size), recurrent)
    return propagated_error(spec, params, input_error, recurrent_error, largest_c0)


def propagated_error(
    spec: RNNSpec, params: Array, input_error: Array, recurrent_error: Array, largest_c0: float = 0.0
) -> Array:
    """:func:`forward_error` from errors of products: of each step's x (T, G·H), and of any h of at most one (G·H,)."""
    _check_bounded(spec)
    recurrent = np.abs(spec.layout.view(params, 0, 0, "h2h_weight").astype(np.float64))
    arithmetic = tolerance("float32", longest_sum(spec), 1.0 + largest_c0)[1]
    reset_gain = _reset_gain(spec, params, recurrent)
    h_error, c_error, largest_c = np.zeros(spec.hidden_size), np.zeros(spec.hidden_size), largest_c0
    errors = []
    for error in input_error:
        pre_activations = error + recurrent_error + recurrent @ h_error + arithmetic
        gates = pre_activations.reshape(spec.num_gates, spec.hidden_size)
        if spec.mode == "lstm":
            i, f, g, o = gates
            c_error = c_error + _SIGMOID_SLOPE * (i + largest_c * f) + g
            largest_c += 1.0
            h_error = c_error + _SIGMOID_SLOPE * o
        elif spec.mode == "gru":
            r, z, n = gates
            h_error = np.maximum(n + reset_gain * _SIGMOID_SLOPE * r.max(), h_error) + 2 * _SIGMOID_SLOPE * z
        else:
            h_error = gates[0]
        h_error = np.minimum(h_error + arithmetic, 2.0)
        errors.append(h_error.max())
    return np.array(errors)


def _reset_gain(spec: RNNSpec, params: Array, recurrent: Array) -> Array:
    """The largest value of the recurrent part, which r multiplies, of each pre-activation of a GRU's n: (H,)."""
    bias = spec.layout.view(params, 0, 0, "h2h_bias") if spec.bias == "double" else np.zeros(len(recurrent))
    gain: Array = (recurrent.sum(axis=1) + np.abs(bias))[-spec.hidden_size :]
    return gain


def _check_bounded(spec: RNNSpec) -> None:
    """Reject a spec whose states may exceed one, or whose cell has options for which the derivation is not valid."""
    plain = RNNSpec(spec.mode, spec.input_size, spec.hidden_size, reset_after=spec.reset_after)
    if spec.mode == "rnn_relu" or spec.num_layers > 1 or spec.num_directions > 1 or spec.variant != plain.variant:
        raise ValueError(f"spec must be one layer with tanh in one direction, without options of the cell; got {spec}")
