"""Whole models in ONNX Runtime with recurrent nodes on the fused operator, against ONNX Runtime alone."""

import gc
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from onnx import helper

import fusedrnn.onnx.ort.choosing
from fusedrnn.onnx import accelerate
from fusedrnn.onnx.ort import calibration, shared_object
from fusedrnn.onnx.ort.calibration import NodeTimes, Times, pays
from fusedrnn.onnx.ort.layer_runner import LayerRunner
from fusedrnn.onnx.ort.op_library import OpLibrary
from fusedrnn.onnx.ort.rewriting import RewritableModel
from fusedrnn.testing.tolerance import difference, tolerance
from onnx_networks import INT32, NETWORKS, gru_stack, model_of, normal, tensor, value, weights

pytestmark = pytest.mark.skipif(not shared_object.is_supported(), reason="no custom operators on this system")

LONGEST_SUM = 20
SHAPES = ((5, 2), (5, 2), (8, 2), (7, 2), (1, 2), (1, 1), (300, 1), (6, 3))
"""T and N of calls in a row: shapes that repeat, other lengths, one step, other batches."""


def plain(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def assert_equal(outputs, expected):
    """Both are within the tolerance of the exact result."""
    assert len(outputs) == len(expected)
    for output, other in zip(outputs, expected, strict=True):
        assert output.dtype == other.dtype
        rtol, atol = tolerance("float32", LONGEST_SUM, float(np.abs(other).max(initial=1)))
        assert not (text := difference(output, other, 2 * rtol, 2 * atol)), text


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, threads):
    model, feeds = NETWORKS[name]()
    content = model.SerializeToString()
    expected, session = plain(model), accelerate(model, replace="always", num_threads=threads)
    assert session.report.num_replaced == len(session.report.nodes) > 0
    for entries in ("get_inputs", "get_outputs"):
        names = [[entry.name for entry in getattr(each, entries)()] for each in (session, expected)]
        assert names[0] == names[1]
    for T, N in SHAPES:
        inputs = feeds(T, N)
        assert_equal(session.run(None, inputs), expected.run(None, inputs))
    last = session.get_outputs()[-1].name
    assert_equal(session.run([last], inputs), expected.run([last], inputs))
    assert model.SerializeToString() == content


def test_replaced_model():
    """Weights that nothing reads any more are gone, shapes of outputs are known."""
    model, _ = gru_stack()
    replaced = RewritableModel(model).replace([1], "domain", ["A"])
    assert [node.op_type for node in replaced.graph.node].count("GRU") == 1
    (node,) = (node for node in replaced.graph.node if node.domain == "domain")
    assert node.op_type == "A" and list(node.input) == ["x1", "lengths"] and list(node.output) == ["Y1", "h1"]
    assert [entry.name for entry in replaced.graph.initializer] == ["0W", "0R", "0B", "shape"]
    sizes = {entry.name: entry.type.tensor_type.shape.dim for entry in replaced.graph.value_info}
    assert [size.dim_value for size in sizes["Y1"]] == [0, 2, 0, 6]
    assert [size.dim_value for size in sizes["h1"]] == [2, 0, 6]


def test_quantized():
    """Bounds of DynamicQuantizeLSTM are those of test_onnx_quantized."""
    I, H = 6, 8
    W, R, B = (np.frombuffer(each.raw_data, np.float32).reshape(each.dims) for each in weights("LSTM", I, H))
    constants = [tensor("B", B), tensor("gain", normal(1))]
    for name, weight in (("W", W), ("R", R)):
        scale = np.abs(weight).max() / 63  # seven bits: other products of ONNX Runtime saturate on old processors
        constants += [
            tensor(name, np.ascontiguousarray(np.rint(weight / scale).astype(np.int8).swapaxes(1, 2))),
            tensor(f"{name}_scale", np.array([scale], np.float32)), tensor(f"{name}_zero", np.zeros(1, np.int8)),
        ]  # fmt: skip
    nodes = [
        helper.make_node("Mul", ["input", "gain"], ["X"]),
        helper.make_node(
            "DynamicQuantizeLSTM",
            ["X", "W", "R", "B", "", "", "", "", "W_scale", "W_zero", "R_scale", "R_zero"],
            ["Y", "Y_h"], hidden_size=H, domain="com.microsoft",
        ),
    ]  # fmt: skip
    inputs = [value("input", shape=["T", "N", I])]
    model = model_of(nodes, inputs, [value("Y"), value("Y_h")], constants, domains=["com.microsoft"])
    session, expected = accelerate(model, replace="always"), plain(model)
    assert [node.operator for node in session.report.nodes] == ["com.microsoft.DynamicQuantizeLSTM"]
    for _ in range(2):
        x = {"input": normal(4, 3, I)}
        for output, other in zip(session.run(None, x), expected.run(None, x), strict=True):
            np.testing.assert_allclose(output, other, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["W", "initial_h", "sequence_lens", "overridable", "layout", "alpha", "unknown"])
def test_what_is_left_to_onnxruntime(name):
    """A node that cannot be replaced stays, with the reason; others beside it do not."""
    initializers = [*weights("RNN", 4, 5, prefix="a"), *weights("RNN", 4, 5, prefix="b")]
    inputs, attributes = [value("X", shape=["T", "N", 4])], {"hidden_size": 5}
    names, reason = ["X", "aW", "aR", "aB", "", ""], None
    feeds = {"X": normal(3, 2, 4)}
    if name == "W":
        names[1], reason = "W", "depends on 'W', which is an input"
        inputs.append(value("W", shape=[1, 5, 4]))
        feeds["W"] = normal(1, 5, 4)
    elif name == "initial_h":  # may be an input
        names[5], feeds["h0"] = "h0", normal(1, 2, 5)
        inputs.append(value("h0"))
    elif name == "sequence_lens":
        names[4], feeds["lengths"] = "lengths", np.array([3, 1], np.int32)
        inputs.append(value("lengths", INT32))
    elif name == "overridable":
        reason = "depends on 'aR', which is an input"
        inputs.append(value("aR", shape=[1, 5, 5]))
    elif name == "alpha":
        attributes["activations"], reason = ["ThresholdedRelu"], "no activation_alpha"
    elif name == "layout":
        attributes["layout"], reason = 1, "layout"
    nodes = [
        helper.make_node("RNN", names, ["Y"], name="a", **attributes),
        helper.make_node("RNN", ["X", "bW", "bR", "bB"], ["Z"], name="b", hidden_size=5),
    ]
    domains = []
    if name == "unknown":
        nodes[0].op_type, nodes[0].domain, reason = "AttnLSTM", "com.microsoft", "AttnLSTM"
        domains = ["com.microsoft"]
    model = model_of(nodes, inputs, [value("Y"), value("Z")], initializers, domains=domains)
    if name in ("layout", "unknown"):  # which ONNX Runtime does not run
        rewritable = RewritableModel(model)
        assert reason in rewritable.nodes[0].reason and rewritable.nodes[1].layer is not None
        return
    session = accelerate(model, replace="always")
    first, second = session.report.nodes
    assert second.replaced and first.replaced is (reason is None)
    assert reason is None or reason in first.reason
    assert_equal(session.run(None, feeds), plain(model).run(None, feeds))
    if name == "overridable":
        feeds["aR"] = normal(1, 5, 5)
        assert_equal(session.run(None, feeds), plain(model).run(None, feeds))


def test_repeated_calls_do_not_enter_python(monkeypatch):
    """On one thread a call is machine code, also with other T; another N, one step or short sequences are not."""
    calls = []
    for name in ("check", "run"):
        method = getattr(LayerRunner, name)
        monkeypatch.setattr(
            LayerRunner, name, lambda *arguments, name=name, method=method: calls.append(name) or method(*arguments)
        )
    model, _ = gru_stack()
    session = accelerate(model, replace="always", num_threads=1)

    def calls_of(T, N, shortest=None):
        calls.clear()
        lengths = np.full(N, T, np.int32)
        lengths[0] = shortest or T
        session.run(None, {"X": normal(N, T, 4), "lengths": lengths})
        return calls[::2]  # of one layer

    assert calls_of(5, 2) == ["check"]
    assert calls_of(7, 2) == calls_of(600, 2) == calls_of(2, 2) == []
    assert calls_of(7, 2, shortest=3) == ["run"]
    assert calls_of(7, 3) == calls_of(1, 3) == ["check"]


def test_threads_call_one_session():
    model, feeds = gru_stack()
    session, expected = accelerate(model, replace="always", num_threads=1), plain(model)
    calls = [feeds(T, N) for T, N in SHAPES]
    results = [expected.run(None, call) for call in calls]
    errors = []

    def work(first):
        try:
            for number in range(40):
                index = (first + number) % len(calls)
                assert_equal(session.run(None, calls[index]), results[index])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_memory_goes_with_the_session():
    model, feeds = gru_stack()
    runners = []
    original = LayerRunner.__init__

    def note(self, *arguments):
        runners.append(weakref.ref(self))
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerRunner, "__init__", note)
        session = accelerate(model, replace="always")
    inner = session.session
    del session
    gc.collect()
    assert inner.run(None, feeds(5, 2)) and all(runner() is not None for runner in runners)
    del inner
    gc.collect()
    assert len(runners) == 2 and all(runner() is None for runner in runners)


def test_what_a_session_gave_out_may_outlive_it():
    """ONNX Runtime's own session lives as long as its inputs do, and its end still calls the operators."""
    model, feeds = gru_stack()
    structs = []
    original = OpLibrary._operator

    def operator(self, *arguments):
        struct = original(self, *arguments)
        structs.append(weakref.ref(struct))
        return struct

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpLibrary, "_operator", operator)
        session = accelerate(model, replace="always")
    session.run(None, feeds(5, 2))
    inputs, binding = session.get_inputs(), session.session.io_binding()
    del session
    gc.collect()
    assert len(structs) == 2 and all(struct() is not None for struct in structs)
    del inputs, binding
    gc.collect()


# ---- choosing


def test_measured():
    """Whatever is chosen, the results are those of ONNX Runtime, and the report has the times of all nodes."""
    model, feeds = NETWORKS["conv_lstm_in_if"]()
    several = [feeds(40, 1), feeds(41, 1)]  # one for each branch
    session = accelerate(model, feeds=several, calibration_seconds=0.05, num_threads=1)
    for each in several:
        assert_equal(session.run(None, each), plain(model).run(None, each))
    report = session.report
    assert len(report.nodes) == 2 and all(node.in_body for node in report.nodes)
    assert all(min(node.seconds) > 0 and node.sizes == (6, 8, 1) for node in report.nodes)
    assert 0 < report.recurrent_share <= 1 and min(report.seconds) > 0
    assert all(node.name in str(report) for node in report.nodes)


@pytest.mark.parametrize("after", [0.5, 0.97, 0.99, 1.5])
def test_a_model_is_replaced_where_that_pays(after, monkeypatch):
    model, feeds = gru_stack()
    monkeypatch.setattr(
        fusedrnn.onnx.ort.choosing, "measure_nodes",
        lambda *arguments: {0: NodeTimes(0.2, 0.1, 1), 1: NodeTimes(0.2, 0.3, 1)},
    )  # fmt: skip
    monkeypatch.setattr(
        fusedrnn.onnx.ort.choosing,
        "compare",
        lambda *arguments: [Times(1.0, 0.9, 1.0), Times(after, 0.9 * after, after)],
    )
    report = accelerate(model, feeds=feeds(5, 2)).report
    first, second = report.nodes
    assert (first.replaced, second.replaced) == (after <= 0.97, False)
    assert (
        "slower" in second.reason
        and report.recurrent_share == pytest.approx(0.4 / 0.9)
        and report.seconds == (1.0, after)
    )


@pytest.mark.parametrize(
    ("after", "saved", "expected"),
    [((0.9, 0.9), 0.1, True), ((0.9, 0.99), 0.1, False), ((0.99, 0.9), 0.1, False), ((0.9, 0.9), 0.01, False)],
)
def test_what_pays(after, saved, expected):
    """Two sessions that differ by chance do not."""
    relative, fastest = after
    assert pays(Times(1.0, 1.0, 1.0), Times(1.0, fastest, relative), saved) is expected


def test_a_branch_that_is_not_run_is_like_one_that_is(monkeypatch):
    model, feeds = NETWORKS["conv_lstm_in_if"]()
    measured = {1: NodeTimes(0.2, 0.1, 1)}
    monkeypatch.setattr(fusedrnn.onnx.ort.choosing, "measure_nodes", lambda *arguments: measured)
    monkeypatch.setattr(
        fusedrnn.onnx.ort.choosing, "compare", lambda *arguments: [Times(1.0, 1.0, 1.0), Times(0.5, 0.5, 0.5)]
    )
    first, second = accelerate(model, feeds=feeds(5, 2)).report.nodes
    assert first.replaced and second.replaced and second.name in first.reason


def test_examples_of_inputs():
    """Sizes that the model does not tell are tried; where it does not run on them, it is left alone."""
    nodes = [
        helper.make_node("Unsqueeze", ["X", "one"], ["x"]),
        helper.make_node("RNN", ["x", "W", "R", "B"], ["Y"], hidden_size=5),
    ]
    constants = [*weights("RNN", 4, 5), tensor("one", np.array([1]))]
    model = model_of(nodes, [value("X", shape=["T", "features"])], [value("Y")], constants)
    assert accelerate(model, calibration_seconds=0.01).report.seconds is not None
    nodes[0] = helper.make_node("Reshape", ["X", "shape"], ["x"])
    model = model_of(
        nodes, [value("X", shape=["all"])], [value("Y")], [*constants, tensor("shape", np.array([7, 3, 4]))]
    )
    report = accelerate(model, calibration_seconds=0.01).report
    assert report.num_replaced == 0 and "pass feeds" in report.reason and "not measured" in report.nodes[0].reason


def test_a_model_whose_nodes_cannot_be_measured_is_left():
    """ONNX Runtime runs sequences without steps, though its final states are undefined then."""
    model, _ = NETWORKS["lstm_variants"]()
    feeds = {"X": normal(0, 2, 4)}
    session = accelerate(model, feeds=feeds)
    assert "X must have shape" in session.report.reason and session.report.num_replaced == 0
    assert session.run(["b"], feeds)[0].shape == (0, 1, 2, 5)


@pytest.mark.parametrize("method", ["replaced", "plain"])
def test_errors_without_a_message(method, monkeypatch):
    model, feeds = NETWORKS["conv_lstm_in_if"]()

    def fail(*arguments):
        raise MemoryError

    if method == "replaced":
        monkeypatch.setattr(fusedrnn.onnx.ort.choosing, "measure_nodes", fail)
        assert "MemoryError" in accelerate(model, feeds=feeds(5, 2)).report.reason
    else:
        monkeypatch.setattr(onnxruntime.InferenceSession, "run", fail)
        assert "pass feeds" in accelerate(model).report.reason


def test_times_of_several_feeds_are_sums():
    """The first two runs of each do not count, nor a run without the node."""
    runs = [{0: 0.1}, {0: 0.1, 1: 0.1}] * 2 + [{0: 2.0}, {0: 5.0, 1: 7.0}, {0: 9.0}, {0: 4.0, 1: 8.0}, {0: 1.0}, {}]
    assert calibration._fastest(runs, 2) == {0: 5.0, 1: 7.0}


def test_measuring_ends():
    """Even if one run takes longer than all should."""
    assert len([*calibration._rounds(0.0)]) == 1
    assert len([*calibration._rounds(1e9, most=9)]) == 9
    sessions = [SimpleNamespace(run=lambda *arguments: time.sleep(0.001))] * 2
    for times in calibration.compare(sessions, [{}, {}], 0.0):
        assert times.fastest >= 0.002 and times.relative > 0


def test_models_without_recurrent_nodes():
    model = model_of([helper.make_node("Relu", ["X"], ["Y"])], [value("X", shape=[3])], [value("Y")])
    session = accelerate(model, replace="always")
    assert session.report.nodes == () and "no recurrent node" in str(session.report)
    assert session.run(None, {"X": np.float32([-1, 0, 2])})[0].tolist() == [0, 0, 2]


def test_other_systems(monkeypatch):
    model, feeds = gru_stack()
    monkeypatch.setattr(shared_object, "is_supported", lambda: False)
    assert "Linux" in accelerate(model, feeds=feeds(5, 2)).report.reason
    with pytest.raises(NotImplementedError, match="Linux"):
        accelerate(model, replace="always")
