"""Weights of a model's recurrent nodes are read, trained, written, and run by onnxruntime."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import fusedrnn.onnx
from fusedrnn import RNNOp
from fusedrnn.onnx import read, write
from onnx_models import ALL, Case, assert_same, expected, info, model_of

KINDS = ("LSTM", "GRU", "RNN")
MODES = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}
kinds = pytest.mark.parametrize("kind", KINDS)
TRAINED = [
    *((kind, {"direction": direction}) for kind in KINDS for direction in ("forward", "reverse", "bidirectional")),
    ("GRU", {"linear_before_reset": 1}),
    ("LSTM", {"input_forget": 1}),
    ("LSTM", {"clip": 0.5, "activations": ["HardSigmoid", "Softsign", "Elu"]}),
    ("RNN", {"activations": ["Relu"]}),
]


def op_of(spec):
    """The operator on the default engine, or on the reference if that does not support the spec."""
    try:
        return RNNOp(spec)
    except NotImplementedError:
        return RNNOp(spec, "reference")


def with_initializers(case, seed=0):
    """The case with weights as initializers, its model and its arrays."""
    case = replace(case, weights_inside=True)
    arrays = case.arrays(seed)
    return case, case.model(arrays), arrays


def run_onnxruntime(model, inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def results(layer, params, case, arrays):
    """The operator's output and final states in ONNX's layout."""
    states = tuple(arrays[f"initial_{name}"] for name in layer.spec.state_names)
    y, final, _ = op_of(layer.spec).forward(arrays["X"], params, states, lengths=arrays.get("sequence_lens"))
    return [y.reshape(case.T, case.N, case.D, case.H).swapaxes(1, 2), *final]


def train_step(layer, arrays):
    """The parameters after one step of gradient descent on the sum of squares of the output, and that sum before it."""
    op = op_of(layer.spec)
    states = tuple(arrays[f"initial_{name}"] for name in layer.spec.state_names)
    y, _, reserve = op.forward(arrays["X"], layer.params, states, training=True)
    _, dparams, _ = op.backward(y, None, reserve)
    return (layer.params - 0.02 * dparams).astype(layer.params.dtype), (y**2).sum()


# ---- reading


@pytest.mark.parametrize("case", [Case(kind, attributes=attributes) for kind, attributes in TRAINED], ids=str)
def test_read_weights_give_node_outputs(case):
    case, model, arrays = with_initializers(case)
    layer = read(model)["node"]
    assert layer.kind == case.kind
    assert_same(results(layer, layer.params, case, arrays), expected(case, arrays), case)


@kinds
@pytest.mark.parametrize("optional", [(), ("B",), ("P",), ALL], ids="-".join)
def test_spec_fields(kind, optional):
    case, model, _ = with_initializers(Case(kind, optional=optional, attributes={"direction": "reverse", "clip": 0.5}))
    layer = read(model)["node"]
    spec = layer.spec
    assert (spec.mode, spec.input_size, spec.hidden_size, spec.dtype) == (MODES[kind], case.I, case.H, "float32")
    assert (spec.reverse, spec.bidirectional, spec.gate_clip) == (True, False, 0.5)
    assert spec.bias == ("double" if "B" in optional else "none")
    assert spec.peepholes == ("P" in optional and kind == "LSTM")
    assert spec.reset_after == (kind != "GRU")
    assert layer.params.shape == (spec.layout.size,)
    assert layer.outputs == case.output_names
    assert set(layer.inputs) == {"X", "W", "R"} | ({*optional} if kind == "LSTM" else {*optional} - {"P", "initial_c"})


def test_gate_order():
    """ONNX has i o f c, z r h and peepholes i o f; fusedrnn has i f g o, r z n and peepholes i f o."""
    case, _, arrays = with_initializers(Case("LSTM", I=1, H=1))
    arrays |= {"W": np.arange(4).reshape(1, 4, 1), "R": np.arange(4, 8).reshape(1, 4, 1)}
    arrays |= {"B": np.arange(8, 16).reshape(1, 8), "P": np.arange(16, 19).reshape(1, 3)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    layer = read(case.model(arrays))["node"]
    weights = layer.spec.layout.unpack(layer.params)
    assert weights["l0_i2h_weight"].ravel().tolist() == [0, 2, 3, 1]
    assert weights["l0_h2h_weight"].ravel().tolist() == [4, 6, 7, 5]
    assert weights["l0_i2h_bias"].tolist() == [8, 10, 11, 9]
    assert weights["l0_h2h_bias"].tolist() == [12, 14, 15, 13]
    assert weights["l0_peephole_weight"].tolist() == [16, 18, 17]
    coupled = read(replace(case, attributes={"input_forget": 1}).model(arrays))["node"]
    weights = coupled.spec.layout.unpack(coupled.params)
    assert weights["l0_i2h_weight"].ravel().tolist() == [0, 3, 1]
    assert weights["l0_peephole_weight"].tolist() == [16, 17]
    case, _, arrays = with_initializers(Case("GRU", I=1, H=1))
    arrays |= {"W": np.arange(3, dtype=np.float32).reshape(1, 3, 1)}
    layer = read(case.model(arrays))["node"]
    assert layer.spec.layout.unpack(layer.params)["l0_i2h_weight"].ravel().tolist() == [1, 0, 2]


@pytest.mark.parametrize("layout", [0, 1])
def test_initial_states(layout):
    case = Case("LSTM", attributes={"direction": "bidirectional", "layout": layout})
    arrays = case.arrays()
    model = replace(case, weights_inside=True).model(arrays)
    assert read(model)["node"].states is None
    model.graph.initializer.append(numpy_helper.from_array(arrays["initial_c"], "initial_c"))
    layer = read(model)["node"]
    assert layer.batch_first == bool(layout)
    assert layer.states[0] is None
    assert layer.inputs["initial_h"] == "initial_h"
    assert layer.states[1].shape == (2, case.N, case.H)
    np.testing.assert_array_equal(
        layer.states[1], arrays["initial_c"].swapaxes(0, 1) if layout else arrays["initial_c"]
    )


def test_layer_names():
    """A layer has the name of its node, or of the node's first output if the node has no name or shares it."""
    _, model, _ = with_initializers(Case("RNN", optional=()))
    for name, outputs in (("", ["a", "b"]), ("node", ["c", "d"]), ("last", ["", "e"])):
        model.graph.node.append(helper.make_node("RNN", ["X", "W", "R"], outputs, name=name, hidden_size=6))
    layers = read(model)
    assert list(layers) == ["Y", "a", "c", "last"]
    assert [layer.name for layer in layers.values()] == list(layers)
    assert list(read(model, ["e", "d", "a"])) == ["last", "c", "a"]
    assert list(read(model, "b")) == ["a"]
    with pytest.raises(ValueError, match=r"name must be that of one LSTM, .* of 'Y', 'a', 'c', 'last'; got 'node'"):
        read(model, ["node"])
    with pytest.raises(ValueError, match=r"name must be .*; got ''"):
        read(model, [""])
    with pytest.raises(TypeError, match="name must be that of a node or of an output; got int"):
        read(model, [0])


def test_layer_shares_no_memory_with_model():
    _, model, _ = with_initializers(Case("LSTM"))
    before = model.SerializeToString(deterministic=True)
    layer = read(model)["node"]
    layer.params[:] = 0
    write(model, "node", layer.params)
    assert model.SerializeToString(deterministic=True) == before


# ---- writing


@pytest.mark.parametrize("case", [Case(kind, attributes=attributes) for kind, attributes in TRAINED], ids=str)
def test_round_trip_with_training(case):
    case, model, arrays = with_initializers(case)
    layer = read(model)["node"]
    params, loss = train_step(layer, arrays)
    written = write(model, "node", params)
    onnx.checker.check_model(written, full_check=True)
    layer_read_again = read(written)["node"]
    np.testing.assert_array_equal(layer_read_again.params, params)
    _, new_loss = train_step(layer_read_again, arrays)
    assert new_loss < loss
    outputs = results(layer, params, case, arrays)
    assert_same(outputs, run_onnxruntime(written, case.inputs(arrays)), case)
    assert_same(outputs, fusedrnn.onnx.prepare(written).run(case.inputs(arrays)), case)
    restored = write(written, "node", layer.params)
    assert restored.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_two_parts_for_different_activations():
    attributes = {
        "direction": "bidirectional",
        "activations": ["Sigmoid", "Tanh", "Tanh", "HardSigmoid", "Softsign", "LeakyRelu"],
    }
    case, model, arrays = with_initializers(Case("LSTM", attributes=attributes))
    layer = read(model)["node"]
    assert [part.spec.reverse for part in layer.parts] == [False, True]
    assert not any(part.spec.bidirectional for part in layer.parts)
    for name in ("spec", "params"):
        with pytest.raises(ValueError, match="layer 'node' has two parts"):
            getattr(layer, name)
    params = [part.params * 0.5 for part in layer.parts]
    written = write(model, "node", params)
    halved = arrays | {name: arrays[name] * np.float32(0.5) for name in "WRBP"}
    assert_same(run_onnxruntime(written, case.inputs(arrays)), expected(case, halved), case)
    with pytest.raises(ValueError, match=r"params must be one array for each part: .*; got 1"):
        write(model, "node", params[0])


def test_write_keeps_unused_forget_gate():
    case, model, arrays = with_initializers(Case("LSTM", attributes={"input_forget": 1}))
    layer = read(model)["node"]
    written = write(model, "node", np.zeros_like(layer.params))
    for tensor in written.graph.initializer:
        array, before, H = numpy_helper.to_array(tensor), arrays[tensor.name], case.H
        rows = [[2]] if tensor.name == "P" else [[2], [6]] if tensor.name == "B" else [[2]]
        unused = (np.array(rows) * H + np.arange(H)).ravel()
        np.testing.assert_array_equal(array[0, unused], before[0, unused])
        assert not np.delete(array[0], unused, axis=0).any()


def two_layers(case, arrays, storage):
    """Two RNN nodes; the first one's weights are in initializers or constants, maybe behind Identity nodes."""
    weights = {name: arrays[name] for name in ("W", "R", "B")}
    nodes, initializers, names = [], [], {}
    for name, array in weights.items():
        tensor = numpy_helper.from_array(array, name)
        tensor.doc_string = f"description of {name}"
        if "constant" in storage:
            nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            initializers.append(tensor)
        names[name] = name
        if "identity" in storage:
            nodes.append(helper.make_node("Identity", [name], [f"copy of {name}"]))
            names[name] = f"copy of {name}"
    other_weights = [numpy_helper.from_array(np.ones((1, 6, 6), np.float32), name) for name in ("W2", "R2")]
    nodes += [
        helper.make_node("RNN", ["X", *names.values()], ["", "h"], name="node", hidden_size=6),
        helper.make_node("RNN", ["h", "W2", "R2"], ["Z"], name="other", hidden_size=6),
    ]
    outputs = [helper.make_tensor_value_info("Z", onnx.TensorProto.FLOAT, [1, 1, 3, 6])]
    return model_of(nodes, [info("X", arrays["X"])], outputs, [*initializers, *other_weights])


@pytest.mark.parametrize("storage", ["initializers", "constants", "identity", "constants, identity"])
def test_write_to_each_storage(storage):
    case = Case("RNN", optional=("B",))
    arrays = case.arrays()
    model = two_layers(case, arrays, storage)
    params = {name: layer.params for name, layer in read(model).items()}
    assert list(params) == ["node", "other"]
    written = write(model, "node", -params["node"])
    assert [len(written.graph.node), len(written.graph.initializer)] == [
        len(model.graph.node),
        len(model.graph.initializer),
    ]
    assert str(written).count("description of W") == 1
    written_params = {name: layer.params for name, layer in read(written).items()}
    np.testing.assert_array_equal(written_params["node"], -params["node"])
    np.testing.assert_array_equal(written_params["other"], params["other"])
    negated = two_layers(case, arrays | {name: -arrays[name] for name in "WRB"}, storage)
    np.testing.assert_array_equal(*(run_onnxruntime(changed, {"X": arrays["X"]})[0] for changed in (written, negated)))


def test_unrelated_constants():
    _, model, _ = with_initializers(Case("RNN"))
    reference = read(model)["node"].params
    model.graph.node.insert(0, helper.make_node("Constant", [], ["one"], value_ints=[1]))
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64)), [3])
    )
    written = write(model, "node", read(model)["node"].params * 2)
    np.testing.assert_array_equal(read(written)["node"].params, reference * 2)


@pytest.mark.parametrize("taken", ["input", "initializer", "sparse"])
def test_a_new_constant_takes_no_name_of_a_value_that_nothing_reads(taken):
    _, model, _ = with_initializers(Case("RNN"))
    graph = model.graph
    next(tensor for tensor in graph.initializer if tensor.name == "W").name = "W0"
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    graph.node.insert(0, helper.make_node("Add", ["W0", "zero"], ["W"]))
    values = numpy_helper.from_array(np.ones(1, np.float32), "node_W")
    if taken == "input":
        graph.input.append(helper.make_tensor_value_info("node_W", onnx.TensorProto.FLOAT, [1]))
    elif taken == "initializer":
        graph.initializer.append(values)
    else:
        at = numpy_helper.from_array(np.zeros(1, np.int64))
        graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [3]))
    params = read(model)["node"].params * 2
    written = write(model, "node", params)
    onnx.checker.check_model(written)
    np.testing.assert_array_equal(read(written)["node"].params, params)


@kinds
def test_float64(kind):
    case, model, arrays = with_initializers(Case(kind, dtype="float64"))
    layer = read(model)["node"]
    assert layer.spec.dtype == "float64"
    params, _ = train_step(layer, arrays)
    written = write(model, "node", params)
    assert_same(fusedrnn.onnx.prepare(written).run(case.inputs(arrays)), results(layer, params, case, arrays), case)


@kinds
def test_float16_weights(kind):
    _, model, _ = with_initializers(Case(kind, dtype="float16"))
    layer = read(model)["node"]
    assert layer.params.dtype == np.float32
    params = layer.params + np.float32(1e-3)
    written = write(model, "node", params)
    assert {tensor.data_type for tensor in written.graph.initializer} == {onnx.TensorProto.FLOAT16}
    np.testing.assert_array_equal(read(written)["node"].params, params.astype(np.float16).astype(np.float32))
    layer.spec.layout.view(params, 0, 0, "h2h_weight")[1, 2] = -7e4
    with pytest.raises(ValueError, match=rf"^node 'node' \({kind}\): R must hold .* float16 can hold; got -70000"):
        write(model, "node", params)
    params[:] = np.inf  # and what is infinite stays so
    assert np.isinf(read(write(model, "node", params))["node"].params).all()


# ---- errors


def test_input_weights_are_rejected():
    case = Case("LSTM")
    model = case.model(case.arrays())
    for call in (lambda: read(model), lambda: write(model, "node", np.zeros(1, np.float32))):
        with pytest.raises(
            ValueError, match=r"node 'node' \(LSTM\): W must be computed from constants alone; it depends on 'W'"
        ):
            call()


@pytest.mark.parametrize("reader", ["node", "identity", "output", "same node", "subgraph"])
def test_write_rejects_shared_weights(reader):
    _, model, arrays = with_initializers(Case("RNN", I=6))
    graph = model.graph
    match = r"node 'node' \(RNN\): R must be read by this node alone to be written; 'R' is read elsewhere"
    if reader == "node":
        graph.node.append(helper.make_node("RNN", ["X", "R", "R"], ["Y2"], name="other", hidden_size=6))
    elif reader == "identity":
        graph.node.insert(0, helper.make_node("Identity", ["R"], ["copy"]))
        graph.node[1].input[2] = "copy"
        graph.node.append(helper.make_node("RNN", ["X", "R", "W"], ["Y2"], name="other", hidden_size=6))
        graph.initializer.append(numpy_helper.from_array(arrays["W"], "V"))
        graph.node[1].input[1] = "V"
    elif reader == "output":
        graph.output.append(info("R", arrays["R"]))
    elif reader == "same node":
        graph.node[0].input[1] = "R"
        match = match.replace("R must", "W must")
    else:
        inner = helper.make_graph([helper.make_node("Identity", ["R"], ["z"])], "inner", [], [info("z", arrays["R"])])
        graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
        graph.node.append(helper.make_node("If", ["condition"], ["Z"], then_branch=inner, else_branch=inner))
    params = read(model)["node"].params
    with pytest.raises(ValueError, match=match):
        write(model, "node", params)


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        (np.zeros(7, np.float32), ValueError, r"params must be .* float32 \(72,\); got shape \(7,\)"),
        (np.zeros(72), TypeError, r"params must be NumPy arrays: float32 \(72,\); got float64"),
        ([[0.0]], TypeError, "params must be NumPy arrays: .*; got list"),
        (np.ma.zeros(72, np.float32), TypeError, "params must be NumPy arrays: .*; got MaskedArray"),
        (3, TypeError, "params must be NumPy arrays: .*; got int"),
        ("zeros", TypeError, "params must be NumPy arrays: .*; got str"),
        ([], ValueError, "params must be one array for each part: .*; got 0"),
    ],
    ids=["size", "format", "list", "masked", "number", "text", "none"],
)
def test_invalid_params(params, error, match):
    _, model, _ = with_initializers(Case("RNN", optional=("B",)))
    with pytest.raises(error, match=match):
        write(model, "node", params)


def test_invalid_arguments():
    _, model, _ = with_initializers(Case("RNN"))
    for call in (lambda: read(b""), lambda: write("model.onnx", "node", np.zeros(1))):
        with pytest.raises(TypeError, match=r"model must be an onnx.ModelProto; got "):
            call()
    with pytest.raises(ValueError, match="name must be that of one LSTM, GRU or RNN, of 'node'; got 'nobody'"):
        write(model, "nobody", np.zeros(1))
    del model.graph.node[:]
    assert read(model) == {}
    with pytest.raises(ValueError, match="of which there are none; got 'node'"):
        read(model, ["node"])
    del model.opset_import[:]
    model.graph.node.append(helper.make_node("RNN", ["X", "W", "R"], ["Y"], name="node"))
    with pytest.raises(ValueError, match="model must import an opset of ONNX's own operators; got none"):
        fusedrnn.onnx.read(model)


def test_invalid_attributes():
    _, model, _ = with_initializers(Case("RNN", attributes={"hidden_size": 5}))
    with pytest.raises(ValueError, match=r"node 'node' \(RNN\): hidden_size must be 6"):
        read(model)
