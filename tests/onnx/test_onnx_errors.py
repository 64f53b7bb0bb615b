"""Error messages name the node, the attribute or the argument."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import fusedrnn.onnx
from fusedrnn.engines import registry
from fusedrnn.engines.interface import Capabilities
from fusedrnn.onnx.attributes import parse
from onnx_models import Case, info, model_of

KINDS = ("LSTM", "GRU", "RNN")
DIRECTIONS = ("forward", "reverse", "bidirectional")
kinds = pytest.mark.parametrize("kind", KINDS)


def assert_rejected(kind, match, attributes=None, opset=22, **changes):
    """Running the node raises an error that names it, with weights as inputs and as initializers."""
    case = Case(kind, opset=opset, attributes=attributes or {}, **changes)
    arrays = case.arrays()
    for weights_inside in (False, True):
        model = replace(case, weights_inside=weights_inside).model(arrays)
        inputs = replace(case, weights_inside=weights_inside).inputs(arrays)
        with pytest.raises(ValueError, match=match) as raised:
            fusedrnn.onnx.run_model(model, inputs, backend="reference")
        assert "model must be valid" in str(raised.value) or f"node 'node' ({kind}): " in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "attributes", "match"),
    [
        ("RNN", {"direction": "sideways"}, "direction must be one of forward, reverse, bidirectional; got 'sideways'"),
        ("LSTM", {"direction": "foward"}, "direction must be one of"),
        ("GRU", {"clip": 0.0}, "clip must be above 0; got 0.0"),
        ("RNN", {"clip": -1.0}, "clip must be above 0; got -1.0"),
        ("RNN", {"clip": float("nan")}, "clip must be above 0; got nan"),
        ("LSTM", {"input_forget": 2}, "input_forget must be 0 or 1; got 2"),
        ("GRU", {"layout": 2}, "layout must be 0 or 1; got 2"),
        ("LSTM", {"hidden_size": 7}, r"hidden_size must be 6, as R of shape \(1, 24, 6\) has it; got 7"),
        ("LSTM", {"activations": ["Tanh"]}, "activations must be a list of 3; got 1: Tanh"),
        ("RNN", {"activations": ["Relu", "Relu"]}, "activations must be a list of 1; got 2: Relu, Relu"),
        ("RNN", {"activations": ["Gelu"]}, "activations must be of Sigmoid, Tanh, .*; got 'Gelu'"),
        ("RNN", {"activation_alpha": [1.0]}, "activation_alpha must have at most 0 values, .*; got 1"),
        ("RNN", {"activations": ["Elu"], "activation_beta": [1.0]}, "activation_beta must have at most 0 values"),
        ("RNN", {"activations": ["Affine"]}, "activation_alpha must have a value for Affine, which has no default"),
        ("RNN", {"activations": ["ScaledTanh"], "activation_alpha": [1.0]}, "activation_beta must have a value for Sc"),
        ("GRU", {"input_forget": 1}, "Unrecognized attribute: input_forget"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_attributes(kind, attributes, match):
    assert_rejected(kind, match, attributes)


@pytest.mark.parametrize(
    ("kind", "attributes", "opset", "match"),
    [
        ("RNN", {"layout": 1}, 13, "Unrecognized attribute: layout"),
        ("LSTM", {"output_sequence": 1}, 7, "Unrecognized attribute: output_sequence"),
        ("GRU", {"linear_before_reset": 1}, 1, "Unrecognized attribute: linear_before_reset"),
        ("GRU", {"direction": "foward"}, 3, "direction must be one of"),
        ("RNN", {"output_sequence": 2}, 6, "output_sequence must be 0 or 1; got 2"),
    ],
    ids=str,
)
def test_attributes_of_other_opsets(kind, attributes, opset, match):
    assert_rejected(kind, match, attributes, opset)


def test_output_sequence_needs_named_output():
    assert_rejected("LSTM", "output_sequence=1 needs the output Y", {"output_sequence": 1}, 6, outputs=("", "Y_h"))
    node = helper.make_node("LSTM", ["X", "W", "R"], [], hidden_size=2, output_sequence=1)
    with pytest.raises(ValueError, match="output_sequence=1 needs the output Y"):
        parse(node, 6, 8)


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        ("X", lambda a: a[0], ValueError, r"X must have shape \(T, N, 4\), each at least 1; got \(3, 4\)"),
        ("X", lambda a: a[:0], ValueError, r"X must have shape .*; got \(0, 3, 4\)"),
        ("X", lambda a: a.astype(np.float64), TypeError, "X must be float32, as W is; got float64"),
        ("W", lambda a: a[0], ValueError, r"W must have three axes, \(1, 4·H, I\); got shape \(24, 4\)"),
        ("W", lambda a: a[:, 1:], ValueError, r"W must have shape \(1, 24, 4\) .*; got \(1, 23, 4\)"),
        ("W", lambda a: a.astype(np.int32), TypeError, "W must be one of float32, float64, float16, .*; got int32"),
        ("R", lambda a: a.astype(np.float64), TypeError, "R must be float32, as W is; got float64"),
        ("R", lambda a: a.repeat(2, axis=0), ValueError, r"R must have shape \(1, 24, 6\) for direction 'forward'"),
        ("B", lambda a: a[:, :24], ValueError, r"B must have shape \(1, 48\) .*; got \(1, 24\)"),
        ("P", lambda a: a[:, :-1], ValueError, r"P must have shape \(1, 18\) .*; got \(1, 17\)"),
        ("initial_h", lambda a: a[:, :2], ValueError, r"initial_h must have shape \(1, 3, 6\); got \(1, 2, 6\)"),
        ("initial_c", lambda a: a.astype(np.float16), TypeError, "initial_c must be float32, as W is; got float16"),
        ("sequence_lens", lambda a: a.astype(np.int64), TypeError, "sequence_lens must be int32; got int64"),
        ("sequence_lens", lambda a: a[:2], ValueError, r"sequence_lens must have shape \(3,\); got \(2,\)"),
        ("sequence_lens", lambda a: a + 1, ValueError, "sequence_lens must be from 0 to 5, the steps of x; got 2 to 6"),
    ],
)  # fmt: skip
def test_invalid_inputs(name, change, error, match):
    case = Case("LSTM", lengths=(5, 1, 3))
    arrays = case.arrays()
    prepared = fusedrnn.onnx.prepare(case.model(arrays), backend="reference")
    arrays[name] = change(arrays[name])
    with pytest.raises(error, match=rf"node 'node' \(LSTM\): {match}"):
        prepared.run(arrays)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [np.ma.masked_array, np.asmatrix])
def test_arrays_that_are_not_plain(kind):
    case = Case("LSTM", lengths=(5, 1, 3))
    arrays = case.arrays()
    prepared = fusedrnn.onnx.prepare(case.model(arrays), backend="reference")
    for name in ("B", "P") if kind is np.asmatrix else arrays:
        with pytest.raises(TypeError, match=rf"^inputs: {name} must be a NumPy array; got (MaskedArray|matrix)$"):
            prepared.run(arrays | {name: kind(arrays[name])})


def test_error_names_output_of_unnamed_node():
    with pytest.raises(ValueError, match=r"the node of 'Y' \(LSTM\): clip must be above 0"):
        case = Case("LSTM", name="", attributes={"clip": 0.0})
        fusedrnn.onnx.prepare(case.model(case.arrays()))


def test_error_names_unsupported_node():
    x = info("X", np.zeros((2, 2), np.float32))
    out = helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, [2, 2])
    for node, match in (
        (helper.make_node("Relu", ["X"], ["Y"], name="a"), r"node 'a' \(Relu\) is not supported; expected LSTM"),
        (helper.make_node("LSTM", ["X"], ["Y"], domain="x.y"), r"the node of 'Y' \(x.y.LSTM\) is not supported"),
    ):  # fmt: skip
        model = model_of([node], [x], [out])
        assert not fusedrnn.onnx.is_compatible(model)
        with pytest.raises(NotImplementedError, match=match):
            fusedrnn.onnx.prepare(model)
        with pytest.raises(NotImplementedError, match=node.op_type):
            fusedrnn.onnx.run_node(node, [np.zeros((2, 2), np.float32)])


def test_unsupported_constants():
    out = helper.make_tensor_value_info("c", onnx.TensorProto.STRING, [2])
    model = model_of([helper.make_node("Constant", [], ["c"], value_strings=["a", "b"])], [], [out])
    with pytest.raises(NotImplementedError, match=r"the node of 'c' \(Constant\): .* 'value' .*; got value_strings"):
        fusedrnn.onnx.prepare(model)
    case = Case("RNN", weights_inside=True)
    model = case.model(case.arrays())
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "s"), numpy_helper.from_array(np.zeros(1, np.int64)), [3]
    )
    model.graph.sparse_initializer.append(sparse)
    with pytest.raises(NotImplementedError, match="initializer 's' is sparse"):
        fusedrnn.onnx.prepare(model)
    model = case.model(case.arrays())
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(ValueError, match="W"):
        fusedrnn.onnx.prepare(model)


def test_invalid_models():
    case = Case("RNN")
    arrays = case.arrays()
    model = case.model(arrays)
    model.graph.node[0].input[0] = "nothing"
    with pytest.raises(ValueError, match=r"node 'node' \(RNN\): its inputs must be defined before it; .* 'nothing'"):
        fusedrnn.onnx.prepare(model)
    model = case.model(arrays)
    model.opset_import[0].version = newer = onnx.defs.onnx_opset_version() + 1
    with pytest.raises(ValueError, match=f"the newest of this onnx package; got {newer}"):
        fusedrnn.onnx.prepare(model)


def test_unsupported_operator_version():
    case = Case("GRU")
    with pytest.raises(NotImplementedError, match=r"GRU-14 is not known; expected one of the versions \(1, 3, 7\)"):
        parse(case.node(case.arrays()), opset=14, ir_version=8, versions=(1, 3, 7))


def test_invalid_arguments():
    case = Case("RNN")
    arrays = case.arrays()
    model, node = case.model(arrays), case.node(arrays)
    assert fusedrnn.onnx.supports_device("CPU")
    assert not fusedrnn.onnx.supports_device("CUDA:0")
    assert fusedrnn.onnx.is_compatible(model)
    assert not fusedrnn.onnx.is_compatible(model, "CUDA")
    prepared = fusedrnn.onnx.prepare(model, backend="reference")
    assert prepared.inputs == tuple(arrays)
    assert prepared.outputs == ("Y", "Y_h")
    for error, match, call in (
        (ValueError, "device must be 'CPU'; got 'CUDA'", lambda: fusedrnn.onnx.prepare(model, "CUDA")),
        (ValueError, "backend must be one of", lambda: fusedrnn.onnx.prepare(model, backend="abacus")),
        (TypeError, "there is no option optimize", lambda: fusedrnn.onnx.prepare(model, optimize=True)),
        (TypeError, "model must be an onnx.ModelProto; got bytes", lambda: fusedrnn.onnx.prepare(b"")),
        (TypeError, "node must be an onnx.NodeProto; got str", lambda: fusedrnn.onnx.run_node("RNN", [])),
        (TypeError, "opset_version must be an int", lambda: fusedrnn.onnx.run_node(node, arrays, opset_version="7")),
        (TypeError, "there is no option speed", lambda: prepared.run(arrays, speed=11)),
        (TypeError, "inputs must be 5 NumPy arrays: X, .*; got ndarray", lambda: prepared.run(arrays["X"])),
        (ValueError, "inputs must be 5 NumPy arrays: .*; got 1", lambda: prepared.run([arrays["X"]])),
        (ValueError, "missing W, R, B, initial_h", lambda: prepared.run({"X": arrays["X"]})),
        (ValueError, "inputs must be .*; got 'Q'", lambda: prepared.run(arrays | {"Q": arrays["X"]})),
        (TypeError, "inputs: W must be a NumPy array; got list", lambda: prepared.run(arrays | {"W": [1.0]})),
        (
            ValueError, "outputs_info must be",
            lambda: fusedrnn.onnx.run_node(node, arrays, outputs_info=[(np.float64, (1,))], backend="reference"),
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


def test_error_names_node_that_engine_rejects():
    """An engine that supports only the basic cells rejects a node when it is prepared, or run if weights are inputs."""

    def factory(spec):
        raise NotImplementedError("never called")

    case = Case("LSTM", attributes={"clip": 0.5}, weights_inside=True)
    model = case.model(case.arrays())
    registry.register("plain", factory, Capabilities(), order=1, automatic=False)
    try:
        with pytest.raises(NotImplementedError, match=r"node 'node' \(LSTM\): .*plain"):
            fusedrnn.onnx.prepare(model, backend="plain")
        assert not fusedrnn.onnx.is_compatible(model, backend="plain")
        case = replace(case, weights_inside=False)
        arrays = case.arrays()
        prepared = fusedrnn.onnx.prepare(case.model(arrays), backend="plain")
        with pytest.raises(NotImplementedError, match=r"node 'node' \(LSTM\): .*plain"):
            prepared.run(arrays)
    finally:
        registry.unregister("plain")


def test_missing_onnx_package():
    program = (
        "import sys\n"
        "sys.modules['onnx'] = None\n"
        "try:\n    import fusedrnn.onnx\n"
        "except ImportError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "fusedrnn.onnx needs onnx: install fusedrnn with its extra 'onnx'\n"


def test_attribute_reference_outside_function():
    case = Case("LSTM", weights_inside=True, attributes={"clip": 3.0})
    model = case.model(case.arrays())
    assert fusedrnn.onnx.read(model)["node"].spec.gate_clip == 3.0
    (clip,) = (entry for node in model.graph.node for entry in node.attribute if entry.name == "clip")
    clip.ClearField("f")
    clip.ref_attr_name = "bound"
    match = r"node 'node' \(LSTM\): clip must have a value outside of functions; got a reference to 'bound'"
    with pytest.raises(ValueError, match=match):
        fusedrnn.onnx.read(model)


def test_duplicate_initializers():
    case = Case("GRU", weights_inside=True)
    model = case.model(case.arrays())
    other = model.graph.initializer.add()
    other.CopyFrom(model.graph.initializer[0])
    with pytest.raises(ValueError, match=r"node 'node' \(GRU\): .*must be defined once; several nodes or initializers"):
        fusedrnn.onnx.read(model)


def test_invalid_names_argument():
    case = Case("GRU", weights_inside=True)
    with pytest.raises(TypeError, match="names must be a name or several, or None; got int"):
        fusedrnn.onnx.read(case.model(case.arrays()), 5)
