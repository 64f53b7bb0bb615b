"""The ranges of the operands of a network on sample inputs, for int8 with fixed scales."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.reference.forward import forward
from fusedrnn.engines.reference.rounding import OperandRounding
from fusedrnn.quantized_params import num_operands
from fusedrnn.spec import RNNSpec


def operand_ranges(spec: RNNSpec, params: Array, inputs: Iterable[Array]) -> Array:
    """The largest magnitude of each operand, float32 (L·D, operands), of calls in float32 from zero states.

    Args:
        spec: The network.
        params: The flat parameter vector.
        inputs: Inputs (T, N, I).
    """
    ranges = np.zeros((spec.num_layers * spec.num_directions, num_operands(spec)), np.float32)

    def note(layer_dir: int, operand: int, rows: Array) -> Array:
        ranges[layer_dir, operand] = np.maximum(ranges[layer_dir, operand], np.abs(rows).max())
        return rows

    rounding = OperandRounding(weights=lambda weight: weight, rows=note)
    for x in inputs:
        with np.errstate(all="ignore"):  # values that are not finite show in the range
            forward(replace(spec, compute=None), x, params, rounding=rounding)
    return ranges
