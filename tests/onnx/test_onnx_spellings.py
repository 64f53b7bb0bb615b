"""Models that onnx's checker rejects and onnxruntime runs: missing types, the domain "ai.onnx", two opsets."""

import numpy as np
import onnxruntime
import pytest
from onnx import helper

import fusedrnn.onnx
from fusedrnn.onnx import read
from onnx_models import Case, assert_same, expected

CASE = Case("LSTM", weights_inside=True, optional=("B",), attributes={"layout": 0})


def clear_types(field):
    """A change that clears the type of every graph input or output."""

    def change(model):
        for entry in getattr(model.graph, field):
            entry.ClearField("type")

    return change


def clear_shapes(model):
    for entry in (*model.graph.input, *model.graph.output):
        entry.type.tensor_type.ClearField("shape")


def clear_graph_name(model):
    model.graph.name = ""


def set_domains(node_domain, import_domain, *versions):
    """A change of the domain of nodes and imports, and of the imported versions."""

    def change(model):
        model.graph.node[0].domain = node_domain
        model.graph.node.insert(0, helper.make_node("Identity", ["W"], ["copy"], domain=node_domain))
        model.graph.node[1].input[1] = "copy"
        del model.opset_import[:]
        model.opset_import.extend(helper.make_opsetid(import_domain, version) for version in versions or (14,))

    return change


ACCEPTED = {
    "untyped outputs": clear_types("output"),
    "no shapes": clear_shapes,
    "no name": clear_graph_name,
    "node spelled": set_domains("ai.onnx", ""),
    "import spelled": set_domains("", "ai.onnx"),
    "both spelled": set_domains("ai.onnx", "ai.onnx"),
    "last opset": set_domains("", "", 7, 14),
    "last opset, spelled": set_domains("ai.onnx", "ai.onnx", 7, 14),
}


@pytest.mark.parametrize("change", ACCEPTED)
def test_models_that_onnxruntime_accepts(change):
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


def test_untyped_inputs():
    """Arrays are checked when the model runs. onnxruntime rejects inputs whose type nothing else determines."""
    arrays = CASE.arrays()
    model = CASE.model(arrays)
    clear_types("input")(model)
    assert_same(fusedrnn.onnx.run_model(model, CASE.inputs(arrays), backend="reference"), expected(CASE, arrays), CASE)
    with pytest.raises(TypeError, match="X must be float32, as W is; got float64"):
        fusedrnn.onnx.run_model(model, [arrays["X"].astype(np.float64)], backend="reference")


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_last_opset_applies(domain):
    """Opset 7 has no layout."""
    model = CASE.model(CASE.arrays())
    set_domains(domain, domain, 14, 7)(model)
    for call in (read, fusedrnn.onnx.prepare):
        with pytest.raises(ValueError, match="Unrecognized attribute: layout"):
            call(model)
    with pytest.raises(Exception, match="layout"):
        onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_run_node_accepts_both_domain_names(domain):
    arrays = CASE.arrays()
    node = CASE.node(arrays)
    node.domain = domain
    assert_same(fusedrnn.onnx.run_node(node, arrays, backend="reference"), expected(CASE, arrays), CASE)
