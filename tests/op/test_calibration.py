"""Ranges of operands from sample inputs: one scale for each operand, and saturation beyond it."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

import fusedrnn
from fusedrnn import QuantizedParams, RNNOp, RNNSpec
from gemms import each_target

SPECS = {
    "lstm": RNNSpec("lstm", 9, 20, num_layers=2, bidirectional=True, compute="int8"),
    "gru": RNNSpec("gru", 9, 20, compute="int8"),
    "reset-before": RNNSpec("gru", 9, 33, reset_after=False, bias="single", compute="int8"),
    "projection": RNNSpec("lstm", 9, 20, num_layers=2, projection_size=6, peepholes=True, compute="int8"),
    "rnn": RNNSpec("rnn_tanh", 9, 17, bias="none", compute="int8"),
}
RNN = SPECS["rnn"]


def flat_params(spec):
    params = np.random.default_rng(0).uniform(-1, 1, spec.layout.size) / np.sqrt(spec.hidden_size)
    return params.astype(np.float32)


def inputs(steps=6, batch=4, seed=1):
    return np.random.default_rng(seed).standard_normal((steps, batch, 9)).astype(np.float32)


@pytest.fixture(params=SPECS.values(), ids=SPECS)
def spec(request):
    return request.param


def quantized_like(array, largest):
    """An array as int8 with one scale, in float64."""
    scale = np.float32(largest) / np.float32(127)
    factor = np.float32(127) / np.float32(largest)
    return np.clip(np.rint(array.astype(np.float32) * factor), -127, 127).astype(np.float64) * scale


def test_against_a_loop():
    """A vanilla RNN, written out."""
    op, params, x = RNNOp(RNN), flat_params(RNN), inputs()
    quantized = op.quantize(params, calibration=inputs(seed=2))
    weights = RNN.layout.unpack(quantized.dequantize().astype(np.float64))
    x_range, h_range = quantized.ranges[0]
    h, expected = np.zeros((4, 17)), []
    for step in x:
        sums = quantized_like(step, x_range) @ weights["l0_i2h_weight"].T
        h = np.tanh(sums + quantized_like(h, h_range) @ weights["l0_h2h_weight"].T)
        expected.append(h)
    for backend in ("cpu", "reference"):
        y, _, _ = RNNOp(RNN, backend).forward(x, quantized)
        error = np.abs(y - np.stack(expected))
        assert (error < 1e-5).mean() > 0.95  # elsewhere h lies between two integers
        assert error.max() < 0.03


def test_ranges(spec):
    """The largest magnitudes of x, of h before each step, and in layers above of the output below."""
    op, params, samples = RNNOp(spec), flat_params(spec), [inputs(), 2 * inputs(3, 2)]
    ranges = op.quantize(params, calibration=samples).ranges
    plain, size = RNNOp(replace(spec, compute=None)), spec.state_size
    outputs = [plain.forward(x, params)[0] for x in samples]
    assert ranges[0, 0] == max(np.abs(x).max() for x in samples)
    if spec.num_layers == 1:
        h = max(np.abs(y[:-1]).max() for y in outputs)
        np.testing.assert_allclose(ranges[0, 1], h, rtol=1e-5)
    else:
        first = RNNOp(replace(spec, compute=None, num_layers=1))
        cut = first.spec.layout.pack({name: spec.layout.unpack(params)[name] for name in first.spec.layout.unpack(
            np.zeros(first.spec.layout.size, np.float32))})  # fmt: skip
        below = max(np.abs(first.forward(x, cut)[0]).max() for x in samples)
        np.testing.assert_allclose(ranges[spec.num_directions :, 0], below, rtol=1e-5)
        own = max(np.abs(y[:-1, :, :size]).max() for y in outputs)
        np.testing.assert_allclose(ranges[spec.num_directions * (spec.num_layers - 1), 1], own, rtol=1e-5)
    assert ranges.shape[1] == (3 if "projection_size=6" in repr(spec) or not spec.reset_after else 2)
    assert (ranges > 0).all()


@pytest.mark.pairwise
@pytest.mark.usefixtures("poisoned")
@each_target("int8")
def test_kernels_are_the_reference(spec, compute, target):
    """On each target; a value between two integers may be rounded to either."""
    params, x = flat_params(spec), inputs()
    quantized = RNNOp(spec).quantize(params, calibration=inputs(seed=3))
    for lengths in (None, [6, 1, 0, 4]):
        y, _, _ = RNNOp(spec).forward(x, quantized, lengths=lengths)
        expected, _, _ = RNNOp(spec, "reference").forward(x, quantized, lengths=lengths)
        error = np.abs(y - expected)
        assert (error < 1e-5).mean() > 0.9 and error.max() < 0.03
    dynamic, _, _ = RNNOp(spec).forward(x, params)
    assert (np.abs(dynamic - RNNOp(spec).forward(x, quantized)[0]) > 1e-5).mean() > 0.5  # the ranges are used


def test_float32_is_near(spec):
    """Within a few steps of a hundredth of the range."""
    params, x = flat_params(spec), inputs(20)
    y, _, _ = RNNOp(spec).forward(x, RNNOp(spec).quantize(params, calibration=x))
    expected, _, _ = RNNOp(replace(spec, compute=None)).forward(x, params)
    assert np.abs(y - expected).max() < 0.05


@pytest.mark.usefixtures("use_all_threads")
def test_bits(spec):
    """The same bits for any threads, batch and padding."""
    op, x = RNNOp(spec), inputs()
    quantized, lengths = op.quantize(flat_params(spec), calibration=0.5 * inputs()), [6, 2, 5, 1]
    with fusedrnn.thread_limits(1):
        expected, final, _ = op.forward(x, quantized, lengths=lengths)
    for threads in (2, 3):
        with fusedrnn.thread_limits(threads):
            y, final_again, _ = op.forward(x, quantized, lengths=lengths)
        for array, expected_array in zip((y, *final_again), (expected, *final), strict=True):
            np.testing.assert_array_equal(array, expected_array)
    for sequence, length in enumerate(lengths):
        alone, _, _ = op.forward(x[:length, sequence : sequence + 1], quantized)
        np.testing.assert_array_equal(alone[:, 0], expected[:length, sequence])


def test_saturation():
    """What is beyond the range counts as the range."""
    op, x = RNNOp(RNN), inputs()
    quantized = op.quantize(flat_params(RNN), calibration=x)
    largest = quantized.ranges[0, 0]
    y, _, _ = op.forward(100 * x, quantized)
    np.testing.assert_array_equal(y, op.forward(np.clip(100 * x, -largest, largest), quantized)[0])
    assert (y != op.forward(x, quantized)[0]).any()


def test_zero_range():
    """An operand that was zero in every sample counts as zero."""
    op, x = RNNOp(RNN), inputs()
    quantized = op.quantize(flat_params(RNN), calibration=0 * x)
    np.testing.assert_array_equal(op.forward(x, quantized)[0], 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(value):
    """As with scales of each row: the sequence is NaN from there on, others are as they were."""
    op, x = RNNOp(RNN), inputs()
    quantized = op.quantize(flat_params(RNN), calibration=x)
    expected, _, _ = op.forward(x, quantized)
    x[2, 1, 3] = value
    y, _, _ = op.forward(x, quantized)
    np.testing.assert_array_equal(y[:, [0, 2, 3]], expected[:, [0, 2, 3]])
    np.testing.assert_array_equal(y[:2, 1], expected[:2, 1])
    assert np.isnan(y[2:, 1]).all()


def test_storage(tmp_path):
    op, x = RNNOp(RNN), inputs()
    quantized = op.quantize(flat_params(RNN), calibration=iter([x]))
    np.savez(tmp_path / "params.npz", **quantized.arrays())
    for again in (QuantizedParams(RNN, **np.load(tmp_path / "params.npz")), pickle.loads(pickle.dumps(quantized))):
        np.testing.assert_array_equal(again.ranges, quantized.ranges)
        np.testing.assert_array_equal(op.forward(x, again)[0], op.forward(x, quantized)[0])


def test_ranges_of_quantized_params():
    """Quantized parameters can be calibrated; weights alone in int8 do not read the ranges."""
    op, x, params = RNNOp(RNN), inputs(), flat_params(RNN)
    quantized = op.quantize(op.quantize(params), calibration=x)
    np.testing.assert_array_equal(quantized.integers, op.quantize(params).integers)
    np.testing.assert_allclose(quantized.ranges, op.quantize(params, calibration=x).ranges, rtol=0.05)
    weights_only = RNNOp(replace(RNN, compute="int8_weights"))
    np.testing.assert_array_equal(weights_only.forward(x, quantized)[0], weights_only.forward(x, params)[0])


def test_inputs_in_one_buffer():
    """A reader may fill the same array again and again."""
    op, params = RNNOp(RNN), flat_params(RNN)
    samples, buffer = [inputs(), 0.1 * inputs(seed=2)], np.empty_like(inputs())

    def read():
        for buffer[...] in samples:
            yield buffer

    np.testing.assert_array_equal(op.quantize(params, read()).ranges, op.quantize(params, samples).ranges)


def test_errors():
    op, x, params = RNNOp(RNN), inputs(), flat_params(RNN)
    with pytest.raises(ValueError, match="calibration needs compute 'int8'; got 'int8_weights'"):
        RNNOp(replace(RNN, compute="int8_weights")).quantize(params, calibration=x)
    with pytest.raises(ValueError, match="calibration must hold at least one input; got none"):
        op.quantize(params, calibration=[])
    with pytest.raises(TypeError, match="calibration must be an array or an iterable of arrays; got int"):
        op.quantize(params, calibration=3)
    with pytest.raises(ValueError, match=r"calibration must have shape \(T, N, 9\); got \(2, 3\)"):
        op.quantize(params, calibration=[x, np.ones((2, 3), np.float32)])
    bad = x.copy()
    for bad[1, 2, 3] in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"^calibration must be finite; got NaN or infinity in input 1$"):
            op.quantize(params, calibration=[x, bad])
    with pytest.raises(json.JSONDecodeError, match="x"):  # an error of the caller's iterable stays as it is
        op.quantize(params, calibration=map(json.loads, ["x"]))
    overflows = RNNOp(replace(RNN, mode="rnn_relu"))
    with pytest.raises(ValueError, match=r"^calibration must keep every operand of the network finite"):
        overflows.quantize(params * np.float32(1e30), calibration=x * np.float32(1e5))
    quantized = op.quantize(params, calibration=x)
    with pytest.raises(ValueError, match=r"ranges must have shape \(1, 2\); got \(2, 2\)"):
        replace(quantized, ranges=np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="ranges must be finite and not negative"):
        replace(quantized, ranges=-quantized.ranges)
