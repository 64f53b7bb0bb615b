"""Layers in the bodies of If, Loop and Scan and in functions; recurrent operators that are not supported."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from fusedrnn import RNNOp
from fusedrnn.onnx import prepare, read, write
from onnx_models import Case, computed, info, model_of

OPSET = [helper.make_opsetid("", 16)]
FLOAT = onnx.TensorProto.FLOAT


def arrays_of(seed):
    return Case("RNN", optional=()).arrays(seed)


def params_of(seed):
    """The parameters of the layer with these arrays."""
    case = Case("RNN", optional=(), weights_inside=True)
    return read(case.model(case.arrays(seed)))["node"].params


def tensor(name, seed, part):
    return numpy_helper.from_array(arrays_of(seed)[part], name)


def rnn(weights=("W", "R"), x="X", output="z", name="deep"):
    return helper.make_node("RNN", [x, *weights], ["", output], name=name, hidden_size=6)


def body(nodes, initializers=(), inputs=(), outputs=("z",), name="body"):
    return helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(entry, *kind) for entry, *kind in inputs],
        [helper.make_tensor_value_info(entry, FLOAT, None) for entry in outputs],
        list(initializers),
    )


def model_with(nodes, initializers=(), outputs=("Z",)):
    """A model with the weights W and R of seed 0, a condition, and these nodes."""
    constants = [
        tensor("W", 0, "W"),
        tensor("R", 0, "R"),
        numpy_helper.from_array(np.array(True), "condition"),
        *initializers,
    ]
    results = [onnx.ValueInfoProto(name=output) for output in outputs]
    return model_of(nodes, [info("X", arrays_of(0)["X"])], results, constants, 16)


def branches(then_branch, else_branch, name="branch", output="Z"):
    return helper.make_node("If", ["condition"], [output], name=name, then_branch=then_branch, else_branch=else_branch)


def run(model):
    """The outputs of onnxruntime, which raises if the model is invalid."""
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"X": arrays_of(0)["X"]})


def assert_params(layers, seeds):
    assert list(layers) == list(seeds)
    for name, seed in seeds.items():
        assert layers[name].name == name
        np.testing.assert_array_equal(layers[name].params, params_of(seed))


# ---- If, Loop and Scan


def test_if_branches():
    """One branch reads the outer graph's weights, the other has its own initializers."""
    own = [tensor("V", 1, "W"), tensor("Q", 1, "R")]
    model = model_with([branches(body([rnn()]), body([rnn(("V", "Q"), name="")], own))])
    run(model)
    layers = read(model)
    assert_params(layers, {"branch/else_branch/z": 1, "branch/then_branch/deep": 0})
    assert list(read(model, "branch/then_branch/z")) == ["branch/then_branch/deep"]
    with pytest.raises(ValueError, match=r"of 'branch/else_branch/z', 'branch/then_branch/deep'; got 'deep'"):
        read(model, ["deep"])


def test_body_name_shadows_outer_name():
    own = [tensor("W", 2, "W"), tensor("Q", 2, "R")]
    model = model_with([branches(body([rnn()]), body([rnn(("W", "Q"))], own))])
    assert_params(read(model), {"branch/else_branch/deep": 2, "branch/then_branch/deep": 0})


def test_nested_bodies():
    """An If in an If; the path of an unnamed node contains its first output."""
    inner = branches(body([rnn()]), body([rnn(("V", "R"))]), name="", output="i")
    outer = branches(body([inner], [tensor("V", 0, "W")], outputs=("i",)), body([rnn()]), name="a/b")
    model = model_with([outer])
    run(model)
    layers = read(model)
    assert_params(
        layers,
        {
            "a/b/else_branch/deep": 0,
            "a/b/then_branch/i/else_branch/deep": 0,
            "a/b/then_branch/i/then_branch/deep": 0,
        },
    )


def test_ambiguous_names():
    model = model_with([rnn(output="y", name="branch/then_branch/deep"), branches(body([rnn()]), body([rnn()]))])
    with pytest.raises(ValueError, match="names of nodes or of their outputs must differ; got several 'branch/then_"):
        read(model)
    with pytest.raises(ValueError, match=r"name must be that of one LSTM, .*; got 'branch/then_branch/deep'"):
        read(model, ["branch/then_branch/deep"])
    assert_params(
        read(model, ["y", "branch/else_branch/deep"]), {"branch/then_branch/deep": 0, "branch/else_branch/deep": 0}
    )


def loop():
    """A model with a Loop of three iterations, whose layer reads its own previous output."""
    step = body(
        [helper.make_node("Identity", ["go"], ["on"]), rnn(("V", "R"), "h", "z")],
        inputs=[("i", onnx.TensorProto.INT64, []), ("go", onnx.TensorProto.BOOL, []), ("h", FLOAT, None)],
        outputs=("on", "z"),
    )
    step.output[0].type.tensor_type.elem_type = onnx.TensorProto.BOOL
    node = helper.make_node("Loop", ["times", "", "start"], ["Z"], name="loop", body=step)
    times = numpy_helper.from_array(np.array(3), "times")
    start = numpy_helper.from_array(np.zeros((1, 3, 6), np.float32), "start")
    square = numpy_helper.from_array(arrays_of(0)["R"], "V")
    return model_with([node], [times, start, square])


def test_loop_body():
    model = loop()
    run(model)
    layer = read(model)["loop/body/deep"]
    assert (layer.spec.input_size, layer.spec.hidden_size) == (6, 6)


def test_loop_carried_weight_is_rejected():
    """Also if a constant of the outer graph and an initializer of the body have the same name."""
    model = loop()
    graph = model.graph.node[0].attribute[0].g
    graph.input[2].name = "V"
    graph.node[1].input[0] = "V"
    graph.initializer.append(numpy_helper.from_array(arrays_of(0)["R"], "V"))
    with pytest.raises(
        ValueError, match=r"node 'loop/body/deep' \(RNN\): W must be .*; it depends on 'V', which is an in"
    ):
        read(model)


def test_scan_body():
    step = body([rnn(x="frame", output="z")], inputs=[("frame", FLOAT, [5, 3, 4])], outputs=("z",))
    node = helper.make_node("Scan", ["frames"], ["Z"], name="scan", num_scan_inputs=1, body=step)
    frames = numpy_helper.from_array(np.stack([arrays_of(0)["X"]] * 2), "frames")
    model = model_with([node], [frames])
    (result,) = run(model)
    layer = read(model)["scan/body/deep"]
    _, (h_n,), _ = RNNOp(layer.spec).forward(arrays_of(0)["X"], layer.params, layer.states)
    np.testing.assert_allclose(result[0], h_n, rtol=1e-5, atol=1e-6)


def test_computed_weights_in_bodies():
    """The branch computes its weights from constants of the outer graph, as exporters emit it."""
    arrays = {name: arrays_of(3)[name] for name in ("W", "R")}
    nodes, initializers = computed(arrays)
    model = model_with([*nodes[:2], branches(body([*nodes[2:], rnn(("W/out", "R/out"))]), body([rnn()]))], initializers)
    run(model)
    assert_params(read(model), {"branch/else_branch/deep": 0, "branch/then_branch/deep": 3})
    path = "branch/then_branch/deep"
    written = write(model, path, params_of(4))
    run(written)
    assert_params(read(written), {"branch/else_branch/deep": 0, "branch/then_branch/deep": 4})
    branch_nodes = written.graph.node[-1].attribute[1].g.node
    assert [node.op_type for node in branch_nodes] == ["Constant", "Constant", "RNN"]
    assert [node.op_type for node in written.graph.node] == ["If"]


def test_write_layer_in_body():
    own = [tensor("V", 1, "W"), tensor("Q", 1, "R")]
    model = model_with([branches(body([rnn()]), body([rnn(("V", "Q"))], own))])
    before = model.SerializeToString(deterministic=True)
    for path in ("branch/else_branch/deep", "branch/then_branch/deep"):
        layers = read(write(model, path, params_of(5)))
        for name, layer in layers.items():
            seed = 5 if name == path else {"branch/else_branch/deep": 1, "branch/then_branch/deep": 0}[name]
            np.testing.assert_array_equal(layer.params, params_of(seed))
    assert model.SerializeToString(deterministic=True) == before


def test_write_rejects_weights_shared_by_branches():
    model = model_with([branches(body([rnn()]), body([rnn()]))])
    with pytest.raises(ValueError, match=r"node 'branch/then_branch/deep' \(RNN\): W must be read by this node alone"):
        write(model, "branch/then_branch/deep", params_of(0))


def test_errors_in_bodies_name_the_path():
    node = rnn()
    node.attribute.append(helper.make_attribute("clip", -1.0))
    model = model_with([branches(body([node]), body([rnn()]))])
    with pytest.raises(ValueError, match=r"node 'branch/then_branch/deep' \(RNN\): clip must be above 0"):
        read(model)


# ---- functions


def function(name, nodes, inputs=("X", "W", "R"), outputs=("z",), **changes):
    opsets = [*OPSET, helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, inputs, outputs, nodes, opsets, **changes)


def calling(functions, *calls):
    model = model_with(calls, outputs=[output for call in calls for output in call.output])
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("local", 1))
    return model


def call(operator, inputs, output, name="", **attributes):
    return helper.make_node(operator, inputs, [output], name=name, domain="local", **attributes)


def test_function_calls():
    """Each call is a layer with the weights and attributes that the call passes."""
    node = rnn()
    node.attribute.add(name="direction", ref_attr_name="way", type=onnx.AttributeProto.STRING)
    node.attribute.add(name="clip", ref_attr_name="bound", type=onnx.AttributeProto.FLOAT)
    encode = function("encode", [node], attributes=["way", "bound"])
    model = calling(
        [encode],
        call("encode", ["X", "W", "R"], "Y", "first", way="reverse"),
        call("encode", ["X", "V", "Q"], "Z", "second", way="forward", bound=2.0),
    )
    model.graph.initializer.extend([tensor("V", 1, "W"), tensor("Q", 1, "R")])
    run(model)
    layers = read(model)
    assert_params(layers, {"first/encode/deep": 0, "second/encode/deep": 1})
    specs = [layer.spec for layer in layers.values()]
    assert [(spec.reverse, spec.gate_clip) for spec in specs] == [(True, None), (False, 2.0)]
    with pytest.raises(
        NotImplementedError, match=r"node 'first/encode/deep' \(RNN\): a layer in a function cannot be writ"
    ):
        write(model, "first/encode/deep", params_of(0))


def test_nested_function_calls():
    """A function passes weights to another one and omits an argument; a third one computes a weight."""
    biased = helper.make_node("RNN", ["X", "W", "R", "B"], ["", "z"], name="deep", hidden_size=6)
    inner = function("inner", [biased], inputs=("X", "W", "R", "B"))
    outer = function("outer", [call("inner", ["X", "W", "R"], "z", "core")])
    negated = function("negated", [helper.make_node("Neg", ["a"], ["b"])], inputs=("a",), outputs=("b",))
    model = calling(
        [inner, outer, negated], call("negated", ["W"], "V"), call("outer", ["X", "V", "R"], "Z", "encoder")
    )
    layer = read(model)["encoder/outer/core/inner/deep"]
    assert layer.spec.bias == "none"
    assert set(layer.inputs) == {"X", "W", "R"}
    weights = layer.spec.layout.unpack(layer.params)
    np.testing.assert_array_equal(weights["l0_i2h_weight"], -arrays_of(0)["W"][0])


def test_error_names_weight_omitted_by_caller():
    model = calling([function("encode", [rnn()])], call("encode", ["X", "", "R"], "Z", "first"))
    with pytest.raises(
        ValueError, match=r"node 'first/encode/deep' \(RNN\): W must be given; the function that contains the node"
    ):
        read(model)


@pytest.mark.parametrize(("operator", "inputs"), [("RNN", ["X", "W", "R"]), ("Identity", ["X"])])
def test_function_replaces_operator_of_same_name(operator, inputs):
    negation = helper.make_node("Neg", ["X"], ["z"])
    model = model_with([helper.make_node(operator, inputs, ["Z"])])
    model.functions.append(helper.make_function("", operator, inputs, ["z"], [negation], OPSET))
    assert read(model) == {}
    with pytest.raises(NotImplementedError, match=rf"the node of 'Z' \({operator}\) is not supported"):
        prepare(model)


def test_recursive_and_exponential_calls_are_rejected():
    recursive = function("recursive", [rnn(), call("recursive", ["X", "W", "R"], "y")])
    with pytest.raises(ValueError, match=r"\(local.recursive\): bodies must be nested at most 100 deep"):
        read(calling([recursive], call("recursive", ["X", "W", "R"], "Z")))
    many = [function("f0", [rnn()])]
    for level in range(1, 40):
        calls = [call(f"f{level - 1}", ["X", "W", "R"], output) for output in ("z", "y")]
        many.append(function(f"f{level}", calls))
    with pytest.raises(ValueError, match=r"\(local.f\d+\): functions must have at most 10000 nodes over all calls"):
        read(calling(many, call("f39", ["X", "W", "R"], "Z")))


# ---- recurrent operators that are not supported


def quantized(name, domain="com.microsoft", operator="QLinearLSTM"):
    return helper.make_node(
        operator, ["X", "Wq", "Rq"], [f"{name or 'y'}/out"], name=name, domain=domain, hidden_size=6
    )


def test_error_names_quantized_layers():
    model = model_with([quantized("q"), quantized(""), quantized("a", operator="AttnLSTM")], outputs=["q/out"])
    with pytest.raises(NotImplementedError) as error_info:
        read(model)
    for part in (
        "node 'q' (com.microsoft.QLinearLSTM), the node of 'y/out' (com.microsoft.QLinearLSTM), ",
        "node 'a' (com.microsoft.AttnLSTM) cannot be read; expected LSTM, GRU or RNN of ONNX's own domain",
    ):
        assert part in str(error_info.value)
    for call in (lambda: read(model, ["q"]), lambda: write(model, "q", params_of(0))):
        with pytest.raises(NotImplementedError, match=r"^node 'q' \(com.microsoft.QLinearLSTM\) cannot be read"):
            call()


@pytest.mark.parametrize(
    ("domain", "operator"),
    [("com.microsoft", "QLinearGRU"), ("x.y", "DynamicQuantizeLSTM"), ("", "GRUUnit"), ("x.y", "LSTM"), ("", "AnyRNN")],
)  # fmt: skip
def test_other_recurrent_operators_are_rejected(domain, operator):
    node = quantized("q", domain, operator)
    with pytest.raises(NotImplementedError, match=r"^node 'q' \(.*\) cannot be read"):
        read(model_with([node]))
    with pytest.raises(NotImplementedError, match=r"^node 'branch/else_branch/q' \(.*\) cannot be read"):
        read(model_with([branches(body([rnn()]), body([node]))]))


def test_error_lists_supported_layers():
    model = model_with([rnn(output="y", name="plain"), quantized("q")])
    with pytest.raises(NotImplementedError, match=r"; name the others to read them alone: 'plain'$"):
        read(model)
    assert_params(read(model, ["plain"]), {"plain": 0})


def test_model_without_recurrent_nodes():
    assert read(model_with([helper.make_node("Relu", ["X"], ["Z"])])) == {}
