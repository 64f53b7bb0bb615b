"""Tolerances for results whose GEMM operands are rounded to a number format.

docs/internals/tools.md derives the tolerances.
"""

from __future__ import annotations

import math

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.number_formats import INT8_MAX
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.operand_errors import BFLOAT16_ERROR
from fusedrnn.testing.tolerance import kink_error, longest_sum

_INT8_UNIT = 1 / (2 * INT8_MAX)
"""The largest error of an element of an int8 row, relative to the row's largest magnitude."""
_NORM_LIMIT, _ELEMENT_LIMIT = 8.0, 16.0
"""The tolerance of a result, after any number of steps, in typical errors of a pre-activation."""


def pre_activation_error(spec: RNNSpec, params: Array) -> float:
    """The typical error of a pre-activation whose operands are rounded to the spec's ``compute``.

    It is for data whose largest magnitude is one. Without ``compute`` it is 0.

    Args:
        spec: The network.
        params: Its flat parameters.
    """
    if spec.compute is None:
        return 0.0
    norm, largest = _weight_sizes(spec, params)
    if spec.compute == "bfloat16":
        return math.sqrt(2 / 3) * BFLOAT16_ERROR * norm
    return math.sqrt((longest_sum(spec) * largest**2 + norm**2) / 3) * _INT8_UNIT


def _weight_sizes(spec: RNNSpec, params: Array) -> tuple[float, float]:
    """The largest norm of a gate's weights, of input and state together; and the largest weight."""
    norm = largest = 0.0
    for layer in range(spec.num_layers):
        for direction in range(spec.num_directions):
            matrices = [spec.layout.view(params, layer, direction, kind) for kind in ("i2h_weight", "h2h_weight")]
            squares = sum(np.square(matrix).sum(axis=1) for matrix in matrices)
            norm = max(norm, math.sqrt(float(np.max(squares))))
            largest = max(largest, *(float(np.max(np.abs(matrix))) for matrix in matrices))
    return norm, largest


def format_tolerance(error: float, scale: float) -> tuple[float, float]:
    """The largest distances of an output from that of exact operands: relative to its norm, and of an element.

    Args:
        error: The network's :func:`pre_activation_error`.
        scale: The largest magnitude of inputs and outputs; below one, it counts as one.
    """
    return _NORM_LIMIT * error, _ELEMENT_LIMIT * error * max(1.0, scale)


def format_gradient_tolerance(spec: RNNSpec, error: float) -> float:
    """The largest distance of a gradient from that of exact operands, relative to its norm.

    Args:
        spec: The network.
        error: The network's :func:`pre_activation_error`.
    """
    limit = _NORM_LIMIT * error
    return max(limit, kink_error(spec, error)) if spec.variant.has_kinks else limit
