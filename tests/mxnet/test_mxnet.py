"""MXNet's operator as a function: every option, gradients against the oracles, requests."""

from itertools import product

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNSpec
from fusedrnn import mxnet as mx
from fusedrnn.spec import MODES
from mxnet_calls import arguments
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


def gradients_of(backward, problem, **options):
    """The gradients in the order of RNNOp.backward."""
    grads_by_name = backward((problem.dy, *problem.dstates), **options)
    assert list(grads_by_name) == list(backward.arguments)
    dx, dparams, *dstates = grads_by_name.values()
    return dx, dparams, tuple(dstates)


def check(problem, oracle, backend):
    """Inference, training and gradients."""
    shape, spec = problem.x.shape[:2], problem.spec
    kwargs = arguments(problem, backend)
    before = [array.copy() for array in problem.arrays]
    y, *final = mx.nd.RNN(**kwargs)
    assert_close((y, tuple(final)), oracle.forward, spec.dtype, spec)
    outputs, backward = mx.nd.train_rnn(**kwargs)
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


@pytest.mark.each_value
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
    kwargs = arguments(problem)
    named = mx.nd.RNN(**kwargs)
    positions = [kwargs.pop(name) for name in ("data", "parameters", "state", "state_cell", "sequence_length")]
    assert_same_bits(mx.nd.RNN(*positions, **kwargs), named)


def test_without_state_outputs():
    problem = training_problem("lstm", PLAIN)
    kwargs = arguments(problem) | {"state_outputs": False}
    y = mx.nd.RNN(**kwargs)
    assert_same_bits(y, mx.nd.RNN(**kwargs | {"state_outputs": True})[0])
    output, backward = mx.nd.train_rnn(**kwargs)
    assert_same_bits(output, y)
    oracle = expected_training("lstm", PLAIN)[0]["dstates"]
    dx, dparams, *dstates = backward(problem.dy).values()
    gradients = dx, dparams, tuple(dstates)
    assert_gradients_close(gradients, oracle.gradients, "float32", problem.spec, PLAIN.T, PLAIN.N)


@pytest.mark.parametrize("absent", ["dy", "dstates", "dh_n", "dc_n"])
def test_absent_gradients_are_zeros(absent):
    problem = training_problem("lstm", PLAIN)
    _, backward = mx.nd.train_rnn(**arguments(problem))
    missing = {"dy": (0,), "dstates": (1, 2), "dh_n": (1,), "dc_n": (2,)}[absent]
    out_grads = [None if i in missing else grad for i, grad in enumerate((problem.dy, *problem.dstates))]
    dx, dparams, *dstates = backward(out_grads).values()
    oracle = expected_training("lstm", PLAIN)[0][absent]
    gradients = dx, dparams, tuple(dstates)
    assert_gradients_close(gradients, oracle.gradients, "float32", problem.spec, PLAIN.T, PLAIN.N)


def test_out_grads_may_be_none():
    problem = training_problem("gru", PLAIN)
    _, backward = mx.nd.train_rnn(**arguments(problem))
    assert not any(gradient.any() for gradient in backward(None).values())


@pytest.mark.parametrize("requests", list(product(REQUESTS, repeat=4)), ids="-".join)
def test_requests(requests, backend):
    """All combinations of write, add to the buffer's content, and null."""
    problem = training_problem("lstm", Shape(3, 2, 5, 4, layers=2))
    oracle = expected_training("lstm", Shape(3, 2, 5, 4, layers=2))[1]
    dx, dparams, dstates = oracle.gradients
    _, backward = mx.nd.train_rnn(**arguments(problem, backend))
    rng = np.random.default_rng(0)
    buffers, expected = {}, []
    for name, request, gradient in zip(backward.arguments, requests, (dx, dparams, *dstates), strict=True):
        content = rng.standard_normal(gradient.shape)
        expected.append({"write": gradient, "add": content + gradient, "null": np.zeros_like(gradient)}[request])
        if request != "null":
            buffers[name] = content.astype(np.float32)
    grad_reqs = dict(zip(backward.arguments, requests, strict=True))
    gradients = backward((problem.dy, *problem.dstates), grad_reqs, buffers)
    assert gradients.keys() == buffers.keys()
    for name, buffer in buffers.items():
        assert gradients[name] is buffer
    actual = [gradients.get(name, np.zeros(e.shape, np.float32)) for name, e in zip(grad_reqs, expected, strict=True)]
    assert_gradients_close(
        (*actual[:2], tuple(actual[2:])), (*expected[:2], tuple(expected[2:])), "float32", problem.spec, 3, 2
    )


def test_requests_as_list_and_dict():
    """A list is in the order of the arguments; a name that a dict lacks means null, as in MXNet's bind."""
    problem = training_problem("gru", PLAIN)
    _, backward = mx.nd.train_rnn(**arguments(problem))
    out_grads = problem.dy, *problem.dstates
    all_gradients = backward(out_grads)
    assert list(all_gradients) == ["data", "parameters", "state"]
    some = backward(out_grads, ["write", "null", "write"])
    assert list(some) == ["data", "state"]
    assert list(backward(out_grads, {"parameters": "write"})) == ["parameters"]
    assert backward(out_grads, "null") == {}
    buffers = [np.zeros_like(gradient) for gradient in all_gradients.values()]
    added = backward(out_grads, "add", buffers)
    for name, gradient in all_gradients.items():
        np.testing.assert_array_equal(added[name], gradient)
        if name in some:
            assert_same_bits(some[name], gradient)
    mixed = backward(out_grads, args_grad=[None, buffers[1], None])
    assert mixed["parameters"] is buffers[1]
    assert_same_bits(mixed["state"], all_gradients["state"])


def test_one_of_two_states_has_a_buffer():
    problem = training_problem("lstm", PLAIN)
    _, backward = mx.nd.train_rnn(**arguments(problem))
    out_grads = problem.dy, *problem.dstates
    all_gradients, buffer = backward(out_grads), np.empty_like(problem.states[1])
    gradients = backward(out_grads, args_grad={"state_cell": buffer})
    assert gradients["state_cell"] is buffer
    for name, gradient in all_gradients.items():
        assert_same_bits(gradients[name], gradient)


def test_later_changes_do_not_matter():
    problem = training_problem("lstm", PLAIN)
    kwargs = arguments(problem)
    _, backward = mx.nd.train_rnn(**kwargs)
    expected = backward((problem.dy, *problem.dstates))
    changed = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in kwargs.items()}
    _, backward = mx.nd.train_rnn(**changed)
    for name in ("data", "parameters", "state", "state_cell"):
        changed[name][...] = np.nan
    for name, gradient in backward((problem.dy, *problem.dstates)).items():
        assert_same_bits(gradient, expected[name])


@pytest.mark.parametrize("mode", MODES)
def test_dropout_only_in_training(mode, backend):
    problem, seed, oracle = expected_dropout(mode, PADDED)
    kwargs = arguments(problem, backend)
    assert_same_bits(mx.nd.RNN(**kwargs), mx.nd.RNN(**kwargs | {"p": 0.0}))
    (y, *final), backward = mx.nd.train_rnn(**kwargs, seed=seed)
    assert backward.seed == seed
    assert_close((y, tuple(final)), oracle.forward, "float32", problem.spec)
    gradients = gradients_of(backward, problem)
    assert_gradients_close(gradients, oracle.gradients, "float32", problem.spec, PADDED.T, PADDED.N)


def test_calls_draw_new_seeds():
    problem, _, _ = expected_dropout("gru", PLAIN)
    kwargs = arguments(problem)
    (first, first_backward), (second, second_backward) = mx.nd.train_rnn(**kwargs), mx.nd.train_rnn(**kwargs)
    assert first_backward.seed != second_backward.seed
    assert not np.array_equal(first[0], second[0])
    again, _ = mx.nd.train_rnn(**kwargs, seed=first_backward.seed)
    assert_same_bits(again, first)


def test_nan_in_a_state():
    """``lstm_state_clip_nan`` replaces it by the lower bound, without gradient; else it stays in its sequence."""
    shape = Shape(3, 2, 3, 4)
    for option, stays in (("clip", True), ("clip-nan", False)):
        problem = problem_with(option, shape)
        problem.states[1][0, 0, 1] = np.nan
        (y, _, c_n), backward = mx.nd.train_rnn(**arguments(problem, "reference"))
        assert np.isnan(c_n[0, 0]).any() == stays
        assert not np.isnan(y[:, 1]).any()
        if not stays:
            gradients = backward((problem.dy, *problem.dstates))
            assert gradients["state_cell"][0, 0, 1] == 0
            assert not np.isnan(gradients["data"][:, 1]).any()
