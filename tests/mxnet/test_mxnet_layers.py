"""Layers shaped like those of MXNet's gluon.rnn: arguments, states, layouts, dropout, errors."""

from dataclasses import replace

import numpy as np
import pytest

from fusedrnn import RNNSpec
from fusedrnn.spec import MODES
from mxnet_calls import GRU, LAYOUTS, LSTM, RNN, flat_gradients, layer_of, to_layout
from oracles import expected_dropout, expected_training, training_problem
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, problem_of
from variants import variant_results

pytestmark = pytest.mark.usefixtures("poisoned")

DEEP = Shape(5, 3, 7, 11, layers=3, bidirectional=True)
PADDED = Shape(6, 5, 7, 11, layers=3, bidirectional=True, lengths="edges")


@pytest.fixture(params=["default", "reference"])
def backend(request):
    return None if request.param == "default" else request.param


def check(problem, oracle, layout, backend, **options):
    """Inference, training and gradients, with states."""
    spec, (T, N) = problem.spec, problem.x.shape[:2]
    layer = layer_of(problem, layout, backend, **options)
    x, states = to_layout(problem.x, layout), list(problem.states)
    y, final = layer(x, states, problem.lengths)
    assert y.flags.c_contiguous
    assert_close((to_layout(y, layout), tuple(final)), oracle.forward, spec.dtype, spec)
    (trained, after), backward = layer.train(x, states, problem.lengths)
    assert_same_bits((trained, after), (y, final))
    grads_by_name = backward((to_layout(problem.dy, layout), list(problem.dstates)))
    assert list(grads_by_name) == list(backward.arguments) == ["data", "state", "state_cell"][: 1 + len(states)]
    dx, *dstates = grads_by_name.values()
    gradients = to_layout(dx, layout), flat_gradients(layer, spec), tuple(dstates)
    assert_gradients_close(gradients, oracle.gradients, spec.dtype, spec, T, N)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [DEEP, PADDED], ids=["full", "lengths"])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, shape, layout, backend):
    check(training_problem(mode, shape), expected_training(mode, shape)[0]["nothing"], layout, backend)


@pytest.mark.each_value
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{"projection_size": 4}, {"state_clip_min": -0.3, "state_clip_max": 0.2},
     {"projection_size": 3, "state_clip_min": -0.2, "state_clip_max": 0.2, "state_clip_nan": True}],
    ids=["projection", "clip", "both"],
)  # fmt: skip
def test_lstm_options(options, layout, backend):
    spec = RNNSpec("lstm", PADDED.I, PADDED.H, PADDED.layers, True, **options)
    problem = problem_of(spec, PADDED)
    check(problem, variant_results(problem), layout, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_states(layout):
    """The states begin as zeros; only the output is returned; only the input has a gradient in the result."""
    problem = training_problem("lstm", replace(DEEP, states=False))
    oracle = expected_training("lstm", replace(DEEP, states=False))[0]["dstates"]
    layer = layer_of(problem, layout)
    x = to_layout(problem.x, layout)
    y = layer(x)
    assert_same_bits(y, layer(x, layer.begin_state(DEEP.N))[0])
    trained, backward = layer.train(x)
    assert_same_bits(trained, y)
    grads_by_name = backward(to_layout(problem.dy, layout))
    assert list(grads_by_name) == ["data"]
    gradients = to_layout(grads_by_name["data"], layout), flat_gradients(layer, problem.spec), oracle.gradients[2]
    dstates = [dstate.astype(np.float32) for dstate in gradients[2]]
    assert_gradients_close((*gradients[:2], tuple(dstates)), oracle.gradients, "float32", problem.spec, DEEP.T, DEEP.N)


def test_a_single_state_may_be_an_array():
    problem = training_problem("gru", DEEP)
    layer = layer_of(problem)
    (h,) = problem.states
    y, final = layer(problem.x, h)
    assert isinstance(final, list)
    assert_same_bits((y, final), layer(problem.x, [h]))
    _, backward = layer.train(problem.x, h)
    from_array, from_list = (backward((problem.dy, dstates)) for dstates in (problem.dstates[0], list(problem.dstates)))
    assert_same_bits(tuple(from_array.values()), tuple(from_list.values()))


def test_final_states_continue_a_sequence():
    """Two calls on the parts of a sequence, the second with the states of the first, give what one call gives."""
    problem = training_problem("lstm", Shape(6, 3, 7, 11, layers=2))
    layer = layer_of(problem)
    y, final = layer(problem.x, layer.begin_state(3))
    first, states = layer(problem.x[:2], layer.begin_state(batch_size=3))
    second, after = layer(problem.x[2:], states)
    assert_same_bits((np.concatenate([first, second]), after), (y, final))


def test_state_info_and_begin_state():
    layer = LSTM(4, 2, bidirectional=True, projection_size=3, dtype="float64", backend="reference")
    assert layer.state_info(5) == [
        {"shape": (4, 5, 3), "__layout__": "LNC", "dtype": "float64"},
        {"shape": (4, 5, 4), "__layout__": "LNC", "dtype": "float64"},
    ]
    assert layer.state_info()[0]["shape"] == (4, 0, 3)
    h, c = layer.begin_state(2)
    assert h.shape == (4, 2, 3)
    assert c.dtype == np.float64
    assert not h.any()
    ones = GRU(4).begin_state(2, func=np.full, fill_value=1.5, dtype="float64")
    assert ones[0].dtype == np.float64
    assert (ones[0] == 1.5).all()
    for size, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^batch_size must be "):
            layer.state_info(size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout(layout, backend):
    problem, seed, oracle = expected_dropout("gru", PADDED)
    layer = layer_of(problem, layout, backend)
    x, states = to_layout(problem.x, layout), list(problem.states)
    (y, final), backward = layer.train(x, states, problem.lengths, seed=seed)
    assert backward.seed == seed
    assert_close((to_layout(y, layout), tuple(final)), oracle.forward, "float32", problem.spec)
    dx, *dstates = backward((to_layout(problem.dy, layout), list(problem.dstates))).values()
    gradients = to_layout(dx, layout), flat_gradients(layer, problem.spec), tuple(dstates)
    assert_gradients_close(gradients, oracle.gradients, "float32", problem.spec, PADDED.T, PADDED.N)
    (first, _), first_backward = layer.train(x, states, problem.lengths)
    (second, _), second_backward = layer.train(x, states, problem.lengths)
    assert first_backward.seed != second_backward.seed
    assert not np.array_equal(first, second)
    without_dropout = layer_of(replace(problem, spec=replace(problem.spec, dropout=0.0)), layout, backend)
    assert_same_bits(layer(x, states, problem.lengths), without_dropout(x, states, problem.lengths))


class TestErrors:
    """Every error names the argument, what was given and what was expected."""

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: RNN(3, activation="gelu"), ValueError, "activation must be 'relu' or 'tanh'; got 'gelu'"),
            (lambda: GRU(0), ValueError, "hidden_size must be at least 1; got 0"),
            (lambda: GRU(3, num_layers=1.5), TypeError, "num_layers must be an integer"),
            (lambda: GRU(3, layout="NCT"), ValueError, "layout must be 'TNC' or 'NTC'; got 'NCT'"),
            (lambda: GRU(3, dropout=1), ValueError, "dropout must be a probability"),
            (lambda: GRU(3, bidirectional=1), TypeError, "bidirectional must be True or False"),
            (lambda: GRU(3, input_size=-1), ValueError, "input_size must be at least 1"),
            (lambda: GRU(3, input_size=False), TypeError, "input_size must be an integer"),
            (lambda: GRU(3, input_size=0.0), TypeError, "input_size must be an integer"),
            (lambda: GRU(3, dtype="float16"), ValueError, "dtype must be one of float32, float64"),
            (lambda: GRU(3, use_sequence_length="yes"), TypeError, "use_sequence_length must be True or False"),
            (lambda: GRU(3, prefix=1), TypeError, "prefix must be a string or None; got 1"),
            (lambda: GRU(3, input_size=2, backend="gpu"), ValueError, "backend must be one of"),
            (lambda: LSTM(3, projection_size=3), ValueError, "projection_size must be smaller than hidden_size"),
            (lambda: LSTM(3, state_clip_min=0.0), ValueError, "state_clip_max must be given"),
            (lambda: LSTM(3, state_clip_nan=True), ValueError, "state_clip_nan needs state_clip_min"),
        ],
    )
    def test_constructor(self, make, error, message):
        with pytest.raises(error, match=f"^{message}"):
            make()

    @pytest.mark.parametrize(
        ("inputs", "options", "error", "message"),
        [
            ([1.0], {}, TypeError, "inputs must be a NumPy array; got list"),
            (np.ones((2, 3), "f4"), {}, ValueError, r"inputs must have shape \(N, T, I\), each at least 1; got"),
            (np.ones((2, 0, 3), "f4"), {}, ValueError, r"inputs must have shape \(N, T, I\)"),
            (np.ones((2, 4, 3)), {}, TypeError, "inputs must have dtype float32; got float64"),
            (None, {"states": 3}, TypeError, "states must be a tuple of 2"),
            (None, {"states": [np.zeros((1, 2, 5), "f4")]}, ValueError, "states must be a tuple of 2.* of 1"),
            (None, {"states": [np.zeros((1, 2, 5), "f4"), np.zeros((1, 3, 5), "f4")]}, ValueError,
             r"states\[1\] must have shape \(1, 2, 5\); got \(1, 3, 5\)"),
            (None, {"sequence_length": [1, 2]}, ValueError, "sequence_length must be given if, and only if"),
        ],
    )  # fmt: skip
    def test_calls(self, inputs, options, error, message):
        layer = LSTM(5, layout="NTC", input_size=3)
        layer.initialize()
        inputs = np.ones((2, 4, 3), np.float32) if inputs is None else inputs
        for call in (layer, layer.train):
            with pytest.raises(error, match=f"^{message}"):
                call(inputs, **options)

    def test_lengths(self):
        layer = LSTM(5, input_size=3, use_sequence_length=True)
        layer.initialize()
        x = np.ones((4, 2, 3), np.float32)
        with pytest.raises(ValueError, match=r"^sequence_length must be given if, and only if"):
            layer(x)
        with pytest.raises(ValueError, match=r"^sequence_length must be from 0 to 4"):
            layer(x, sequence_length=[5, 1])
        with pytest.raises(ValueError, match=r"^seed must be from 0"):
            layer.train(x, sequence_length=[4, 1], seed=-1)


def test_repr():
    assert repr(LSTM(4, 3, "NTC", 0.5, True, 7)) == "LSTM(7 -> 4, NTC, num_layers=3, dropout=0.5, bidirectional)"
