"""Parameters quantized for int8: each weight as integers, each row of a matrix with its scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.number_formats import quantize_rows

Array = NDArray[Any]


def quantized(tiling: Tiling, params: Array) -> Array:
    """The bytes of a flat parameter vector with its matrices quantized, then the scales, all as float32.

    Biases and peephole weights stay as they are.
    """
    offsets, layout = tiling.scale_offsets, tiling.spec.layout
    num_scales = sum(int(layout.entry(*key).shape[0]) for key in offsets)
    result: Array = np.empty(layout.size + num_scales, np.float32)
    result[: layout.size] = params.view(np.float32)[: layout.size]
    for key, offset in offsets.items():
        entry = layout.entry(*key)
        weights = result[entry.offset : entry.offset + entry.size].reshape(entry.shape)
        integers, scales = quantize_rows(weights)
        weights[:] = integers
        begin = offset // tiling.item
        result[begin : begin + len(scales)] = scales
    return result.view(np.uint8)
