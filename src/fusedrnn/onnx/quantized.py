"""ONNX Runtime's ``com.microsoft.DynamicQuantizeLSTM``: an LSTM whose W and R are integers with scales.

A weight is (integer - zero point) · scale. The node is read as an LSTM whose GEMM operands are int8. W is (D, I, 4·H)
and R (D, H, 4·H), transposed against those of LSTM; scales and zero points are one for each direction, (D,), or one for
each gate element, (D, 4·H). The attributes are those of LSTM-7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

Array = NDArray[Any]

DOMAIN = "com.microsoft"
OPERATOR = "DynamicQuantizeLSTM"
LSTM_VERSION = 7
"""The version of LSTM whose attributes the operator has."""
QUANTIZATION = ("W_scale", "W_zero_point", "R_scale", "R_zero_point")
"""The inputs behind those of an LSTM."""
_LSTM_INPUTS = 8
_INTEGERS = ("int8", "uint8")


def is_quantized(node: NodeProto) -> bool:
    """Whether the node is a DynamicQuantizeLSTM."""
    return bool(node.domain == DOMAIN and node.op_type == OPERATOR)


def as_lstm(node: NodeProto) -> NodeProto:
    """The LSTM node with the attributes, and the inputs that an LSTM has too."""
    lstm = NodeProto()
    lstm.CopyFrom(node)
    lstm.domain, lstm.op_type = "", "LSTM"
    del lstm.input[_LSTM_INPUTS:]
    while lstm.input and not lstm.input[-1]:
        del lstm.input[-1]
    return lstm


def dequantized(weights: Mapping[str, Array], num_directions: int) -> dict[str, Array]:
    """W (D, 4·H, I), R (D, 4·H, H) in float32 and, as they are, B and P, from the weights of a DynamicQuantizeLSTM.

    Raises:
        TypeError: If integers or scales have another number format.
        ValueError: If an input is missing, or shapes contradict one another.
    """
    for name in QUANTIZATION:
        if name not in weights:
            raise ValueError(f"{name} must be given; got none")
    results = {name: value for name, value in weights.items() if name not in QUANTIZATION}
    hidden_size = weights["R"].shape[1] if weights["R"].ndim == 3 else 0
    for name, rows in (("W", "I"), ("R", "H")):
        integers = weights[name]
        columns = 4 * hidden_size
        if integers.dtype.name not in _INTEGERS:
            raise TypeError(f"{name} must be int8 or uint8; got {integers.dtype}")
        if integers.ndim != 3 or (integers.shape[0], integers.shape[2]) != (num_directions, columns):
            raise ValueError(f"{name} must have shape ({num_directions}, {rows}, 4·H); got {integers.shape}")
        scale = _broadcast(f"{name}_scale", weights, "float32", num_directions, columns)
        zero_point = _broadcast(f"{name}_zero_point", weights, integers.dtype.name, num_directions, columns)
        values = (integers.astype(np.float32) - zero_point.astype(np.float32)) * scale
        results[name] = np.ascontiguousarray(values.swapaxes(1, 2))
    return results


def _broadcast(name: str, weights: Mapping[str, Array], dtype: str, num_directions: int, columns: int) -> Array:
    """A scale or zero point as (D, 1, 1) or (D, 1, 4·H), checked."""
    value = weights[name]
    if value.dtype.name != dtype:
        raise TypeError(f"{name} must be {dtype}; got {value.dtype}")
    if value.shape not in ((num_directions,), (num_directions, columns)):
        raise ValueError(
            f"{name} must have shape ({num_directions},) or ({num_directions}, {columns}); got {value.shape}"
        )
    return value.reshape(num_directions, 1, -1)
