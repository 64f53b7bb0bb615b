"""Parameters quantized for int8: each weight as integers, each row of a matrix with its scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.quantized_params import QuantizedParams

Array = NDArray[Any]


def quantized(tiling: Tiling, params: Array | QuantizedParams) -> Array:
    """The bytes of a flat parameter vector with its matrices quantized, then the scales, all as float32.

    Biases and peephole weights stay as they are. ``params`` are the bytes of a flat vector, or quantized already.
    """
    offsets, layout = tiling.scale_offsets, tiling.spec.layout
    if not isinstance(params, QuantizedParams):
        params = QuantizedParams.quantize(tiling.spec, params.view(np.float32)[: layout.size])
    result: Array = np.empty(layout.size + len(params.scales), np.float32)
    for entry, values, scales in params.entries():
        entry.view(result)[...] = values
        if scales is not None:
            begin = offsets[entry.layer, entry.direction, entry.kind] // tiling.item
            result[begin : begin + len(scales)] = scales
    return result.view(np.uint8)
