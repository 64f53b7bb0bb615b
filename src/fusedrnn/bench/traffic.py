"""How many bytes a call must move, whoever computes it: with the useful operations, its arithmetic intensity."""

from __future__ import annotations

import math

from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.rows import Row
from fusedrnn.spec import RNNSpec

INTENSITY = "useful flops per byte that must reach the cores (recurrent weights at every step, all else once)"
"""What an intensity is, in a line."""


def least_bytes(row: Row) -> int:
    """Bytes that must travel between a row's cores and the caches or memory where its data lie.

    Forward, of each layer and direction: the recurrent weights at every step, since a step needs the one before and no
    register file holds them; once each all other parameters, the layer's input and output, its states before and
    after. Training: all this again in backward, which goes back step by step, and once each the gradients of
    parameters, inputs, outputs and states. What forward keeps for backward is not in it: that could be computed again.
    Of packed sequences only the steps that count are in it.
    """
    spec = row.case.spec(row.mode, row.dtype)
    rows, steps = (sum(row.lengths), max(row.lengths)) if row.lengths else (row.case.T * row.case.N, row.case.T)
    once = spec.layout.size + _data(spec, rows, row.case.N)
    forward = once + (steps - 1) * sum(
        entry.size for entry in spec.layout if entry.kind in ("h2h_weight", "h2r_weight")
    )
    return (2 * forward + once if PHASES[row.phase].training else forward) * (8 if row.dtype == "float64" else 4)


def intensity(row: Row) -> float:
    """Useful floating-point operations for each of those bytes."""
    return row.flops / least_bytes(row)


def _data(spec: RNNSpec, rows: int, batch: int) -> int:
    """Elements of every layer's inputs, outputs and states; ``rows`` are all steps of all sequences."""
    states = 2 * sum(math.prod(shape) for shape in spec.state_shape(batch))
    return states + rows * sum(spec.layer_input_size(layer) + spec.output_size for layer in range(spec.num_layers))
