"""The format in which the weights of a call are packed: *narrow*, that of operands, or *wide*, float32.

Wide weights are the same rounded numbers or integers as narrow ones. So the bits of a result are the same, and the
choice is one of time.
"""

from __future__ import annotations

import math
import sys

from fusedrnn.engines.cpu.tuning import Tuning
from fusedrnn.jit.host import target_for
from fusedrnn.jit.target import ITEM_SIZE, Target
from fusedrnn.spec import RNNSpec

ANY_ROWS = sys.maxsize


def max_narrow_rows(spec: RNNSpec, steps: int, tuning: Tuning) -> int:
    """The most sequences of a batch for which calls of T steps read narrow weights; 0 for none.

    Without an instruction for the format, each tile of rows widens narrow weights in registers. This pays where reading
    wide weights takes longer than multiplying the rows by them. In formats that can be trained, weights are packed the
    same way for all batches. A single step reads all weights for N rows. With several steps, one GEMM multiplies all
    their inputs, and part of the recurrent weights stays in L2, so narrow weights save half as much.
    """
    shapes = spec.parameter_shapes(spec.num_layers - 1), spec.parameter_shapes(0)
    layer_elements = max(sum(math.prod(shape) for shape in of_layer.values()) for of_layer in shapes)
    wide_bytes = layer_elements * ITEM_SIZE[spec.dtype]
    if wide_bytes <= tuning.wide_weight_bytes:
        return 0
    if spec.operand_format != "int8_weights":
        return ANY_ROWS
    rows = next((rows for most_bytes, rows in tuning.narrow_int8_rows if wide_bytes <= most_bytes), 0)
    return 2 * rows if steps == 1 else rows


def weight_target(spec: RNNSpec, narrow_weights: bool) -> Target:
    """The target of the kernels that read narrow or wide weights."""
    return target_for(spec.hidden_size, spec.dtype).for_compute(spec.operand_format, narrow_weights)
