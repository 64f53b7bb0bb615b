"""The bounds of rounded operands: no result exceeds them, and some come close."""

import numpy as np
import pytest

from fusedrnn import RNNOp, RNNSpec
from fusedrnn.number_formats import dequantize_rows, quantize_rows, round_to_bfloat16
from fusedrnn.testing.operand_errors import forward_error, operand_error, product_error

COMPUTE = ("bfloat16", "int8")
SIZES = ((1, 1, 1, 1), (4, 3, 5, 17), (3, 2, 40, 64))  # T, N, I, H
CELLS = (("rnn_tanh", True), ("lstm", True), ("gru", True), ("gru", False))


def rounded(compute, rows):
    return round_to_bfloat16(rows) if compute == "bfloat16" else dequantize_rows(*quantize_rows(rows))


@pytest.mark.parametrize("compute", COMPUTE)
def test_operand_error_is_reached(compute):
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((2000, 50)) * 10.0 ** rng.uniform(-5, 5, (2000, 1))).astype(np.float32)
    ratio = np.abs(rounded(compute, rows).astype(np.float64) - rows) / operand_error(compute, rows)
    assert 0.97 < ratio.max() <= 1.0


@pytest.mark.parametrize("compute", COMPUTE)
def test_product_error_is_reached(compute):
    """Operands just above the middle of two steps, all rounded up: the product has nearly the whole error."""
    K = 2048
    numbers = np.full(K, 1 + 1.001 * 2.0**-8) if compute == "bfloat16" else np.full(K, 3.501 / 127)
    numbers[0] = 1.0
    row, weight = (array.astype(np.float32)[None] for array in (numbers, numbers))
    exact = row.astype(np.float64) @ weight.T.astype(np.float64)
    result = rounded(compute, row).astype(np.float64) @ rounded(compute, weight).T.astype(np.float64)
    assert 0.9 < np.abs(result - exact) / product_error(compute, row, weight) <= 1.0


def exact_h(spec, params, x, states):
    """The output in float64 by the reference, without rounding of operands."""
    exact = RNNSpec(spec.mode, spec.input_size, spec.hidden_size, dtype="float64", reset_after=spec.reset_after)
    y, _, _ = RNNOp(exact, "reference").forward(
        x.astype(np.float64), params.astype(np.float64), tuple(state.astype(np.float64) for state in states)
    )
    return y


@pytest.mark.parametrize(("mode", "reset_after"), CELLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("compute", ["float32", "int8_weights", *COMPUTE])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_forward_error(mode, reset_after, size, compute, scale):
    """Of weights that contract and weights that do not. An error is below the bound, and not by orders of magnitude."""
    T, N, I, H = size
    spec = RNNSpec(mode, I, H, reset_after=reset_after, compute=compute)
    rng = np.random.default_rng(1)
    params = (rng.uniform(-scale, scale, spec.layout.size) / np.sqrt(H)).astype(np.float32)
    x = rng.uniform(-1.7, 1.7, (T, N, I)).astype(np.float32)
    states = tuple(rng.uniform(-1, 1, shape).astype(np.float32) for shape in spec.state_shape(N))
    y, _, _ = RNNOp(spec, "cpu").forward(x, params, states)
    error = np.abs(y - exact_h(spec, params, x, states)).max(axis=(1, 2))
    bound = forward_error(spec, params, x, 1.0)
    assert (error <= bound).all()
    if compute != "float32" and H > 1:  # one number is quantized without an error
        assert error[0] >= bound[0] / 150


@pytest.mark.parametrize(
    "spec",
    [
        RNNSpec("rnn_relu", 3, 4),
        RNNSpec("lstm", 3, 4, num_layers=2),
        RNNSpec("gru", 3, 4, bidirectional=True),
        RNNSpec("lstm", 3, 4, peepholes=True),
        RNNSpec("lstm", 3, 4, projection_size=2),
    ],
    ids=lambda spec: spec.mode,
)
def test_specs_without_a_bound(spec):
    with pytest.raises(ValueError, match=r"^spec must be one layer with tanh in one direction"):
        forward_error(spec, np.zeros(spec.layout.size, np.float32), np.zeros((1, 1, 3), np.float32))
