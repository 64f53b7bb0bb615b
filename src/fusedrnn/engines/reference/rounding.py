"""Rounds the operands of the reference's GEMMs as a spec's ``compute`` says, in any float type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.number_formats import quantize_rows, round_to_bfloat16
from fusedrnn.quantized_params import QuantizedParams
from fusedrnn.spec import RNNSpec

Rounding = Callable[[Array], Array]
"""From rows (..., K) to the same rows in the format of operands, in the same float type."""
RowRounding = Callable[[int, Array], Array]
"""From the number of an operand of a layer-direction, and its rows: 0 is the input, 1 + p the operand of product p."""


class OperandRounding(NamedTuple):
    """How the operands of a network are rounded.

    A product of int8 operands is exact except for the scales. Here, the numbers that the integers stand for are
    multiplied as floats: where terms cancel, a rounding error remains. With int8_weights, sums have the range of floats
    here, and a smaller one in kernels, which scale last.

    Attributes:
        weights: How weights are rounded.
        rows: How the rows that they multiply are rounded, by layer·D + direction, the operand's number and the rows.
    """

    weights: Rounding
    rows: Callable[[int, int, Array], Array]

    @classmethod
    def of(cls, spec: RNNSpec, params: Array | QuantizedParams) -> OperandRounding:
        """The rounding of a spec. Quantized parameters are not rounded again, and they may have ranges."""
        rounded_row = row_rounding(spec.compute)
        weights = _int8 if spec.compute == "int8_weights" else rounded_row
        ranges = None
        if isinstance(params, QuantizedParams):
            weights, ranges = _unrounded, params.ranges
        if ranges is None or spec.compute != "int8":
            return cls(weights, lambda layer_dir, operand, rows: rounded_row(rows))
        largest: Array = ranges
        return cls(weights, lambda layer_dir, operand, rows: _int8(rows, largest[layer_dir, operand]))


def row_rounding(compute: str | None) -> Rounding:
    """The rounding of the rows that weights multiply, each by itself; ``compute`` is None for none."""
    return {None: _unrounded, "bfloat16": _bfloat16, "int8": _int8, "int8_weights": _unrounded}[compute]


def unrounded_operand(operand: int, rows: Array) -> Array:
    """The rows as they are."""
    return rows


def _unrounded(rows: Array) -> Array:
    return rows


def _bfloat16(rows: Array) -> Array:
    result: Array = round_to_bfloat16(rows.astype(np.float32)).astype(rows.dtype)
    return result


def _int8(rows: Array, largest: Any = None) -> Array:
    integers, scales = quantize_rows(rows.astype(np.float32), largest)
    result: Array = integers.astype(rows.dtype) * scales.astype(rows.dtype)[..., None]
    return result
