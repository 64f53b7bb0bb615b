"""Models that onnx's checker refuses and ONNX Runtime runs: types left out, ONNX's domain spelled out, two opsets."""

import numpy as np
import onnxruntime
import pytest
from onnx import helper

import fusedrnn.onnx
from fusedrnn.onnx import read
from onnx_models import Case, assert_same, expected

CASE = Case("LSTM", weights_inside=True, optional=("B",), attributes={"layout": 0})


def cleared(field):
    """The type of every graph input or output, or a part of it."""

    def change(model):
        for entry in getattr(model.graph, field):
            entry.ClearField("type")

    return change


def without_shapes(model):
    for entry in (*model.graph.input, *model.graph.output):
        entry.type.tensor_type.ClearField("shape")


def without_a_name(model):
    model.graph.name = ""


def with_domains(node, imported, *versions):
    def change(model):
        model.graph.node[0].domain = node
        model.graph.node.insert(0, helper.make_node("Identity", ["W"], ["copy"], domain=node))
        model.graph.node[1].input[1] = "copy"
        del model.opset_import[:]
        model.opset_import.extend(helper.make_opsetid(imported, version) for version in versions or (14,))

    return change


ACCEPTED = {
    "untyped outputs": cleared("output"),
    "no shapes": without_shapes,
    "no name": without_a_name,
    "node spelled": with_domains("ai.onnx", ""),
    "import spelled": with_domains("", "ai.onnx"),
    "both spelled": with_domains("ai.onnx", "ai.onnx"),
    "last opset": with_domains("", "", 7, 14),
    "last opset, spelled": with_domains("ai.onnx", "ai.onnx", 7, 14),
}


@pytest.mark.parametrize("change", ACCEPTED)
def test_what_onnxruntime_accepts_is_accepted(change):
    arrays = CASE.arrays()
    model = CASE.model(arrays)
    ACCEPTED[change](model)
    before = model.SerializeToString(deterministic=True)
    inputs = CASE.inputs(arrays)
    reference = expected(CASE, arrays)
    assert_same(onnxruntime.InferenceSession(before).run(None, inputs), reference, CASE)
    assert_same(fusedrnn.onnx.run_model(model, inputs, backend="reference"), reference, CASE)
    layer = read(model)["node"]
    np.testing.assert_array_equal(layer.params, read(CASE.model(arrays))["node"].params)
    assert model.SerializeToString(deterministic=True) == before


def test_untyped_inputs_are_accepted():
    """Arrays are checked when the model runs. ONNX Runtime refuses them where nothing else tells their type."""
    arrays = CASE.arrays()
    model = CASE.model(arrays)
    cleared("input")(model)
    assert_same(fusedrnn.onnx.run_model(model, CASE.inputs(arrays), backend="reference"), expected(CASE, arrays), CASE)
    with pytest.raises(TypeError, match="X must be float32, as W is; got float64"):
        fusedrnn.onnx.run_model(model, [arrays["X"].astype(np.float64)], backend="reference")


@pytest.mark.parametrize("spelling", ["", "ai.onnx"])
def test_of_two_opsets_the_last_holds(spelling):
    """There is no layout in opset 7."""
    model = CASE.model(CASE.arrays())
    with_domains(spelling, spelling, 14, 7)(model)
    for call in (read, fusedrnn.onnx.prepare):
        with pytest.raises(ValueError, match="Unrecognized attribute: layout"):
            call(model)
    with pytest.raises(Exception, match="layout"):
        onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_run_node_takes_either_spelling(domain):
    arrays = CASE.arrays()
    node = CASE.node(arrays)
    node.domain = domain
    assert_same(fusedrnn.onnx.run_node(node, arrays, backend="reference"), expected(CASE, arrays), CASE)
