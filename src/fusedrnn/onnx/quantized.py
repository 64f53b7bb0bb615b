"""ONNX Runtime's ``com.microsoft.DynamicQuantizeLSTM``: an LSTM whose W and R are integers with scales.

A weight is (integer - zero point) · scale. The node is read as an LSTM whose GEMM operands are int8. W is (D, I, 4·H)
and R is (D, H, 4·H), the transposes of those of LSTM. There is one scale and one zero point for each direction, (D,),
or for each gate element, (D, 4·H). The attributes are those of LSTM-7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from onnx import NodeProto

from fusedrnn.arrays import Array
from fusedrnn.quantized_params import check_magnitudes

DOMAIN = "com.microsoft"
OPERATOR = "DynamicQuantizeLSTM"
LSTM_VERSION = 7
"""The version of LSTM whose attributes the operator has."""
QUANTIZATION = ("W_scale", "W_zero_point", "R_scale", "R_zero_point")
"""The inputs that follow those of an LSTM."""
_LSTM_INPUTS = 8
_INTEGERS = ("int8", "uint8")


def is_quantized(node: NodeProto) -> bool:
    """Whether the node is a DynamicQuantizeLSTM."""
    return bool(node.domain == DOMAIN and node.op_type == OPERATOR)


def as_lstm(node: NodeProto) -> NodeProto:
    """An LSTM node with the same attributes, and with those inputs that an LSTM also has."""
    lstm = NodeProto()
    lstm.CopyFrom(node)
    lstm.domain, lstm.op_type = "", "LSTM"
    del lstm.input[_LSTM_INPUTS:]
    while lstm.input and not lstm.input[-1]:
        del lstm.input[-1]
    return lstm


class QuantizedWeight(NamedTuple):
    """A weight in integers, in the layout of an LSTM's.

    Attributes:
        integers: int8 or uint8 (D, 4·H, K).
        scales: float32 (D, 4·H).
        zero_points: (D, 4·H), of the same type as the integers.
    """

    integers: Array
    scales: Array
    zero_points: Array

    def dequantize(self) -> Array:
        """The float32 weight (D, 4·H, K)."""
        integers, zero_points = self.integers.astype(np.float32), self.zero_points.astype(np.float32)
        values: Array = (integers - zero_points[..., None]) * self.scales[..., None]
        return values

    @property
    def is_symmetric(self) -> bool:
        """Whether the format is symmetric: int8 without -128, and all zero points are 0."""
        return bool(self.integers.dtype == np.int8 and self.integers.min() > -128 and not self.zero_points.any())


def quantized_weights(weights: Mapping[str, Array], num_directions: int) -> dict[str, QuantizedWeight]:
    """W and R from the inputs of a DynamicQuantizeLSTM.

    Raises:
        TypeError: If integers or scales have another number format.
        ValueError: If an input is missing, shapes contradict one another, or a scale is negative or not finite.
    """
    for name in QUANTIZATION:
        if name not in weights:
            raise ValueError(f"{name} must be given; got none")
    columns = 4 * (weights["R"].shape[1] if weights["R"].ndim == 3 else 0)
    results = {}
    for name, rows in (("W", "I"), ("R", "H")):
        integers = weights[name]
        if integers.dtype.name not in _INTEGERS:
            raise TypeError(f"{name} must be int8 or uint8; got {integers.dtype}")
        if integers.ndim != 3 or (integers.shape[0], integers.shape[2]) != (num_directions, columns):
            raise ValueError(f"{name} must have shape ({num_directions}, {rows}, 4·H); got {integers.shape}")
        scales = _for_columns(f"{name}_scale", weights, "float32", num_directions, columns)
        check_magnitudes(f"{name}_scale", scales)
        zero_points = _for_columns(f"{name}_zero_point", weights, integers.dtype.name, num_directions, columns)
        results[name] = QuantizedWeight(integers.swapaxes(1, 2), scales, zero_points)
    return results


def _for_columns(name: str, weights: Mapping[str, Array], dtype: str, num_directions: int, columns: int) -> Array:
    """A scale or zero point for each column: (D, 4·H), checked."""
    value = weights[name]
    if value.dtype.name != dtype:
        raise TypeError(f"{name} must be {dtype}; got {value.dtype}")
    if value.shape not in ((num_directions,), (num_directions, columns)):
        raise ValueError(
            f"{name} must have shape ({num_directions},) or ({num_directions}, {columns}); got {value.shape}"
        )
    return np.broadcast_to(value.reshape(num_directions, -1), (num_directions, columns))
