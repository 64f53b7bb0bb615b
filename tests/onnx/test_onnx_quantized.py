"""DynamicQuantizeLSTM of ONNX Runtime: read and run, against ONNX Runtime and the standard's equations in float64."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

import fusedrnn.onnx
from fusedrnn import RNNOp
from fusedrnn.onnx import prepare, read, write
from fusedrnn.testing.operand_errors import forward_error, propagated_error
from onnx_models import Case, expected, info, model_of, run_onnxruntime

DOMAIN = "com.microsoft"
INPUTS = (
    "X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P", "W_scale", "W_zero_point", "R_scale",
    "R_zero_point",
)  # fmt: skip
WEIGHTS = ("W", "R", "B", "P", *INPUTS[8:])
LSTM = Case("LSTM", T=3, N=4, I=5, H=8, weights_inside=True, optional=("B", "initial_h", "initial_c"))


def quantized(case, per_channel=True, signed=True, bits=8):
    """The arrays of a node whose weights are those of the case, quantized, and the float32 arrays that these stand for.

    ``bits`` is 7 where ONNX Runtime runs the node: its products of eight bits saturate on processors without VNNI.
    """
    floats = case.arrays()
    arrays = dict(floats)
    for name in ("W", "R"):
        weight = floats[name]  # (D, 4·H, K)
        axes = 2 if per_channel else (1, 2)
        largest = np.abs(weight).max(axis=axes, keepdims=True)
        scale = (largest / (2 ** (bits - 1) - 1)).astype(np.float32)
        zero_point = 0 if signed else 2 ** (bits - 1)
        dtype = np.int8 if signed else np.uint8
        integers = (np.rint(weight / scale) + zero_point).astype(dtype)
        shape = (case.D, -1) if per_channel else (case.D,)
        arrays[name] = np.ascontiguousarray(integers.swapaxes(1, 2))
        arrays[f"{name}_scale"] = scale.reshape(shape)
        arrays[f"{name}_zero_point"] = np.full(arrays[f"{name}_scale"].shape, zero_point, dtype)
        floats[name] = (integers.astype(np.float32) - zero_point) * scale
    return arrays, floats


def node_of(case, arrays, **attributes):
    names = [name if name in arrays else "" for name in INPUTS]
    attributes = {"hidden_size": case.H} | case.attributes | attributes
    return helper.make_node(
        "DynamicQuantizeLSTM", names, list(case.output_names), name="q", domain=DOMAIN, **attributes
    )


def model_with(case, arrays, node=None):
    weights = {name: arrays[name] for name in WEIGHTS if name in arrays and case.weights_inside}
    inputs = [info(name, array) for name, array in arrays.items() if name not in weights]
    outputs = [onnx.ValueInfoProto(name=name) for name in case.output_names]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    model = model_of([node or node_of(case, arrays)], inputs, outputs, initializers)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model


def inputs_of(case, arrays):
    return {name: array for name, array in arrays.items() if not (case.weights_inside and name in WEIGHTS)}


def h_bounds(case, floats):
    """The largest error of h at each step, here and in ONNX Runtime, against exact arithmetic on these weights."""
    layer = read(case.model(floats))["node"]
    here = forward_error(replace(layer.spec, compute="int8"), layer.params, floats["X"], 1.0)
    # It quantizes X, and h of each step, as a whole: 255 steps from the smallest to the largest, and up to one step of
    # error at the ends, since zero is a step.
    step = (max(floats["X"].max(), 0) - min(floats["X"].min(), 0)) / 255
    gates = [layer.spec.layout.view(layer.params, 0, 0, kind) for kind in ("i2h_weight", "h2h_weight")]
    sums = [np.abs(weight.astype(np.float64)).sum(axis=1) for weight in gates]
    there = propagated_error(
        layer.spec, layer.params, np.tile(1.001 * step * sums[0], (case.T, 1)), 1.001 * 2 / 255 * sums[1], 1.0
    )
    return here, there


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_float64_equations(per_channel, signed, direction, engine):
    """What the integers stand for, and h rounded to 255 steps: a small error, in every kind of quantization."""
    case = replace(LSTM, attributes={"direction": direction}, lengths=(3, 1, 2, 0))
    arrays, floats = quantized(case, per_channel, signed)
    outputs = prepare(model_with(case, arrays), backend=engine).run(inputs_of(case, arrays))
    for output, exact in zip(outputs, expected(case, floats), strict=True):
        assert output.dtype == np.float32
        np.testing.assert_allclose(output, exact, rtol=0, atol=0.01)


def run_in_onnxruntime(model, inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("T", [1, 3])
def test_onnxruntime(per_channel, signed, T):
    """Both are within their bounds, so that they differ by the sum at most; typical errors are far smaller."""
    case = replace(LSTM, T=T)
    arrays, floats = quantized(case, per_channel, signed, bits=7)
    model = model_with(case, arrays)
    here, there = (run(model, inputs_of(case, arrays)) for run in (fusedrnn.onnx.run_model, run_in_onnxruntime))
    exact = expected(case, floats)
    for outputs, bound in zip((here, there), h_bounds(case, floats), strict=True):
        assert (np.abs(outputs[0] - exact[0]).max(axis=(1, 2, 3)) <= bound).all()
    for output, other in zip(here, there, strict=True):
        np.testing.assert_allclose(output, other, rtol=0, atol=0.02)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("attributes", [{}, {"direction": "bidirectional"}, {"clip": 0.4, "input_forget": 1}], ids=str)
def test_a_model_that_onnxruntime_quantized(per_channel, attributes, tmp_path):
    """Its quantize_dynamic makes the model. Weights of seven bits lose more than the activations of either side do."""
    case = replace(LSTM, attributes=attributes, optional=("B", "initial_h", "initial_c", "P"), lengths=(3, 1, 2, 2))
    arrays = case.arrays()
    onnx.save(case.model(arrays), tmp_path / "float.onnx")
    quantize_dynamic(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", per_channel=per_channel, reduce_range=True,
        op_types_to_quantize=["LSTM"],
    )  # fmt: skip
    model = onnx.load(tmp_path / "int8.onnx")
    assert [node.op_type for node in model.graph.node] == ["DynamicQuantizeLSTM"]
    inputs = case.inputs(arrays)
    here, there = fusedrnn.onnx.run_model(model, inputs), run_in_onnxruntime(model, inputs)
    for output, other, unquantized in zip(here, there, run_onnxruntime(case, arrays), strict=True):
        np.testing.assert_allclose(output, other, rtol=0, atol=0.02)
        np.testing.assert_allclose(output, unquantized, rtol=0, atol=0.05)


def test_weights_that_are_inputs():
    case = replace(LSTM, weights_inside=False)
    arrays, floats = quantized(case)
    ready = prepare(model_with(case, arrays))
    assert ready.inputs == tuple(arrays)
    first = ready.run(arrays)
    np.testing.assert_allclose(first[0], expected(case, floats)[0], rtol=0, atol=0.01)
    inside = prepare(model_with(LSTM, arrays)).run(inputs_of(LSTM, arrays))
    for output, other in zip(first, inside, strict=True):
        np.testing.assert_array_equal(output, other)


def test_run_node():
    arrays, _ = quantized(LSTM)
    outputs = fusedrnn.onnx.run_node(node_of(LSTM, arrays), arrays)
    expected_outputs = fusedrnn.onnx.run_model(model_with(LSTM, arrays), inputs_of(LSTM, arrays))
    for output, other in zip(outputs, expected_outputs, strict=True):
        np.testing.assert_array_equal(output, other)


def test_read():
    """The layer is an LSTM with operands in int8; its parameters stand for what the integers do."""
    arrays, floats = quantized(LSTM)
    layer = read(model_with(LSTM, arrays))["q"]
    plain = read(LSTM.model(floats))["node"]
    assert layer.kind == "LSTM"
    assert layer.spec == replace(plain.spec, compute="int8")
    np.testing.assert_array_equal(layer.params.dequantize(), plain.params)
    assert layer.inputs["R_scale"] == "R_scale"
    h0, c0 = (arrays[name] for name in ("initial_h", "initial_c"))
    y, _, _ = RNNOp(layer.spec).forward(arrays["X"], layer.params, (h0, c0))
    Y, *_ = fusedrnn.onnx.run_model(model_with(LSTM, arrays), inputs_of(LSTM, arrays))
    np.testing.assert_array_equal(y, Y[:, 0])


def gates_of(layer):
    """The integers, the scales and the biases of the input of a layer."""
    entries = {entry.kind: (values, scales) for entry, values, scales in layer.params.entries()}
    return *entries["i2h_weight"], entries["i2h_bias"][0]


@pytest.mark.parametrize("per_channel", [False, True])
def test_symmetric_integers_are_kept(per_channel):
    """Also where one scale for all leaves most rows without a 127."""
    case = replace(LSTM, H=24, I=40)
    arrays, _ = quantized(case, per_channel)
    integers, scales, bias = gates_of(read(model_with(case, arrays))["q"])
    gates = np.concatenate([np.arange(24) + 24 * index for index in (0, 2, 3, 1)])  # i o f c as i f g o
    np.testing.assert_array_equal(integers, arrays["W"][0].T[gates])
    np.testing.assert_array_equal(scales, np.broadcast_to(arrays["W_scale"][0], 96)[gates])
    np.testing.assert_array_equal(bias, arrays["B"][0][:96][gates])


def smallest(a):
    a = a.copy()
    a[0, 0, 0] = -128
    return a


@pytest.mark.parametrize(
    "changes",
    [
        {
            "W": lambda a: (a.astype(np.int16) + 128).astype(np.uint8),
            "W_zero_point": lambda a: a.astype(np.uint8) + 128,
        },
        {"R_zero_point": lambda a: a + np.int8(3)},
        {"R": smallest},
    ],
    ids=["uint8", "zero point", "-128"],
)
def test_other_integers_are_quantized_again(changes):
    """Each row to its own 127: what they stand for changes by half a step of the row."""
    arrays, _ = quantized(LSTM)
    arrays |= {name: change(arrays[name]) for name, change in changes.items()}
    layer = read(model_with(LSTM, arrays))["q"]
    for name, kind in (("W", "i2h_weight"), ("R", "h2h_weight")):
        integers, zero_point = (arrays[key][0].astype(np.float64) for key in (name, f"{name}_zero_point"))
        values = ((integers - zero_point) * arrays[f"{name}_scale"][0]).T
        values = values[np.concatenate([np.arange(8) + 8 * index for index in (0, 2, 3, 1)])]
        half_steps = np.abs(values).max(axis=1, keepdims=True) / 254
        weight = layer.spec.layout.view(layer.params.dequantize(), 0, 0, kind)
        assert (np.abs(weight - values) <= 1.001 * half_steps).all()


def test_write_refuses():
    arrays, _ = quantized(LSTM)
    model = model_with(LSTM, arrays)
    with pytest.raises(
        NotImplementedError, match=r"^node 'q' \(com.microsoft.DynamicQuantizeLSTM\): a layer with quan"
    ):
        write(model, "q", read(model)["q"].params)


def without(name):
    return lambda arrays: {key: array for key, array in arrays.items() if key != name}


def with_changed(name, change):
    return lambda arrays: arrays | {name: change(arrays[name])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without("R_zero_point"), ValueError, "R_zero_point must be given; got none"),
        (with_changed("W", lambda a: a.astype(np.int32)), TypeError, "W must be int8 or uint8; got int32"),
        (
            with_changed("W", lambda a: a.swapaxes(1, 2)),
            ValueError,
            r"W must have shape \(1, I, 4·H\); got \(1, 32, 5\)",
        ),
        (with_changed("R", lambda a: a[0]), ValueError, r"W must have shape \(1, I, 4·H\)"),
        (with_changed("W_scale", lambda a: a[:, :3]), ValueError, r"W_scale must have shape \(1,\) or \(1, 32\); got"),
        (with_changed("R_scale", lambda a: a.astype(np.float64)), TypeError, "R_scale must be float32; got float64"),
        (with_changed("W_scale", lambda a: -a), ValueError, "W_scale must be finite and not negative; got -"),
        (with_changed("R_scale", lambda a: a * np.inf), ValueError, "R_scale must be finite and not negative; got inf"),
        (with_changed("R_scale", lambda a: a * np.nan), ValueError, "R_scale must be finite and not negative; got nan"),
        (with_changed("R_zero_point", lambda a: a.astype(np.uint8)), TypeError, "R_zero_point must be int8; got uint8"),
        (with_changed("B", lambda a: a.astype(np.float16)), TypeError, "B must be float32, as W is; got float16"),
        (with_changed("X", lambda a: a.astype(np.float16)), TypeError, "X must be float32, as W is; got float16"),
    ],
)
def test_errors(change, error, message):
    arrays, _ = quantized(LSTM)
    changed = change(arrays)
    with pytest.raises(error, match=rf"^node 'q' \(com.microsoft.DynamicQuantizeLSTM\): {message}"):
        fusedrnn.onnx.run_node(node_of(LSTM, changed), changed)


@pytest.mark.parametrize(("attribute", "value"), [("layout", 1), ("output_sequence", 1), ("unknown", 2)])
def test_attributes_that_the_operator_lacks(attribute, value):
    arrays, _ = quantized(LSTM)
    model = model_with(LSTM, arrays, node_of(LSTM, arrays, **{attribute: value}))
    for call in (prepare, read):
        with pytest.raises(ValueError, match=rf"^node 'q' \(com.microsoft.DynamicQuantizeLSTM\): .*{attribute}"):
            call(model)
