"""Constant folding: weights and states that a model computes from constants."""

import time
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import fusedrnn.onnx
from fusedrnn import RNNOp
from fusedrnn.onnx import read, write
from fusedrnn.onnx.folding import FOLDED, Folder
from fusedrnn.onnx.scopes import Scope
from onnx_models import Case, assert_same, computed, expected, info, model_of

A = np.random.default_rng(5).standard_normal((4, 6)).astype(np.float32)
I64 = np.int64
ROW, FLAGS = np.array([0], I64), A > 0
# The inputs and attributes of each operator in opset 18.
EXAMPLES = {
    "Abs": ([A], {}),
    "Add": ([A, A[:1]], {}),
    "And": ([FLAGS, ~FLAGS[:1]], {}),
    "Cast": ([A * 5], {"to": onnx.TensorProto.INT64}),
    "CastLike": ([A, np.zeros(1, np.float64)], {}),
    "Ceil": ([A], {}),
    "Clip": ([A, np.float32(-0.5), np.float32(0.25)], {}),
    "Concat": ([A, A[1:]], {"axis": 0}),
    "ConstantOfShape": ([np.array([2, 3], I64)], {"value": numpy_helper.from_array(np.array([1.5], np.float32))}),
    "DequantizeLinear": ([np.arange(-8, 8, dtype=np.int8), np.float32(0.5), np.int8(3)], {}),
    "Div": ([A, A[:1] + 9], {}),
    "Equal": ([A, A], {}),
    "Exp": ([A], {}),
    "Expand": ([A[:1], np.array([3, 1], I64)], {}),
    "Flatten": ([A.reshape(2, 2, 6)], {"axis": 2}),
    "Floor": ([A], {}),
    "Gather": ([A, np.array([[3, 0], [-1, 1]], I64)], {"axis": 1}),
    "Greater": ([A, A[:1]], {}),
    "Identity": ([A], {}),
    "Less": ([A, A[:1]], {}),
    "Log": ([np.abs(A)], {}),
    "Max": ([A, A[:1]], {}),
    "Mean": ([A, A[:1]], {}),
    "Min": ([A, A[:1]], {}),
    "Mod": ([np.array([-7, 7], I64), np.array([4, 4], I64)], {}),
    "Mul": ([A, A[:1]], {}),
    "Neg": ([A], {}),
    "Not": ([FLAGS], {}),
    "Or": ([FLAGS, ~FLAGS[:1]], {}),
    "Pad": ([A, np.array([1, 0, 0, 2], I64), np.float32(7)], {}),
    "Pow": ([np.abs(A), np.float32(2.5)], {}),
    "Range": ([I64(3), I64(11), I64(2)], {}),
    "Reciprocal": ([A], {}),
    "ReduceL1": ([A, ROW], {"keepdims": 0}),
    "ReduceL2": ([A, ROW], {}),
    "ReduceMax": ([A, ROW], {}),
    "ReduceMean": ([A, ROW], {}),
    "ReduceMin": ([A], {}),
    "ReduceProd": ([A, ROW], {}),
    "ReduceSum": ([A, ROW], {"keepdims": 0}),
    "ReduceSumSquare": ([A, ROW], {}),
    "Reshape": ([A, np.array([0, -1, 2], I64)], {}),
    "Round": ([A * 3], {}),
    "Shape": ([A], {"start": 1}),
    "Sign": ([A], {}),
    "Size": ([A], {}),
    "Slice": ([A, np.array([-1], I64), np.array([-9], I64), ROW, np.array([-2], I64)], {}),
    "Split": ([A, np.array([1, 3], I64)], {"axis": 0}),
    "Sqrt": ([np.abs(A)], {}),
    "Squeeze": ([A[None], ROW], {}),
    "Sub": ([A, A[:1]], {}),
    "Sum": ([A, A[:1], A], {}),
    "Tile": ([A, np.array([2, 1], I64)], {}),
    "Transpose": ([A.reshape(2, 2, 6)], {"perm": [2, 0, 1]}),
    "Trilu": ([A, np.array(1, I64)], {"upper": 0}),
    "Unsqueeze": ([A, np.array([0, 3], I64)], {}),
    "Where": ([FLAGS, A, A[:1]], {}),
    "Xor": ([FLAGS, ~FLAGS[:1]], {}),
}


def test_every_operator_has_an_example():
    assert set(EXAMPLES) == FOLDED


@pytest.mark.parametrize("operator", EXAMPLES)
def test_operators_against_onnxruntime(operator):
    compare_with_onnxruntime(operator, *EXAMPLES[operator], 18)


BYTES = np.arange(24, dtype=np.int8).reshape(4, 6)
SCALES = np.linspace(0.1, 0.4, 4).astype(np.float32)
# Operators in other opsets: parameters in attributes, defaults, blocks.
OPERATOR_VERSIONS = [
    ("Unsqueeze", [A], {"axes": [0, 2]}, 9),
    ("Unsqueeze", [A], {"axes": [-1]}, 12),
    ("Squeeze", [A[None]], {"axes": [0]}, 9),
    ("Slice", [A], {"starts": [1], "ends": [2**31 - 1], "axes": [1]}, 9),
    ("Split", [A], {"split": [1, 3], "axis": 0}, 11),
    ("Pad", [A], {"pads": [0, 1, 0, 0], "value": 2.0}, 9),
    ("Clip", [A], {"min": -0.5, "max": 0.5}, 9),
    ("ReduceSum", [A], {"axes": [0], "keepdims": 0}, 11),
    ("ReduceL2", [A], {"axes": [1]}, 13),
    ("DequantizeLinear", [BYTES, SCALES, np.arange(4, dtype=np.int8)], {"axis": 0}, 13),
    ("DequantizeLinear", [BYTES, np.float32(0.5)], {}, 10),
    ("DequantizeLinear", [BYTES, np.stack([SCALES, SCALES * 2], 1)], {"axis": 1, "block_size": 3}, 21),
]


@pytest.mark.parametrize(
    "example", OPERATOR_VERSIONS, ids=lambda example: f"{example[0]}-{example[3]}-{len(example[2])}"
)
def test_operator_versions_against_onnxruntime(example):
    compare_with_onnxruntime(*example)


def compare_with_onnxruntime(operator, arrays, attributes, opset):
    names = [f"in{index}" for index in range(len(arrays))]
    outputs = ["y", "z"] if operator == "Split" else ["y"]
    nodes = [helper.make_node(operator, names, outputs, **attributes)]
    initializers = [numpy_helper.from_array(np.asarray(a), name) for a, name in zip(arrays, names, strict=True)]
    model = model_of(nodes, [], [onnx.ValueInfoProto(name=name) for name in outputs], initializers, opset)
    model.ir_version = 10
    references = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})
    folder, scope = Folder(), Scope(model, model.graph)
    for name, reference in zip(outputs, references, strict=True):
        value = folder.array(scope, name)
        assert (value.dtype, value.shape) == (reference.dtype, reference.shape)
        np.testing.assert_allclose(value, reference, rtol=1e-6)


@pytest.mark.parametrize(
    ("attributes", "reference"),
    [
        ({"value_float": 1.5}, np.array(1.5, np.float32)),
        ({"value_floats": [1.5, 2.0]}, np.array([1.5, 2.0], np.float32)),
        ({"value_int": 3}, np.array(3)),
        ({"value_ints": [3, 4]}, np.array([3, 4])),
    ],
    ids=str,
)
def test_constant_attributes(attributes, reference):
    model = model_of([helper.make_node("Constant", [], ["y"], **attributes)], [], [])
    value = Folder().array(Scope(model, model.graph), "y")
    np.testing.assert_array_equal(value, reference)
    assert value.dtype == reference.dtype


# ---- layers


def model_with_computed_inputs(kind, **changes):
    """A case, a model that computes the case's weights and states from constants, and the case's arrays."""
    case = Case(kind, weights_inside=True, attributes={"direction": "bidirectional"}, **changes)
    arrays = case.arrays()
    model = case.model(arrays)
    weights = {name: array for name, array in arrays.items() if name != "X"}
    nodes, initializers = computed(weights)
    for name in weights:
        index = list(model.graph.node[0].input).index(name)
        model.graph.node[0].input[index] = f"{name}/out"
    x = info("X", arrays["X"])
    return case, model_of([*nodes, *model.graph.node], [x], model.graph.output, initializers), arrays


@pytest.mark.parametrize("lengths", [None, (5, 1, 3)], ids=["full", "lengths"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_read_computed_weights(kind, lengths):
    case, model, arrays = model_with_computed_inputs(kind, lengths=lengths)
    stored = read(case.model(arrays))["node"]
    layer = read(model)["node"]
    np.testing.assert_array_equal(layer.params, stored.params)
    assert layer.spec == stored.spec
    assert stored.lengths is None
    assert lengths == (None if layer.lengths is None else tuple(layer.lengths))
    for name, state in zip(layer.spec.state_names, layer.states, strict=True):
        np.testing.assert_array_equal(state, arrays[f"initial_{name}"])
    y, _, _ = RNNOp(layer.spec).forward(arrays["X"], layer.params, layer.states, lengths=layer.lengths)
    reference = expected(case, arrays)[0]
    assert_same([y.reshape(case.T, case.N, case.D, case.H).swapaxes(1, 2)], [reference], case)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_write_computed_weights(kind):
    """They become constants; the nodes that computed them are removed."""
    case, model, arrays = model_with_computed_inputs(kind)
    before = model.SerializeToString(deterministic=True)
    params = read(model)["node"].params * np.float32(0.5)
    written = write(model, "node", params)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(written, full_check=True)
    np.testing.assert_array_equal(read(written)["node"].params, params)
    halved = arrays | {name: arrays[name] * np.float32(0.5) for name in "WRBP" if name in arrays}
    content = written.SerializeToString()
    outputs = onnxruntime.InferenceSession(content).run(None, {"X": arrays["X"]})
    assert_same(outputs, expected(case, halved), case)
    remaining = {name for node in written.graph.node for name in node.output}
    assert not {"W/out", "W/cast", "R/out", "B/out"} & remaining
    assert "initial_h/out" in remaining
    assert "W/data" not in {tensor.name for tensor in written.graph.initializer}
    rewritten = write(written, "node", params)
    assert rewritten.SerializeToString(deterministic=True) == written.SerializeToString(deterministic=True)


def test_write_keeps_nodes_with_other_readers():
    _, model, arrays = model_with_computed_inputs("RNN", optional=("B",))
    reader = helper.make_node("Neg", ["W/transposed"], ["Z"])
    model.graph.node.append(reader)
    model.graph.output.append(onnx.ValueInfoProto(name="Z"))
    written = write(model, "node", np.zeros_like(read(model)["node"].params))
    outputs = [
        onnxruntime.InferenceSession(m.SerializeToString()).run(["Z"], {"X": arrays["X"]})[0] for m in (model, written)
    ]
    np.testing.assert_array_equal(*outputs)
    assert "W/out" not in {name for node in written.graph.node for name in node.output}


def test_backend_folds_constants():
    """It folds lengths too, but no node that depends on an initializer that an input may replace."""
    case, model, arrays = model_with_computed_inputs("LSTM", lengths=(5, 1, 3))
    case = replace(case, lengths=(5, 1, 3))
    assert_same(fusedrnn.onnx.run_model(model, [arrays["X"]]), expected(case, arrays), case)
    model.graph.input.append(info("W/data", numpy_helper.to_array(model.graph.initializer[0])))
    assert model.graph.initializer[0].name == "W/data"
    with pytest.raises(NotImplementedError, match=r"the node of 'W/cast' \(Cast\) is not supported; expected LSTM"):
        fusedrnn.onnx.prepare(model)
    np.testing.assert_array_equal(read(model)["node"].params, read(case.model(arrays))["node"].params)


@pytest.mark.parametrize("optional", [(), ("initial_h",), ("initial_c",), ("initial_h", "initial_c")], ids="-".join)
def test_states_computed_from_inputs_are_none(optional):
    case = Case("LSTM", weights_inside=True, optional=("initial_h", "initial_c"))
    arrays = case.arrays()
    model = case.model(arrays)
    del model.graph.input[1:]
    for name in ("initial_h", "initial_c"):
        if name in optional:
            model.graph.initializer.append(numpy_helper.from_array(arrays[name], name))
        else:  # zeros of a shape that depends on X
            model.graph.node.insert(0, helper.make_node("Shape", ["X"], [f"{name}/shape"], end=2))
            model.graph.node.insert(1, helper.make_node("ConstantOfShape", [f"{name}/shape"], [name]))
    states = read(model)["node"].states
    if not optional:
        assert states is None
    else:
        assert [state is not None for state in states] == [name in optional for name in ("initial_h", "initial_c")]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("optional", [(), ("initial_h",), ("initial_c",), ("initial_h", "initial_c")], ids="-".join)
def test_forward_accepts_states_as_read(kind, optional):
    case = Case(kind, weights_inside=True, optional=("B", *optional))
    arrays = case.arrays()
    model = case.model(arrays)
    model.graph.initializer.extend(numpy_helper.from_array(arrays[name], name) for name in optional if name in arrays)
    layer = read(model)["node"]
    y, final, _ = RNNOp(layer.spec).forward(arrays["X"], layer.params, layer.states)
    assert_same([y.reshape(case.T, 1, case.N, case.H), *final], expected(case, arrays), case)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda a: a[0], ValueError, r"initial_h must have shape \(1, N, 6\); got \(3, 6\)"),
        (lambda a: a[..., :5], ValueError, r"initial_h must have shape \(1, N, 6\); got \(1, 3, 5\)"),
        (lambda a: a[:, :0], ValueError, r"initial_h must have shape \(1, N, 6\); got \(1, 0, 6\)"),
        (lambda a: a.astype(np.float64), TypeError, "initial_h must be float32, as W is; got float64"),
    ],
)  # fmt: skip
def test_invalid_states(change, error, match):
    case = Case("GRU", weights_inside=True)
    arrays = case.arrays()
    model = case.model(arrays)
    model.graph.initializer.append(numpy_helper.from_array(change(arrays["initial_h"]), "initial_h"))
    with pytest.raises(error, match=rf"node 'node' \(GRU\): {match}"):
        read(model)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (np.array([1, 2, 3]), TypeError, "sequence_lens must be int32; got int64"),
        (np.array([1, -2, 3], np.int32), ValueError, "sequence_lens must be from 0 on; got -2"),
        (np.array([[1]], np.int32), ValueError, r"sequence_lens must have shape \(N,\); got \(1, 1\)"),
        (np.array([], np.int32), ValueError, r"sequence_lens must have shape \(N,\); got \(0,\)"),
    ],
)
def test_invalid_lengths(value, error, match):
    case = Case("GRU", weights_inside=True, lengths=(5, 1, 3))
    model = case.model(case.arrays())
    model.graph.initializer.append(numpy_helper.from_array(value, "sequence_lens"))
    with pytest.raises(error, match=rf"node 'node' \(GRU\): {match}"):
        read(model)


# ---- errors


def model_with_weight(nodes, initializers=(), opset=18):
    """A model whose weight W is the value w, which the nodes compute from initializers."""
    case = Case("RNN", weights_inside=True, optional=(), opset=opset)
    model = case.model(case.arrays())
    model.graph.node[0].input[1] = "w"
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(a), name) for name, a in dict(initializers).items()
    )
    last = model.graph.node.pop()
    model.graph.node.extend([*nodes, last])
    return model


def node(*args, **attributes):
    return helper.make_node(*args, **attributes)


HUGE = {"s": np.array([10**15], I64)}
REJECTED = {
    "input": ([node("Expand", ["X", "W"], ["w"])], {}, "it depends on 'X', which is an input of a graph"),
    "random": ([node("RandomNormal", [], ["w"], shape=[1, 6, 4])], {}, r"node of 'w' \(RandomNormal\), .*not folded"),
    "product": ([node("MatMul", ["W", "W"], ["w"], name="mm")], {}, r"of node 'mm' \(MatMul\), which is not folded"),
    "other domain": ([node("Neg", ["W"], ["w"], domain="x.y")], {}, r"\(x.y.Neg\), which is not folded"),
    "unknown value": ([node("Neg", ["nothing"], ["w"])], {}, "there is no value 'nothing'"),
    "cycle": ([node("Neg", ["v"], ["w"]), node("Neg", ["w"], ["v"])], {}, "value 'w' depends on itself"),
    "twice": ([node("Neg", ["W"], ["w"]), node("Abs", ["W"], ["w"])], {}, "value 'w' must be defined once"),
    "shape": ([node("Reshape", ["W", "s"], ["w"], name="r")], {"s": np.array([7])}, r"node 'r' \(Reshape\): cannot be"),
    "axis": ([node("Concat", ["W"], ["w"], axis=9)], {}, r"the node of 'w' \(Concat\): .*axis"),
    "attribute": ([node("Concat", ["W"], ["w"])], {}, r"the node of 'w' \(Concat\): .*axis"),
    "inputs": ([node("Transpose", [], ["w"])], {}, r"\(Transpose\): a node of this kind must have from 1 to 1 inputs"),
    "format": ([node("Cast", ["W"], ["w"], to=99)], {}, r"the node of 'w' \(Cast\): "),
    "text": ([node("Cast", ["W"], ["w"], to=8)], {}, "W must be one of float32, "),
    "outputs": ([node("Split", ["W"], ["w"], num_outputs=2**40)], {}, r"\(Split\): num_outputs must be .*, 1; got"),
    "ConstantOfShape": ([node("ConstantOfShape", ["s"], ["w"])], HUGE, "must take at most 256 MiB"),
    "Expand": ([node("Expand", ["W", "s"], ["w"])], {"s": np.array([10**9, 1, 6, 4])}, "must take at most 256 MiB"),
    "Tile": ([node("Tile", ["W", "s"], ["w"])], {"s": np.array([10**6] * 3)}, "must take at most 256 MiB"),
    "Pad": ([node("Pad", ["W", "s"], ["w"])], {"s": np.array([0, 0, 0, 10**15, 0, 0])}, "must take at most 256 MiB"),
    "Range": ([node("Range", ["z", "e", "o"], ["w"])], {"z": 0, "e": 10**15, "o": 1}, "must take at most 256 MiB"),
    "overflow": ([node("ConstantOfShape", ["s"], ["w"])], {"s": np.array([2**62, 4])}, "must take at most 256 MiB"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_error_names_layer_and_node_that_cannot_be_folded(case):
    nodes, initializers, match = REJECTED[case]
    start = time.perf_counter()
    with pytest.raises((ValueError, TypeError), match=rf"node 'node' \(RNN\): .*{match}"):
        read(model_with_weight(nodes, initializers))
    assert time.perf_counter() - start < 10


def test_exponential_growth_is_rejected():
    nodes = [node("Concat", ["W", "W"], ["v0"], axis=0)]
    nodes += [node("Concat", [f"v{k}"] * 2, [f"v{k + 1}"], axis=0) for k in range(60)]
    with pytest.raises(ValueError, match=r"\(Concat\): results computed from constants must take at most 256 MiB"):
        read(model_with_weight([*nodes, node("Identity", ["v60"], ["w"])]))


def test_long_chain_of_nodes():
    """The chain is longer than Python's recursion limit."""
    nodes = [node("Neg", [f"v{k}"], [f"v{k + 1}"]) for k in range(1200)]
    model = model_with_weight([node("Identity", ["W"], ["v0"]), *nodes, node("Identity", ["v1200"], ["w"])])
    case = Case("RNN", weights_inside=True, optional=())
    np.testing.assert_array_equal(read(model)["node"].params, read(case.model(case.arrays()))["node"].params)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.dims.__setitem__(0, 2**40), r"constant 'W' must have data that fit its shape \(1099511627776, 6"),
        (lambda t: t.dims.__setitem__(0, -1), r"constant 'W' must have a shape of sizes from 0 on; got \(-1, 6, 4\)"),
        (lambda t: setattr(t, "raw_data", t.raw_data[:-3]), "constant 'W' must have data that fit"),
        (lambda t: setattr(t, "raw_data", b""), "constant 'W' must have data that fit"),
        (lambda t: setattr(t, "data_type", 99), "constant 'W' must have data that fit"),
        (lambda t: setattr(t, "data_type", 0), "constant 'W' must have data that fit"),
        (lambda t: setattr(t, "data_location", 1), "constant 'W' must be in the model, .*; got external data"),
    ],
    ids=["size", "negative", "cut", "empty", "format", "no format", "external"],
)  # fmt: skip
def test_invalid_constant_data(change, match):
    case = Case("RNN", weights_inside=True)
    model = case.model(case.arrays())
    change(next(tensor for tensor in model.graph.initializer if tensor.name == "W"))
    with pytest.raises(ValueError, match=rf"node 'node' \(RNN\): {match}"):
        read(model)


def test_error_names_sparse_constant():
    case = Case("RNN", weights_inside=True)
    model = case.model(case.arrays())
    values = numpy_helper.from_array(np.ones(1, np.float32), "thin")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, I64)), [24])
    model.graph.sparse_initializer.append(sparse)
    model.graph.node[0].input[1] = "thin"
    with pytest.raises(NotImplementedError, match=r"node 'node' \(RNN\): initializer 'thin' is sparse"):
        read(model)
    model.graph.node[0].input[1] = "w"
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    with pytest.raises(NotImplementedError, match=r"the node of 'w' \(Constant\): .*; got sparse_value"):
        read(model)
