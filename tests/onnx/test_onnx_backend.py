"""The backend: onnx's own tests of the three operators, graphs of several nodes, the interface."""

import re
import threading
import unittest
import warnings
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import fusedrnn.onnx
from onnx_models import (
    Case,
    assert_same,
    expected,
    info,
    model_of,
    ours,
)

KINDS = ("LSTM", "GRU", "RNN")

# ---- onnx's own tests of the three operators

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # overflow in the data of tests of other operators
    from onnx.backend.test import BackendTest
    from onnx.backend.test.loader import load_model_tests

    CASES = load_model_tests(kind="node")

OFFICIAL = {f"{case.name}_cpu": case.name for case in CASES if re.match("test_(lstm|gru|rnn|simple_rnn)_", case.name)}


def official(backend, options):
    """The test class that onnx makes of a backend, with the tests of our operators alone."""
    suite = BackendTest(backend, __name__, dict.fromkeys(OFFICIAL.values(), options))
    every = suite.test_cases["OnnxBackendNodeModelTest"]
    return type(every.__name__, (unittest.TestCase,), {name: getattr(every, name) for name in OFFICIAL})


class TestOfficialOnTheReference(official(fusedrnn.onnx, {"backend": "reference"})):
    """``BackendTest(fusedrnn.onnx, __name__)``, told which engine."""


class TestOfficialOnWhatIsChosen(official(fusedrnn.onnx, {})):
    """The same on the engine that is chosen, where it takes the node."""


def test_official_tests_are_all_there():
    """Also those that are called otherwise, where onnx tells of what nodes a test is."""
    models = {case.name: case.model for case in CASES if case.model is not None}
    ours = {name for name, model in models.items() if any(node.op_type in KINDS for node in model.graph.node)}
    assert ours <= set(OFFICIAL.values())
    assert len(OFFICIAL) >= 12  # of onnx 1.18; 18 of 1.23
    for suite in (TestOfficialOnTheReference, TestOfficialOnWhatIsChosen):
        assert {name for name in dir(suite) if name.startswith("test_")} == set(OFFICIAL)


# ---- graphs of several nodes, and the interface


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [(kind, names) for kind in KINDS for names in [("Y",), ("", "Y_h"), ("Y", "Y_h")]]
    + [("LSTM", ("", "", "Y_c")), ("LSTM", ("Y", "", "Y_c")), ("LSTM", ("", "Y_h", "Y_c"))],
)
def test_outputs_that_are_left_out(kind, outputs):
    case = Case(kind, outputs=outputs)
    arrays = case.arrays()
    results = ours(case, arrays)
    assert_same(results, expected(case, arrays), case)
    for place, name in enumerate(filter(None, outputs)):
        assert results[name] is results[place]


def stack():
    """Two layers that follow each other through an Identity, constants in every place that there is."""
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


def test_nodes_in_a_row():
    model, x, reference, case = stack()
    ready = fusedrnn.onnx.prepare(model)
    assert_same(ready.run([x]), reference, case)
    assert_same(ready.run({"X": x}), reference, case)
    assert ready.run([x])["Z"].shape == (1, 1, 3, 6)


def test_weights_are_packed_once(monkeypatch):
    model, x, _, _ = stack()
    ready = fusedrnn.onnx.prepare(model, backend="reference")
    first = ready.run([x])
    monkeypatch.setattr("fusedrnn.onnx.node_runner.from_onnx", None)  # not called again
    np.testing.assert_array_equal(ready.run([x])[0], first[0])


def test_an_initializer_that_is_an_input_can_be_replaced():
    case = Case("RNN", weights_inside=True)
    arrays = case.arrays()
    model = case.model(arrays)
    model.graph.input.append(info("W", arrays["W"]))
    other = arrays | {"W": -arrays["W"]}
    inputs = case.inputs(arrays)
    ready = fusedrnn.onnx.prepare(model)
    assert_same(ready.run(list(inputs.values())), expected(case, arrays), case)
    assert_same(ready.run(inputs | {"W": other["W"]}), expected(case, other), case)
    assert_same(ready.run(inputs), expected(case, arrays), case)


def test_models_that_list_initializers_as_inputs():
    """As before version 4 of the format they must."""
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


def test_inputs_in_any_strides_are_not_written_to():
    case = Case("LSTM", attributes={"direction": "bidirectional", "layout": 1}, lengths=(5, 1, 3))
    plain = case.arrays()
    arrays = {name: np.repeat(a, 2, axis=-1)[..., ::2] for name, a in plain.items()}
    for array in arrays.values():
        array.setflags(write=False)
    for strided, contiguous in zip(ours(case, arrays), ours(case, plain), strict=True):
        np.testing.assert_array_equal(strided, contiguous)


def test_many_threads_run_one_model():
    model, x, _, _ = stack()
    ready = fusedrnn.onnx.prepare(model, backend="reference")
    inputs = [x * scale for scale in (1, 0.5, -1, 2)]
    reference = [ready.run([array])[0] for array in inputs]
    outputs = [None] * len(inputs)

    def work(index):
        for _ in range(10):
            outputs[index] = ready.run([inputs[index]])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for array, other in zip(outputs, reference, strict=True):
        np.testing.assert_array_equal(array, other)
