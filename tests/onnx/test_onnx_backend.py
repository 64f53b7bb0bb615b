"""The onnx backend: onnx's own tests of the three operators, graphs of several nodes, the interface."""

import importlib
import re
import threading
import unittest
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.backend.test import BackendTest, loader

import fusedrnn.onnx
from onnx_models import Case, assert_same, expected, info, model_of, run_fusedrnn

KINDS = ("LSTM", "GRU", "RNN")

# ---- onnx's own tests of the three operators


def import_recurrent(package):
    """Import only the modules of a package of tests that name one of the three operators: others compute for long."""
    for path in Path(package.__file__).parent.rglob("*.py"):
        if re.search(f"""["']({"|".join(KINDS)})["']""", path.read_text(encoding="utf-8")):
            importlib.import_module(f"{package.__name__}.{path.stem}")


def recurrent_tests(load, *args, **options):
    """What onnx loads, without the tests of other operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "import_recursive", import_recurrent, raising=False)  # old releases import otherwise
        return load(*args, **options)


CASES = recurrent_tests(loader.load_model_tests, kind="node")
ONNX_TESTS = {f"{case.name}_cpu": case.name for case in CASES if re.match("test_(lstm|gru|rnn|simple_rnn)_", case.name)}


def onnx_test_class(backend, options):
    """The test class that onnx generates for a backend, reduced to the tests of the three operators."""
    suite = recurrent_tests(BackendTest, backend, __name__, dict.fromkeys(ONNX_TESTS.values(), options))
    generated = suite.test_cases["OnnxBackendNodeModelTest"]
    return type(generated.__name__, (unittest.TestCase,), {name: getattr(generated, name) for name in ONNX_TESTS})


class TestOnnxSuiteOnReference(onnx_test_class(fusedrnn.onnx, {"backend": "reference"})):
    """``BackendTest(fusedrnn.onnx, __name__)`` on the reference engine."""


class TestOnnxSuiteOnDefaultEngine(onnx_test_class(fusedrnn.onnx, {})):
    """The same on the first engine that supports each node."""


def test_onnx_suite_is_complete():
    """Checks tests with other names too, where onnx provides the test's model."""
    models = {case.name: case.model for case in CASES if case.model is not None}
    recurrent = {name for name, model in models.items() if any(node.op_type in KINDS for node in model.graph.node)}
    assert recurrent <= set(ONNX_TESTS.values())
    assert len(ONNX_TESTS) >= 12  # onnx 1.18 has 12, onnx 1.23 has 18
    for suite in (TestOnnxSuiteOnReference, TestOnnxSuiteOnDefaultEngine):
        assert {name for name in dir(suite) if name.startswith("test_")} == set(ONNX_TESTS)


# ---- graphs of several nodes, and the interface


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [(kind, names) for kind in KINDS for names in [("Y",), ("", "Y_h"), ("Y", "Y_h")]]
    + [("LSTM", ("", "", "Y_c")), ("LSTM", ("Y", "", "Y_c")), ("LSTM", ("", "Y_h", "Y_c"))],
)
def test_omitted_outputs(kind, outputs):
    case = Case(kind, outputs=outputs)
    arrays = case.arrays()
    results = run_fusedrnn(case, arrays)
    assert_same(results, expected(case, arrays), case)
    for index, name in enumerate(filter(None, outputs)):
        assert results[name] is results[index]


def two_layers():
    """A GRU and an LSTM, an Identity between them; weights in initializers, in a Constant and behind an Identity."""
    first = Case("GRU", I=6, attributes={"linear_before_reset": 1}, optional=("B", "initial_h"))
    second = Case("LSTM", I=6, optional=("B", "P"), attributes={"direction": "reverse"})
    a, b = first.arrays(1), second.arrays(2)
    nodes = [
        helper.make_node("Constant", [], ["W1"], value=numpy_helper.from_array(a["W"])),
        helper.make_node(
            "GRU", ["X", "W1", "R1", "B1", "", "h1"], ["", "hidden"], hidden_size=6, linear_before_reset=1
        ),
        helper.make_node("Identity", ["hidden"], ["copied"]),
        helper.make_node("Identity", ["B2"], ["bias"]),
        helper.make_node(
            "LSTM", ["copied", "W2", "R2", "bias", "", "", "", "P2"], ["Z"], hidden_size=6, direction="reverse"
        ),
    ]
    names = {"R1": a["R"], "B1": a["B"], "h1": a["initial_h"]} | {f"{n}2": b[n] for n in "WRBP"}
    initializers = [numpy_helper.from_array(array, name) for name, array in names.items()]
    outputs = [helper.make_tensor_value_info("Z", onnx.TensorProto.FLOAT, [1, 1, 3, 6])]
    model = model_of(nodes, [info("X", a["X"])], outputs, initializers)
    _, h = expected(first, a)
    return model, a["X"], expected(replace(second, T=1), b | {"X": h.astype(np.float32)})[:1], second


def test_chain_of_nodes():
    model, x, reference, case = two_layers()
    prepared = fusedrnn.onnx.prepare(model)
    assert_same(prepared.run([x]), reference, case)
    assert_same(prepared.run({"X": x}), reference, case)
    assert prepared.run([x])["Z"].shape == (1, 1, 3, 6)


def test_weights_are_packed_once(monkeypatch):
    model, x, _, _ = two_layers()
    prepared = fusedrnn.onnx.prepare(model, backend="reference")
    first = prepared.run([x])
    monkeypatch.setattr("fusedrnn.onnx.node_runner.from_onnx", None)  # not called again
    np.testing.assert_array_equal(prepared.run([x])[0], first[0])


def test_input_replaces_initializer():
    case = Case("RNN", weights_inside=True)
    arrays = case.arrays()
    model = case.model(arrays)
    model.graph.input.append(info("W", arrays["W"]))
    other = arrays | {"W": -arrays["W"]}
    inputs = case.inputs(arrays)
    prepared = fusedrnn.onnx.prepare(model)
    assert_same(prepared.run(list(inputs.values())), expected(case, arrays), case)
    assert_same(prepared.run(inputs | {"W": other["W"]}), expected(case, other), case)
    assert_same(prepared.run(inputs), expected(case, arrays), case)


def test_initializers_listed_as_inputs():
    """Versions of the format before 4 require it."""
    case = Case("GRU", opset=7, weights_inside=True)
    arrays = case.arrays()
    model = case.model(arrays)
    model.ir_version = 3
    model.graph.input.extend(info(name, arrays[name]) for name in "WRB")
    assert_same(fusedrnn.onnx.prepare(model).run(list(case.inputs(arrays).values())), expected(case, arrays), case)


def test_run_node_and_run_model():
    case = Case("LSTM", lengths=(5, 1, 3))
    arrays = case.arrays()
    reference = expected(case, arrays)
    node = case.node(arrays)
    options = {"backend": "reference"}
    shapes = [(np.float32, array.shape) for array in reference]
    assert_same(fusedrnn.onnx.run_node(node, list(arrays.values()), outputs_info=shapes, **options), reference, case)
    outputs = fusedrnn.onnx.run_node(node, arrays, opset_version=7, **options)
    assert_same(outputs, reference, case)
    assert outputs["Y_c"] is outputs[2]
    assert_same(fusedrnn.onnx.run_model(case.model(arrays), arrays, **options), reference, case)


def test_strided_read_only_inputs():
    case = Case("LSTM", attributes={"direction": "bidirectional", "layout": 1}, lengths=(5, 1, 3))
    contiguous_arrays = case.arrays()
    arrays = {name: np.repeat(a, 2, axis=-1)[..., ::2] for name, a in contiguous_arrays.items()}
    for array in arrays.values():
        array.setflags(write=False)
    references = run_fusedrnn(case, contiguous_arrays)
    for output, reference in zip(run_fusedrnn(case, arrays), references, strict=True):
        np.testing.assert_array_equal(output, reference)


def test_concurrent_runs():
    model, x, _, _ = two_layers()
    prepared = fusedrnn.onnx.prepare(model, backend="reference")
    inputs = [x * scale for scale in (1, 0.5, -1, 2)]
    reference = [prepared.run([array])[0] for array in inputs]
    outputs = [None] * len(inputs)

    def run_repeatedly(index):
        for _ in range(10):
            outputs[index] = prepared.run([inputs[index]])[0]

    threads = [threading.Thread(target=run_repeatedly, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, expected_output in zip(outputs, reference, strict=True):
        np.testing.assert_array_equal(output, expected_output)


def test_an_output_that_the_graph_has_twice():
    case = Case("RNN")
    arrays = case.arrays()
    model = case.model(arrays)
    model.graph.output.append(model.graph.output[0])
    prepared = fusedrnn.onnx.prepare(model)
    assert prepared.outputs == ("Y", "Y_h", "Y")
    outputs = prepared.run(case.inputs(arrays))
    assert len(outputs) == 3 and outputs[0] is outputs[2] is outputs["Y"]
