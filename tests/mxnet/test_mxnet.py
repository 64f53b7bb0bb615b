"""MXNet's operator as a function: every option, gradients against the oracles, requests, errors by MXNet's names."""

from itertools import product

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNSpec
from fusedrnn import mxnet as mx
from fusedrnn.spec import MODES
from oracles import expected_dropout, expected_training, training_problem
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, problem_of
from variants import variant_results

pytestmark = pytest.mark.usefixtures("poisoned")

PLAIN = Shape(5, 3, 7, 11, layers=3, bidirectional=True)
PADDED = Shape(6, 5, 7, 11, layers=3, bidirectional=True, lengths="edges")
OPTIONS = {
    "projection": {"projection_size": 4},
    "clip": {"state_clip_min": -0.3, "state_clip_max": 0.2},
    "clip-nan": {"state_clip_min": -0.25, "state_clip_max": 0.25, "state_clip_nan": True},
    "projection-clip": {"projection_size": 3, "state_clip_min": -0.1, "state_clip_max": 0.2},
}
REQUESTS = ("write", "add", "null")


@pytest.fixture(params=["default", "reference"])
def backend(request):
    return None if request.param == "default" else request.param


def problem_with(option, shape, dtype="float32"):
    spec = RNNSpec("lstm", shape.I, shape.H, shape.layers, shape.bidirectional, dtype=dtype, **OPTIONS[option])
    return problem_of(spec, shape)


def arguments(problem, backend=None):
    """A problem as arguments of MXNet's operator."""
    spec = problem.spec
    given = {"data": problem.x, "parameters": problem.params, "state": problem.states[0]}
    if len(problem.states) == 2:
        given["state_cell"] = problem.states[1]
    if problem.lengths is not None:
        given |= {"sequence_length": problem.lengths, "use_sequence_length": True}
    for end in ("min", "max", "nan"):
        given[f"lstm_state_clip_{end}"] = getattr(spec, f"state_clip_{end}")
    return given | {
        "state_size": spec.hidden_size, "num_layers": spec.num_layers, "mode": spec.mode,
        "bidirectional": spec.bidirectional, "p": spec.dropout, "projection_size": spec.projection_size,
        "state_outputs": True, "backend": backend,
    }  # fmt: skip


def gradients_of(backward, problem, **options):
    """As the tests compare them."""
    found = backward((problem.dy, *problem.dstates), **options)
    assert list(found) == list(backward.arguments)
    dx, dparams, *dstates = found.values()
    return dx, dparams, tuple(dstates)


def check(problem, oracle, backend):
    """Inference, training and gradients."""
    shape, spec = problem.x.shape[:2], problem.spec
    given = arguments(problem, backend)
    before = [array.copy() for array in problem.arrays]
    y, *final = mx.nd.RNN(**given)
    assert_close((y, tuple(final)), oracle.forward, spec.dtype, spec)
    outputs, backward = mx.nd.train_rnn(**given)
    assert_same_bits(outputs, (y, *final))
    assert_gradients_close(gradients_of(backward, problem), oracle.gradients, spec.dtype, spec, *shape)
    for array, content in zip(problem.arrays, before, strict=True):
        np.testing.assert_array_equal(array, content)


@pytest.mark.parametrize("shape", [PLAIN, PADDED], ids=["full", "lengths"])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, shape, backend):
    by_torch, by_reference = expected_training(mode, shape)
    for oracle in (by_torch["nothing"], by_reference):
        check(training_problem(mode, shape), oracle, backend)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [Shape(4, 2, 3, 5), PLAIN, PADDED], ids=["one", "full", "lengths"])
@pytest.mark.parametrize("option", OPTIONS)
def test_lstm_options(option, shape, dtype, backend):
    problem = problem_with(option, shape, dtype)
    check(problem, variant_results(problem), backend)


def test_names():
    assert fusedrnn.rnn is mx.nd.rnn is mx.nd.RNN
    assert mx.rnn.LSTMCell is fusedrnn.LSTMCell


def test_positions_are_those_of_mxnet():
    problem = training_problem("lstm", PADDED)
    given = arguments(problem)
    named = mx.nd.RNN(**given)
    positions = [given.pop(name) for name in ("data", "parameters", "state", "state_cell", "sequence_length")]
    assert_same_bits(mx.nd.RNN(*positions, **given), named)


def test_output_alone():
    problem = training_problem("lstm", PLAIN)
    given = arguments(problem) | {"state_outputs": False}
    y = mx.nd.RNN(**given)
    assert_same_bits(y, mx.nd.RNN(**given | {"state_outputs": True})[0])
    output, backward = mx.nd.train_rnn(**given)
    assert_same_bits(output, y)
    oracle = expected_training("lstm", PLAIN)[0]["dstates"]
    dx, dparams, *dstates = backward(problem.dy).values()
    found = dx, dparams, tuple(dstates)
    assert_gradients_close(found, oracle.gradients, "float32", problem.spec, PLAIN.T, PLAIN.N)


@pytest.mark.parametrize("absent", ["dy", "dstates", "dh_n", "dc_n"])
def test_absent_gradients_are_zeros(absent):
    problem = training_problem("lstm", PLAIN)
    _, backward = mx.nd.train_rnn(**arguments(problem))
    missing = {"dy": (0,), "dstates": (1, 2), "dh_n": (1,), "dc_n": (2,)}[absent]
    given = [None if place in missing else one for place, one in enumerate((problem.dy, *problem.dstates))]
    dx, dparams, *dstates = backward(given).values()
    oracle = expected_training("lstm", PLAIN)[0][absent]
    found = dx, dparams, tuple(dstates)
    assert_gradients_close(found, oracle.gradients, "float32", problem.spec, PLAIN.T, PLAIN.N)


def test_no_gradients_at_all():
    problem = training_problem("gru", PLAIN)
    _, backward = mx.nd.train_rnn(**arguments(problem))
    assert not any(one.any() for one in backward(None).values())


@pytest.mark.parametrize("requests", list(product(REQUESTS, repeat=4)), ids="-".join)
def test_requests(requests, backend):
    """Every combination: what is written is right, what is added lies on what was there, and null is nothing."""
    problem = training_problem("lstm", Shape(3, 2, 5, 4, layers=2))
    oracle = expected_training("lstm", Shape(3, 2, 5, 4, layers=2))[1]
    dx, dparams, dstates = oracle.gradients
    _, backward = mx.nd.train_rnn(**arguments(problem, backend))
    rng = np.random.default_rng(0)
    buffers, wanted = {}, []
    for name, request, gradient in zip(backward.arguments, requests, (dx, dparams, *dstates), strict=True):
        held = rng.standard_normal(gradient.shape)
        wanted.append({"write": gradient, "add": held + gradient, "null": np.zeros_like(gradient)}[request])
        if request != "null":
            buffers[name] = held.astype(np.float32)
    asked = dict(zip(backward.arguments, requests, strict=True))
    found = backward((problem.dy, *problem.dstates), asked, buffers)
    assert found.keys() == buffers.keys()
    for name, buffer in buffers.items():
        assert found[name] is buffer
    everything = [found.get(name, np.zeros(one.shape, np.float32)) for name, one in zip(asked, wanted, strict=True)]
    assert_gradients_close(
        (*everything[:2], tuple(everything[2:])), (*wanted[:2], tuple(wanted[2:])), "float32", problem.spec, 3, 2
    )


def test_requests_in_other_forms():
    """A list goes by position; what a dict does not name is not wanted, as in MXNet's bind."""
    problem = training_problem("gru", PLAIN)
    _, backward = mx.nd.train_rnn(**arguments(problem))
    given = problem.dy, *problem.dstates
    everything = backward(given)
    assert list(everything) == ["data", "parameters", "state"]
    some = backward(given, ["write", "null", "write"])
    assert list(some) == ["data", "state"]
    assert list(backward(given, {"parameters": "write"})) == ["parameters"]
    assert backward(given, "null") == {}
    buffers = [np.zeros_like(one) for one in everything.values()]
    added = backward(given, "add", buffers)
    for name, one in everything.items():
        np.testing.assert_array_equal(added[name], one)
        if name in some:
            assert_same_bits(some[name], one)
    mixed = backward(given, args_grad=[None, buffers[1], None])
    assert mixed["parameters"] is buffers[1]
    assert_same_bits(mixed["state"], everything["state"])


def test_one_of_two_states_has_a_buffer():
    problem = training_problem("lstm", PLAIN)
    _, backward = mx.nd.train_rnn(**arguments(problem))
    given = problem.dy, *problem.dstates
    everything, buffer = backward(given), np.empty_like(problem.states[1])
    found = backward(given, args_grad={"state_cell": buffer})
    assert found["state_cell"] is buffer
    for name, one in everything.items():
        assert_same_bits(found[name], one)


def test_later_changes_do_not_matter():
    problem = training_problem("lstm", PLAIN)
    given = arguments(problem)
    _, backward = mx.nd.train_rnn(**given)
    once = backward((problem.dy, *problem.dstates))
    changed = {name: one.copy() if isinstance(one, np.ndarray) else one for name, one in given.items()}
    _, backward = mx.nd.train_rnn(**changed)
    for name in ("data", "parameters", "state", "state_cell"):
        changed[name][...] = np.nan
    for name, one in backward((problem.dy, *problem.dstates)).items():
        assert_same_bits(one, once[name])


@pytest.mark.parametrize("mode", MODES)
def test_dropout_drops_in_training_alone(mode, backend):
    problem, seed, oracle = expected_dropout(mode, PADDED)
    given = arguments(problem, backend)
    assert_same_bits(mx.nd.RNN(**given), mx.nd.RNN(**given | {"p": 0.0}))
    (y, *final), backward = mx.nd.train_rnn(**given, seed=seed)
    assert backward.seed == seed
    assert_close((y, tuple(final)), oracle.forward, "float32", problem.spec)
    found = gradients_of(backward, problem)
    assert_gradients_close(found, oracle.gradients, "float32", problem.spec, PADDED.T, PADDED.N)


def test_a_new_seed_each_time():
    problem, _, _ = expected_dropout("gru", PLAIN)
    given = arguments(problem)
    (one, first), (other, second) = mx.nd.train_rnn(**given), mx.nd.train_rnn(**given)
    assert first.seed != second.seed
    assert not np.array_equal(one[0], other[0])
    again, _ = mx.nd.train_rnn(**given, seed=first.seed)
    assert_same_bits(again, one)


def test_nan_in_a_state():
    """Replaced by the lower bound if asked, with no gradient through it; else it stays, in its own sequence."""
    shape = Shape(3, 2, 3, 4)
    for option, stays in (("clip", True), ("clip-nan", False)):
        problem = problem_with(option, shape)
        problem.states[1][0, 0, 1] = np.nan
        (y, _, c_n), backward = mx.nd.train_rnn(**arguments(problem, "reference"))
        assert np.isnan(c_n[0, 0]).any() == stays
        assert not np.isnan(y[:, 1]).any()
        if not stays:
            found = backward((problem.dy, *problem.dstates))
            assert found["state_cell"][0, 0, 1] == 0
            assert not np.isnan(found["data"][:, 1]).any()


class TestErrors:
    """By MXNet's names."""

    problem = training_problem("lstm", Shape(4, 3, 5, 6))

    @property
    def backward(self):
        return mx.nd.train_rnn(**arguments(self.problem))[1]

    @property
    def given(self):
        return self.problem.dy, *self.problem.dstates

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"projection_size": 6}, ValueError, r"projection_size must be smaller than state_size \(6\); got 6"),
            ({"projection_size": 2}, ValueError, r"parameters must have shape \(\d+,\)"),
            ({"projection_size": 2.0}, TypeError, "projection_size must be an integer"),
            ({"lstm_state_clip_min": 1}, ValueError, "lstm_state_clip_max must be given when the other bound is"),
            ({"lstm_state_clip_nan": True}, ValueError, "lstm_state_clip_nan needs lstm_state_clip_min and"),
            ({"lstm_state_clip_min": 1, "lstm_state_clip_max": 0}, ValueError, "lstm_state_clip_min must not exceed"),
            ({"state": np.zeros((2, 3, 6), "f4")}, ValueError, r"state must have shape \(1, 3, 6\); got \(2, 3, 6\)"),
            ({"backend": "none"}, ValueError, "backend must be one of"),
            ({"seed": -1}, ValueError, "seed must be from 0"),
            ({"state_size": None}, TypeError, "state_size must be an integer"),
            ({"sequence_length": np.array([1.0, 2, 3]), "use_sequence_length": True}, TypeError,
             "sequence_length must be integers; got float64"),
        ],
    )  # fmt: skip
    def test_of_the_call(self, changes, error, message):
        with pytest.raises(error, match=f"^{message}"):
            mx.nd.train_rnn(**{**arguments(self.problem, "reference"), **changes})

    def test_projection_of_what_is_no_lstm(self):
        given = arguments(training_problem("gru", Shape(4, 3, 5, 6)), "reference")
        with pytest.raises(ValueError, match=r"^projection_size needs mode 'lstm'; got . in mode 'gru'"):
            mx.nd.RNN(**given | {"projection_size": 2})
        with pytest.raises(ValueError, match=r"^lstm_state_clip_min needs mode 'lstm'"):
            mx.nd.RNN(**given | {"lstm_state_clip_min": -1, "lstm_state_clip_max": 1})

    @pytest.mark.parametrize(
        ("out_grads", "error", "message"),
        [
            (lambda g: g[0], TypeError, "out_grads must be a sequence of 3: those of the output, state, state_cell"),
            (lambda g: g[:2], ValueError, "out_grads must be a sequence of 3.*got 2"),
            (lambda g: (g[0][1:], *g[1:]), ValueError, r"out_grads\[0\] must have shape \(4, 3, 6\); got \(3, 3, 6\)"),
            (lambda g: (g[0], g[1][:, 1:], g[2]), ValueError, r"out_grads\[1\] must have shape \(1, 3, 6\)"),
            (lambda g: (*g[:2], g[2].tolist()), TypeError, r"out_grads\[2\] must be a NumPy array; got list"),
            (lambda g: (*g[:2], g[2].astype("f8")), TypeError, r"out_grads\[2\] must have dtype float32; got float64"),
        ],
    )
    def test_of_out_grads(self, out_grads, error, message):
        with pytest.raises(error, match=f"^{message}"):
            self.backward(out_grads(self.given))

    def test_of_a_single_out_grad(self):
        _, backward = mx.nd.train_rnn(**arguments(self.problem) | {"state_outputs": False})
        with pytest.raises(ValueError, match=r"^out_grads must have shape \(4, 3, 6\); got \(3, 3, 6\)"):
            backward(self.problem.dy[1:])
        with pytest.raises(TypeError, match=r"^out_grads must be a NumPy array; got tuple"):
            backward(self.given)

    @pytest.mark.parametrize(
        ("request_", "error", "message"),
        [
            ("wrote", ValueError, "grad_req must be one of write, add, null; got 'wrote'"),
            (None, TypeError, "grad_req must be one of write, add, null, or a list or a dict of one for each of data"),
            (["write"], ValueError, "grad_req must be .*one for each of data, parameters, state, state_cell; got 1"),
            ({"x": "write"}, ValueError, "grad_req must have keys among data, parameters, state, state_cell; got 'x'"),
            ({"sequence_length": "null"}, ValueError, "grad_req must have keys among .*; got 'sequence_length'"),
            ({"state": 1}, TypeError, "grad_req: state must be one of write, add, null; got 1"),
            ({"state_cell": "Add"}, ValueError, "grad_req: state_cell must be one of write, add, null; got 'Add'"),
            ("add", ValueError, "args_grad: data must be given where grad_req is 'add'; got None"),
        ],
    )
    def test_of_requests(self, request_, error, message):
        with pytest.raises(error, match=f"^{message}"):
            self.backward(self.given, request_)

    @pytest.mark.parametrize("mixed", [False, True])
    @pytest.mark.parametrize(
        ("name", "buffer", "error", "message"),
        [
            ("data", np.zeros((4, 3, 6), "f4"), ValueError, r"must have shape \(4, 3, 5\)"),
            ("parameters", np.zeros(7, "f4"), ValueError, "must have shape"),
            ("state", np.zeros((1, 3, 5), "f4"), ValueError, r"must have shape \(1, 3, 6\); got \(1, 3, 5\)"),
            ("state", [0.0], TypeError, "must be a NumPy array; got list"),
            ("state_cell", np.zeros((1, 3, 6)), TypeError, "must have dtype float32; got float64"),
            ("state_cell", np.zeros((1, 6, 6), "f4")[:, ::2], ValueError, "must be contiguous"),
            ("state_cell", np.broadcast_to(np.zeros(6, "f4"), (1, 3, 6)), ValueError, "must be writable"),
        ],
    )
    def test_of_buffers(self, name, buffer, error, message, mixed):
        asked = dict.fromkeys(self.backward.arguments, "write")
        if mixed:
            asked |= {"state": "add"} if name != "state" else {"state_cell": "null"}
        buffers = {name: buffer}
        if mixed and name == "state_cell":
            buffers["state"] = np.zeros((1, 3, 6), "f4")
        elif mixed and name != "state":
            asked["state"] = "null"
        elif not mixed and name.startswith("state"):
            buffers = {"state": np.zeros((1, 3, 6), "f4"), "state_cell": np.zeros((1, 3, 6), "f4")} | buffers
        with pytest.raises(error, match=f"^args_grad: {name} {message}"):
            self.backward(self.given, asked, buffers)

    def test_of_buffers_that_nobody_asked_for(self):
        with pytest.raises(ValueError, match=r"^args_grad: data must be None where grad_req is 'null'; got ndarray"):
            self.backward(self.given, "null", {"data": np.empty_like(self.problem.x)})
        with pytest.raises(ValueError, match=r"^args_grad must have keys among data, .*got 'dx'"):
            self.backward(self.given, args_grad={"dx": None})
        with pytest.raises(TypeError, match=r"^args_grad must be None, or a list or a dict"):
            self.backward(self.given, args_grad=np.empty(3))

    @pytest.mark.parametrize("asked", ["write", {"state": "write", "state_cell": "add"}])
    def test_of_shared_memory(self, asked):
        one = np.zeros((1, 3, 6), np.float32)
        with pytest.raises(ValueError, match=r"^args_grad: state_cell must not share memory with args_grad: state"):
            self.backward(self.given, asked, {"state": one, "state_cell": one})
        with pytest.raises(ValueError, match=r"^args_grad: state must not share memory with out_grads"):
            self.backward(self.given, asked, {"state": self.given[1], "state_cell": one})

    def test_data_and_parameters_share_memory_with_a_state(self):
        memory = np.zeros((1, 3, 6), np.float32)
        asked = {"data": "write", "state": "write", "state_cell": "add"}
        small = training_problem("lstm", Shape(1, 3, 6, 6))
        backward = mx.nd.train_rnn(**arguments(small))[1]
        buffers = {"data": memory, "state": memory, "state_cell": np.zeros((1, 3, 6), np.float32)}
        with pytest.raises(ValueError, match=r"^args_grad: state must not share memory with args_grad: data"):
            backward((small.dy, *small.dstates), asked, buffers)
