"""What accelerate and its sessions refuse, and the shared object that ONNX Runtime loads."""

import ctypes
import re
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from fusedrnn.onnx import accelerate
from fusedrnn.onnx.ort import shared_object
from fusedrnn.testing.tolerance import tolerance
from onnx_networks import FLOAT, INT32, gru_stack, helper, model_of, normal, rnn_in_scan, value, weights

pytestmark = pytest.mark.skipif(not shared_object.is_supported(), reason="no custom operators on this system")


def raises(kind, *words):
    return pytest.raises(kind, match=".*".join(map(re.escape, words)))


def test_models(tmp_path):
    path = tmp_path / "model.onnx"
    with raises(FileNotFoundError, "model.onnx"):
        accelerate(path)
    for content in (b"", b"no model", b"\x08\x07"):
        path.write_bytes(content)
        with raises(ValueError, "model must be an ONNX model", "model.onnx"):
            accelerate(str(path))
        with raises(ValueError, "model must be an ONNX model", "bytes"):
            accelerate(content)
    with raises(TypeError, "model must be", "int"):
        accelerate(5)
    model, _ = gru_stack()
    model.graph.node[0].op_type = "NoOperator"
    with raises(ValueError, "ONNX Runtime", "NoOperator"):
        accelerate(model)


def test_weights_in_another_file_that_is_missing(tmp_path):
    model, _ = gru_stack()
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    (tmp_path / "weights.bin").unlink()
    with raises(ValueError, "model must be an ONNX model", "model.onnx", "which onnx cannot load", "weights.bin"):
        accelerate(path)


def test_a_model_may_be_a_file_or_bytes(tmp_path):
    model, feeds = gru_stack()
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    inputs = feeds(4, 2)
    results = [accelerate(each, replace="always").run(None, inputs) for each in (model, path, path.read_bytes())]
    for result in results[1:]:
        for output, other in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(output, other)


def test_arguments():
    model, feeds = gru_stack()
    with raises(ValueError, "replace", "auto, always", "'never'"):
        accelerate(model, replace="never")
    with raises(ValueError, "num_threads", "0"):
        accelerate(model, num_threads=0)
    with raises(ValueError, "calibration_seconds must be finite", "inf"):
        accelerate(model, calibration_seconds=float("inf"))
    with raises(TypeError, "sess_options", "dict"):
        accelerate(model, sess_options={})
    with raises(TypeError, "feeds", "int"):
        accelerate(model, feeds=5)
    with raises(ValueError, "feeds", "'X', 'lengths'", "missing 'lengths'"):
        accelerate(model, feeds=[feeds(3, 2), {"X": normal(2, 3, 4)}])


def test_onnxruntime_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with raises(ImportError, "needs onnxruntime: install fusedrnn with its extra 'onnxruntime'"):
        accelerate(gru_stack()[0])


def test_feeds():
    model, feeds = gru_stack()
    session, good = accelerate(model, replace="always"), feeds(4, 2)
    for change, kind, words in (
        ({"Z": good["X"]}, ValueError, ("'X', 'lengths'", "got 'Z'")),
        ({"lengths": None}, ValueError, ("'X', 'lengths'", "missing 'lengths'")),
        ({"X": good["X"].astype(np.float64)}, TypeError, ("'X' must be float32", "float64")),
        ({"lengths": np.array([1, 2])}, TypeError, ("'lengths' must be int32", "int64")),
        ({"X": good["X"][0]}, ValueError, ("'X' must have shape (N, T, 4)", "(4, 4)")),
        ({"X": normal(2, 4, 5)}, ValueError, ("'X' must have shape (N, T, 4)", "(2, 4, 5)")),
    ):
        bad = {name: array for name, array in (good | change).items() if array is not None}
        with raises(kind, *words):
            session.run(None, bad)
    with raises(TypeError, "feeds must be a mapping", "list"):
        session.run(None, [good["X"]])
    with raises(ValueError, "output_names", "'Y', 'h_n'", "'y'"):
        session.run(["y"], good)


def test_errors_of_a_kernel_name_the_input():
    """What only the node can know; later calls run."""
    constants = weights("LSTM", 4, 5)
    nodes = [helper.make_node("LSTM", ["X", "W", "R", "B", "lengths", "h0"], ["Y"], hidden_size=5)]
    inputs = [value("X", FLOAT), value("lengths", INT32), value("h0", FLOAT)]
    session = accelerate(model_of(nodes, inputs, [value("Y")], constants), replace="always")
    good = {"X": normal(4, 2, 4), "lengths": np.array([4, 4], np.int32), "h0": normal(1, 2, 5)}
    (expected,) = session.run(None, good)
    for change, words in (
        ({"X": normal(4, 2, 3)}, ("X must have shape (T, N, 4)", "(4, 2, 3)")),
        ({"X": normal(4, 4)}, ("X must have shape (T, N, 4)", "(4, 4)")),
        ({"X": normal(1, 4, 2, 4)}, ("X must have shape (T, N, 4)",)),
        ({"X": normal(0, 2, 4)}, ("X must have shape", "at least 1", "(0, 2, 4)")),
        ({"h0": normal(1, 3, 5)}, ("initial_h must have shape (1, 2, 5)", "(1, 3, 5)")),
        ({"lengths": np.array([4, 5], np.int32)}, ("sequence_lens", "from 0 to 4", "5")),
        ({"lengths": np.array([4], np.int32)}, ("sequence_lens must have shape (2,)", "(1,)")),
    ):
        with pytest.raises(Exception, match=".*".join(map(re.escape, words))):
            session.run(None, good | change)
        np.testing.assert_array_equal(session.run(None, good)[0], expected)


def test_options_of_the_caller():
    """They apply, keep their values, and serve several models, also after the first session is gone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    for network in (gru_stack, rnn_in_scan):
        model, feeds = network()
        session = accelerate(model, sess_options=options, num_threads=1, replace="always")
        assert session.report.num_threads == 1 and options.intra_op_num_threads == 2
        assert session.session.get_session_options().log_severity_level == 3
        inputs = feeds(5, 2)
        plain = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, inputs)
        for output, other in zip(session.run(None, inputs), plain, strict=True):
            rtol, atol = tolerance("float32", 20)
            np.testing.assert_allclose(output, other, 2 * rtol, 2 * atol)
        del session
    session = accelerate(model, feeds=inputs, sess_options=options, calibration_seconds=0.01)
    assert session.report.num_threads == 2 and not options.enable_profiling


@pytest.mark.parametrize("replace", ["always", "auto"])
def test_the_file_of_the_optimized_model_has_no_replaced_nodes(tmp_path, replace):
    model, feeds = gru_stack()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    inputs = feeds(5, 2)
    accelerate(model, replace=replace, feeds=inputs, sess_options=options, calibration_seconds=0.01)
    assert options.optimized_model_filepath == str(tmp_path / "optimized.onnx")
    providers = ["CPUExecutionProvider"]
    plain = onnxruntime.InferenceSession(options.optimized_model_filepath, providers=providers)
    expected = onnxruntime.InferenceSession(model.SerializeToString(), providers=providers).run(None, inputs)
    for output, other in zip(plain.run(None, inputs), expected, strict=True):
        np.testing.assert_array_equal(output, other)


def test_shared_object():
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda number: number + 1)
    address = ctypes.cast(function, ctypes.c_void_p).value
    library = ctypes.CDLL(shared_object.load_shared_object("plus_one", address))
    assert library.plus_one(41) == 42
    with pytest.raises(AttributeError):
        library.plus_two  # noqa: B018


@pytest.mark.parametrize("processor", shared_object._PROCESSORS.values())
def test_shared_object_of_every_processor(processor):
    """The headers of the file, and the address behind the code that jumps to it."""
    image = shared_object._image(processor, b"name", 0x1122334455667788)
    assert image[:6] == b"\x7fELF\x02\x01" and int.from_bytes(image[18:20], "little") == processor.machine
    end = image.index(processor.jump) + len(processor.jump)
    assert image[end : end + 8] == bytes.fromhex("8877665544332211")
    assert b"\0name\0" in image
