"""Quantized parameters: the bits of the float32 ones they come from, a quarter of the bytes, and never changed."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

import fusedrnn.op.validation
from fusedrnn import QuantizedParams, RNNOp, RNNSpec
from fusedrnn.number_formats import quantize_rows

COMPUTE = ("int8", "int8_weights")
SPECS = {
    "lstm": RNNSpec("lstm", 7, 20, num_layers=2, bidirectional=True, compute="int8"),
    "gru": RNNSpec("gru", 7, 20, reset_after=False, bias="single", compute="int8"),
    "rnn": RNNSpec("rnn_tanh", 7, 20, bias="none", compute="int8"),
    "projection": RNNSpec("lstm", 7, 20, projection_size=6, peepholes=True, compute="int8"),
}
SPEC = SPECS["lstm"]


def flat_params(spec, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, spec.layout.size).astype(np.float32)


def inputs(spec, steps=5, batch=3):
    return np.random.default_rng(1).standard_normal((steps, batch, spec.input_size)).astype(np.float32)


def assert_same(results, expected):
    (y, final, _), (expected_y, expected_final, _) = results, expected
    for array, expected_array in zip((y, *final), (expected_y, *expected_final), strict=True):
        np.testing.assert_array_equal(array, expected_array)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bits_of_float_params(spec, compute, backend):
    """Calls, cached calls and calls with lengths have the bits that float32 parameters give."""
    spec = replace(spec, compute=compute)
    op, params, x = RNNOp(spec, backend), flat_params(spec), inputs(spec)
    quantized = op.quantize(params)
    expected = RNNOp(spec, backend).forward(x, params)
    for _ in range(4):
        assert_same(op.forward(x, quantized), expected)
    assert_same(op.forward(x, quantized, lengths=[5, 0, 3]), RNNOp(spec, backend).forward(x, params, lengths=[5, 0, 3]))
    for other in COMPUTE:
        op = RNNOp(replace(spec, compute=other), backend)
        assert_same(op.forward(x, quantized), op.forward(x, params))


@pytest.mark.parametrize("compute", COMPUTE)
def test_stream(compute):
    spec = RNNSpec("lstm", 7, 20, compute=compute)
    op, params, x = RNNOp(spec), flat_params(spec), inputs(spec)
    stream, expected = op.stream(op.quantize(params), batch=3), op.forward(x, params)[0]
    np.testing.assert_array_equal(np.concatenate([stream(x[step : step + 1]) for step in range(5)]), expected)


def test_cached_call_is_used(monkeypatch):
    """After two calls of one shape, checked calls come no more."""
    op, x = RNNOp(SPEC), inputs(SPEC)
    params = op.quantize(flat_params(SPEC))
    for _ in range(3):
        expected = op.forward(x, params)
    monkeypatch.setattr(fusedrnn.op.validation, "forward_operands", lambda *_: pytest.fail("a checked call"))
    assert_same(op.forward(x, params), expected)


def test_other_params_are_not_confused():
    """Parameters that come and go, at the same address or not, are told apart."""
    op, x = RNNOp(SPEC), inputs(SPEC)
    for seed in range(12):
        params = flat_params(SPEC, seed % 7)
        assert_same(op.forward(x, op.quantize(params)), RNNOp(SPEC).forward(x, params))


def test_no_fingerprint(monkeypatch):
    op, x = RNNOp(SPEC), inputs(SPEC)
    params = op.quantize(flat_params(SPEC))
    monkeypatch.setattr("fusedrnn.runtime.fingerprint.fingerprint_of", lambda _: pytest.fail("a fingerprint"))
    for steps in (5, 5, 5, 3):
        op.forward(x[:steps], params)
    with pytest.raises(pytest.fail.Exception, match="a fingerprint"):
        op.forward(x, flat_params(SPEC))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_content(spec):
    """Integers and scales are those of the rows; biases and peephole weights are exact."""
    params, quantized = flat_params(spec), RNNOp(spec).quantize(flat_params(spec))
    dequantized = spec.layout.unpack(quantized.dequantize())
    for name, values in spec.layout.unpack(params).items():
        if values.ndim == 2:
            integers, scales = quantize_rows(values)
            np.testing.assert_array_equal(dequantized[name], integers * scales[:, None])
            assert (np.abs(dequantized[name] - values) <= 0.5001 * scales[:, None]).all()
        else:
            np.testing.assert_array_equal(dequantized[name], values)
    assert quantized.dequantize().dtype == np.float32


def test_quarter_of_the_bytes():
    spec = RNNSpec("lstm", 256, 256, num_layers=2, compute="int8")
    assert RNNOp(spec).quantize(flat_params(spec)).nbytes <= 0.27 * 4 * spec.layout.size


def test_immutable():
    quantized = RNNOp(SPEC).quantize(flat_params(SPEC))
    for array in quantized.arrays().values():
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    with pytest.raises(AttributeError):
        quantized.scales = np.ones_like(quantized.scales)


def test_source_may_change():
    op, params, x = RNNOp(SPEC), flat_params(SPEC), inputs(SPEC)
    quantized, expected = op.quantize(params), op.forward(x, params)
    params[:] = 0
    assert_same(op.forward(x, quantized), expected)


@pytest.mark.parametrize("copied", [lambda q: pickle.loads(pickle.dumps(q)), copy.copy, copy.deepcopy])
def test_pickle(copied):
    op, x = RNNOp(SPEC), inputs(SPEC)
    quantized = op.quantize(flat_params(SPEC))
    again = copied(quantized)
    assert again.spec == quantized.spec and again.nbytes == quantized.nbytes
    assert_same(op.forward(x, again), op.forward(x, quantized))
    with pytest.raises(ValueError, match="read-only"):
        again.integers[:] = 0


def test_savez(tmp_path):
    op, x = RNNOp(SPEC), inputs(SPEC)
    quantized = op.quantize(flat_params(SPEC))
    np.savez(tmp_path / "params.npz", **quantized.arrays())
    again = QuantizedParams(SPEC, **np.load(tmp_path / "params.npz"))
    assert_same(op.forward(x, again), op.forward(x, quantized))


@pytest.mark.parametrize("names", ["mxnet", "torch"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_pack(spec, names):
    """Integers and scales by name give the network of what they stand for."""
    params = flat_params(spec)
    arrays = {
        name: quantize_rows(values) if values.ndim == 2 else values
        for name, values in spec.layout.unpack(params, names=names).items()
    }
    packed = QuantizedParams.pack(spec, arrays, names=names)
    for name, array in RNNOp(spec).quantize(params).arrays().items():
        np.testing.assert_array_equal(getattr(packed, name), array)


def test_pack_one_scale_and_every_integer():
    """One scale stands for all rows; -128 is an integer like others."""
    spec = RNNSpec("rnn_tanh", 3, 40, bias="none", compute="int8_weights")
    rng = np.random.default_rng(0)
    arrays = {
        name: (rng.integers(-128, 128, values.shape).astype(np.int8), np.float32(2.0**-9))
        for name, values in spec.layout.unpack(flat_params(spec)).items()
    }
    arrays["l0_i2h_weight"][0][:2] = -128
    packed, x = QuantizedParams.pack(spec, arrays), inputs(spec)
    y, _, _ = RNNOp(spec).forward(x, packed)
    plain = replace(spec, compute=None)
    expected, _, _ = RNNOp(plain).forward(x, packed.dequantize())
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_sums_of_integers_are_exact():
    """They cancel, where a sum of the float32 numbers that they stand for would leave some of 1e15."""
    spec = RNNSpec("rnn_relu", 40, 33, bias="none", compute="int8")
    params = flat_params(spec)
    weight = spec.layout.view(params, 0, 0, "i2h_weight")
    weight[:, 20:] = -np.random.default_rng(1).permuted(weight[:, :20], axis=1)
    x = np.full((1, 3, 40), 1e15, np.float32)
    assert not RNNOp(spec).forward(x, params)[0].any()
    x[0, 1, 0] = 2e15
    assert RNNOp(spec).forward(x, params)[0][0, 1].any()


@pytest.mark.parametrize("hidden", [33, 700])
def test_largest_input_of_int8_weights(hidden):
    """Sums of x times integers must fit: 127 times those of the magnitudes of x."""
    spec = RNNSpec("rnn_relu", 64, hidden, bias="none", compute="int8_weights")
    params, x = flat_params(spec), np.sign(inputs(spec, 1)) * np.float32(3.4e38 / (127 * 64))
    y, _, _ = RNNOp(spec).forward(x, params)
    expected, _, _ = RNNOp(spec, "reference").forward(x.astype(np.float32), params)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_errors():
    op, x, params = RNNOp(SPEC), inputs(SPEC), flat_params(SPEC)
    quantized = op.quantize(params)
    assert op.quantize(quantized) is quantized
    plain = RNNOp(replace(SPEC, compute=None))
    for call in (plain.quantize, lambda params: plain.forward(x, params)):
        with pytest.raises(ValueError, match="need compute 'int8' or 'int8_weights'; got None"):
            call(quantized)
    other = RNNOp(replace(SPEC, num_layers=1))
    with pytest.raises(ValueError, match="params must be quantized for RNNSpec"):
        other.forward(x, quantized)
    with pytest.raises(NotImplementedError, match="training with compute='int8' is not supported"):
        op.forward(x, quantized, training=True)
    with pytest.raises(TypeError, match="params must be a NumPy array; got list"):
        op.quantize([1.0])
    with pytest.raises(TypeError, match="params must have dtype float32; got float64"):
        op.quantize(params.astype(np.float64))


def test_constructor_errors():
    arrays = RNNOp(SPEC).quantize(flat_params(SPEC)).arrays()
    with pytest.raises(TypeError, match="spec must be an RNNSpec; got str"):
        QuantizedParams("lstm", **arrays)
    for name, array in arrays.items():
        with pytest.raises(TypeError, match=f"{name} must have dtype {array.dtype}; got int32"):
            QuantizedParams(SPEC, **{**arrays, name: array.astype(np.int32)})
        with pytest.raises(ValueError, match=rf"{name} must have shape \({len(array)},\); got \({len(array) - 1},\)"):
            QuantizedParams(SPEC, **{**arrays, name: array[:-1]})
        with pytest.raises(TypeError, match=f"{name} must be a NumPy array; got MaskedArray"):
            QuantizedParams(SPEC, **{**arrays, name: np.ma.masked_array(array, mask=True)})
    named = {name: (values.astype(np.int8), np.float32(1)) if values.ndim == 2 else values
             for name, values in SPEC.layout.unpack(flat_params(SPEC)).items()}  # fmt: skip
    with pytest.raises(TypeError, match="l0_i2h_weight must be a pair of integers and scales; got ndarray"):
        QuantizedParams.pack(SPEC, {**named, "l0_i2h_weight": named["l0_i2h_weight"][0]})
    integers, scale = named.pop("l0_i2h_weight")
    with pytest.raises(TypeError, match="the scales of l0_i2h_weight must be numbers without a mask; got MaskedArray"):
        QuantizedParams.pack(SPEC, {**named, "l0_i2h_weight": (integers, np.ma.masked_array(scale, mask=True))})
    with pytest.raises(ValueError, match=r"^parameters missing: l0_i2h_weight; unknown: w$"):
        QuantizedParams.pack(SPEC, {**named, "w": integers})
    for scales in (np.ones(79), np.ones((80, 1)), np.ones((1, 80)), np.ones(1)):
        with pytest.raises(ValueError, match=rf"scales of l0_i2h_weight must have .* or \(\) .*; got \({len(scales)},"):
            QuantizedParams.pack(SPEC, {**named, "l0_i2h_weight": (integers, scales.astype(np.float32))})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-3, -0.0])
def test_scales_and_ranges_are_magnitudes(value):
    quantized = RNNOp(SPEC).quantize(flat_params(SPEC))
    ranges = np.ones((4, 2), np.float32)
    for name, array in (("scales", quantized.scales), ("ranges", ranges)):
        array = array.copy()
        array.flat[-1] = value
        with pytest.raises(ValueError, match=f"{name} must be finite and not negative; got {np.float32(value)}"):
            replace(quantized, **{name: array})
    named = {name: quantize_rows(values) if values.ndim == 2 else values
             for name, values in SPEC.layout.unpack(flat_params(SPEC)).items()}  # fmt: skip
    named["r1_h2h_weight"] = named["r1_h2h_weight"][0], np.float32(value)
    with pytest.raises(ValueError, match="the scales of r1_h2h_weight must be finite and not negative"):
        QuantizedParams.pack(SPEC, named)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_matrices_that_are_not_finite(value):
    """Calls take them, and give NaN; there is nothing to quantize."""
    op, params, x = RNNOp(SPEC), flat_params(SPEC), inputs(SPEC)
    SPEC.layout.unpack(params)["l1_h2h_weight"][7, 3] = value
    with pytest.raises(ValueError, match="params must be finite to be quantized; row 7 of l1_h2h_weight is not"):
        op.quantize(params)
    assert np.isnan(op.forward(x, params)[0]).any()
