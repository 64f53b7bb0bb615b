"""Parameters quantized for int8: each weight as integers, each row of a matrix with its scale."""

from __future__ import annotations

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.kernels.operand_rows import OWN_RANGE
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.quantized_params import QuantizedParams, is_matrix, num_operands, quantized_entries


def quantized(tiling: Tiling, params: Array | QuantizedParams) -> Array:
    """The bytes of a flat parameter vector with its matrices quantized, then scales, then ranges, all as float32.

    Biases and the cell's own parameters stay as they are. ``params`` are the bytes of a flat vector, or are already
    quantized.
    """
    offsets, layout = tiling.scale_offsets, tiling.spec.layout
    num_scales = sum(entry.shape[0] for entry in layout if is_matrix(entry))
    num_ranges = tiling.spec.num_layers * tiling.spec.num_directions * num_operands(tiling.spec)
    result: Array = np.full(layout.size + num_scales + num_ranges, OWN_RANGE, np.float32)
    if isinstance(params, QuantizedParams):
        entries = params.entries()
        if params.ranges is not None:
            result[layout.size + num_scales :] = params.ranges.ravel()
    else:
        entries = quantized_entries(tiling.spec, params.view(np.float32)[: layout.size])
    for entry, values, scales in entries:
        entry.view(result)[...] = values
        if scales is not None:
            begin = offsets[entry.layer, entry.direction, entry.kind] // tiling.item
            result[begin : begin + len(scales)] = scales
    return result.view(np.uint8)
