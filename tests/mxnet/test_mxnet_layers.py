"""Layers shaped like those of MXNet's gluon.rnn: arguments, parameters, states, layouts, gradients, errors."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

from fusedrnn import RNNSpec
from fusedrnn import mxnet as mx
from fusedrnn.spec import MODES
from oracles import expected_dropout, expected_training, training_problem
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, problem_of
from variants import variant_results

pytestmark = pytest.mark.usefixtures("poisoned")

DEEP = Shape(5, 3, 7, 11, layers=3, bidirectional=True)
PADDED = Shape(6, 5, 7, 11, layers=3, bidirectional=True, lengths="edges")
LAYOUTS = ("TNC", "NTC")
CLASSES = {"lstm": mx.gluon.rnn.LSTM, "gru": mx.gluon.rnn.GRU}
RNN, LSTM, GRU = mx.gluon.rnn.RNN, mx.gluon.rnn.LSTM, mx.gluon.rnn.GRU


@pytest.fixture(params=["default", "reference"])
def backend(request):
    return None if request.param == "default" else request.param


def layer_of(problem, layout="TNC", backend=None, **options):
    """A layer with a problem's parameters."""
    spec = problem.spec
    options |= {"num_layers": spec.num_layers, "bidirectional": spec.bidirectional, "layout": layout,
                "dtype": spec.dtype, "dropout": spec.dropout, "backend": backend,
                "use_sequence_length": problem.lengths is not None}  # fmt: skip
    if spec.mode.startswith("rnn"):
        options["activation"] = spec.mode[4:]
    if spec.mode == "lstm":
        options |= {"projection_size": spec.projection_size, "state_clip_nan": spec.state_clip_nan,
                    "state_clip_min": spec.state_clip_min, "state_clip_max": spec.state_clip_max}  # fmt: skip
    layer = CLASSES.get(spec.mode, RNN)(spec.hidden_size, **options)
    layer.load_parameters(spec.layout.unpack(problem.params))
    return layer


def turned(array, layout):
    return array if layout == "TNC" else np.ascontiguousarray(array.swapaxes(0, 1))


def flat_gradients(layer, spec):
    return spec.layout.pack({one.short_name: one.grad() for one in layer.collect_params().values()})


def check(problem, oracle, layout, backend, **options):
    """Inference, training and gradients, with states."""
    spec, (T, N) = problem.spec, problem.x.shape[:2]
    layer = layer_of(problem, layout, backend, **options)
    x, states = turned(problem.x, layout), list(problem.states)
    y, final = layer(x, states, problem.lengths)
    assert y.flags.c_contiguous
    assert_close((turned(y, layout), tuple(final)), oracle.forward, spec.dtype, spec)
    (trained, after), backward = layer.train(x, states, problem.lengths)
    assert_same_bits((trained, after), (y, final))
    found = backward((turned(problem.dy, layout), list(problem.dstates)))
    assert list(found) == list(backward.arguments) == ["data", "state", "state_cell"][: 1 + len(states)]
    dx, *dstates = found.values()
    gradients = turned(dx, layout), flat_gradients(layer, spec), tuple(dstates)
    assert_gradients_close(gradients, oracle.gradients, spec.dtype, spec, T, N)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [DEEP, PADDED], ids=["full", "lengths"])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, shape, layout, backend):
    check(training_problem(mode, shape), expected_training(mode, shape)[0]["nothing"], layout, backend)


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
    """Zeros to begin with, the output alone, and no gradient of what was not given."""
    problem = training_problem("lstm", replace(DEEP, states=False))
    oracle = expected_training("lstm", replace(DEEP, states=False))[0]["dstates"]
    layer = layer_of(problem, layout)
    x = turned(problem.x, layout)
    y = layer(x)
    assert_same_bits(y, layer(x, layer.begin_state(DEEP.N))[0])
    trained, backward = layer.train(x)
    assert_same_bits(trained, y)
    found = backward(turned(problem.dy, layout))
    assert list(found) == ["data"]
    gradients = turned(found["data"], layout), flat_gradients(layer, problem.spec), oracle.gradients[2]
    exact = [one.astype(np.float32) for one in gradients[2]]
    assert_gradients_close((*gradients[:2], tuple(exact)), oracle.gradients, "float32", problem.spec, DEEP.T, DEEP.N)


def test_one_state_needs_no_list():
    problem = training_problem("gru", DEEP)
    layer = layer_of(problem)
    (h,) = problem.states
    y, final = layer(problem.x, h)
    assert isinstance(final, list)
    assert_same_bits((y, final), layer(problem.x, [h]))
    _, backward = layer.train(problem.x, h)
    one, other = backward((problem.dy, problem.dstates[0])), backward((problem.dy, list(problem.dstates)))
    assert_same_bits(tuple(one.values()), tuple(other.values()))


def test_states_continue():
    """Two halves, the states handed on, are the whole."""
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


class TestGradients:
    """Parameters have requests of their own; inputs and states are asked for like a function's arguments."""

    problem = training_problem("lstm", Shape(4, 3, 5, 6, layers=2))

    def trained(self, layout="TNC"):
        layer = layer_of(self.problem, layout)
        _, backward = layer.train(turned(self.problem.x, layout), list(self.problem.states))
        return layer, backward, (turned(self.problem.dy, layout), list(self.problem.dstates))

    def test_zero_before(self):
        layer, _, _ = self.trained()
        assert not flat_gradients(layer, self.problem.spec).any()

    def test_written_each_time(self):
        layer, backward, given = self.trained()
        backward(given)
        once = flat_gradients(layer, self.problem.spec)
        backward(given)
        assert_same_bits(flat_gradients(layer, self.problem.spec), once)
        layer.collect_params().zero_grad()
        assert not flat_gradients(layer, self.problem.spec).any()

    def test_added(self):
        layer, backward, given = self.trained()
        backward(given)
        once = flat_gradients(layer, self.problem.spec)
        layer.collect_params().setattr("grad_req", "add")
        layer.collect_params().zero_grad()
        for _ in range(3):
            backward(given)
        np.testing.assert_array_equal(flat_gradients(layer, self.problem.spec), once + once + once)

    def test_not_wanted(self):
        layer, backward, given = self.trained()
        layer.collect_params().setattr("grad_req", "null")
        assert set(backward(given)) == {"data", "state", "state_cell"}
        with pytest.raises(ValueError, match=r"^grad_req of lstm\d+_l0_i2h_weight must be 'write' or 'add'"):
            layer.l0_i2h_weight.grad()
        layer.l0_i2h_weight.grad_req = "write"
        assert not layer.l0_i2h_weight.grad().any()

    def test_each_as_it_asks(self):
        layer, backward, given = self.trained()
        backward(given)
        once = {one.name: one.grad().copy() for one in layer.params.values()}
        layer.l0_i2h_weight.grad_req, layer.l1_h2h_bias.grad_req = "add", "null"
        backward(given)
        for one in layer.params.values():
            if one.grad_req != "null":
                times = 2 if one.grad_req == "add" else 1
                np.testing.assert_array_equal(one.grad(), times * once[one.name])
        layer.l1_h2h_bias.grad_req = "write"
        assert_same_bits(layer.l1_h2h_bias.grad(), once[layer.l1_h2h_bias.name])

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_of_inputs_and_states(self, layout):
        _, backward, given = self.trained(layout)
        everything = backward(given)
        assert list(backward(given, "null")) == []
        assert list(backward(given, {"state_cell": "write"})) == ["state_cell"]
        assert list(backward(given, ["write", "null", "null"])) == ["data"]
        buffers = {name: np.ones_like(one) for name, one in everything.items()}
        asked = {"data": "add", "state": "write", "state_cell": "add"}
        found = backward(given, asked, buffers)
        assert np.shares_memory(found["data"], buffers["data"])
        for name, one in everything.items():
            np.testing.assert_array_equal(buffers[name], one + (1 if asked[name] == "add" else 0))

    def test_several_forwards_before_their_backwards(self):
        layer, backward, given = self.trained()
        backward(given)
        once = flat_gradients(layer, self.problem.spec)
        _, other = layer.train(self.problem.x[:2] + 1)
        other(given[0][:2])
        backward(given)
        assert_same_bits(flat_gradients(layer, self.problem.spec), once)

    @pytest.mark.parametrize(
        ("out_grads", "error", "message"),
        [
            (lambda y, s: y, TypeError, "out_grads must be a pair: the output's, and a list of the states'; got"),
            (lambda y, s: (y, *s), ValueError, "out_grads must be a pair.*got 3"),
            (lambda y, s: (y[1:], s), ValueError, r"out_grads\[0\] must have shape \(3, 4, 6\), as layout NTC has it"),
            (lambda y, s: (y, s[:1]), ValueError, r"out_grads\[1\] must be a list of 2 arrays; got 1"),
            (lambda y, s: (y, s[0]), ValueError, r"out_grads\[1\] must be a list of 2 arrays; got 1"),
            (lambda y, s: (y, 3), TypeError, r"out_grads\[1\] must be a list of 2 arrays; got int"),
            (lambda y, s: (y, [s[0], s[1][:1]]), ValueError, r"out_grads\[2\] must have shape \(2, 3, 6\)"),
        ],
    )
    def test_bad_gradients(self, out_grads, error, message):
        _, backward, given = self.trained("NTC")
        with pytest.raises(error, match=f"^{message}"):
            backward(out_grads(*given))

    def test_bad_requests(self):
        _, backward, given = self.trained()
        for options, error, message in (
            ({"grad_req": "wrote"}, ValueError, "grad_req: data must be one of write, add, null; got 'wrote'"),
            ({"grad_req": {"parameters": "add"}}, ValueError, "grad_req must have keys among data, state, state_cell"),
            ({"grad_req": ["write"]}, ValueError, "grad_req must be .* a list or a dict .* got 1"),
            ({"args_grad": 3}, TypeError, "args_grad must be None, or a list or a dict"),
            ({"args_grad": {"data": np.ones((3, 4, 5), "f4")}}, ValueError, r"args_grad: data must have shape"),
            ({"args_grad": {"data": [1.0]}}, TypeError, "args_grad: data must be a NumPy array; got list"),
        ):
            with pytest.raises(error, match=f"^{message}"):
                backward(given, **options)

    def test_bad_requests_of_parameters(self):
        layer, _, _ = self.trained()
        with pytest.raises(ValueError, match=r"^grad_req must be one of write, add, null; got 'no'"):
            layer.l0_i2h_bias.grad_req = "no"
        with pytest.raises(ValueError, match=r"^name must be 'grad_req'; got 'lr_mult'"):
            layer.collect_params().setattr("lr_mult", "write")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout(layout, backend):
    problem, seed, oracle = expected_dropout("gru", PADDED)
    layer = layer_of(problem, layout, backend)
    x, states = turned(problem.x, layout), list(problem.states)
    (y, final), backward = layer.train(x, states, problem.lengths, seed=seed)
    assert backward.seed == seed
    assert_close((turned(y, layout), tuple(final)), oracle.forward, "float32", problem.spec)
    dx, *dstates = backward((turned(problem.dy, layout), list(problem.dstates))).values()
    found = turned(dx, layout), flat_gradients(layer, problem.spec), tuple(dstates)
    assert_gradients_close(found, oracle.gradients, "float32", problem.spec, PADDED.T, PADDED.N)
    (one, _), first = layer.train(x, states, problem.lengths)
    (other, _), second = layer.train(x, states, problem.lengths)
    assert first.seed != second.seed
    assert not np.array_equal(one, other)
    calm = layer_of(replace(problem, spec=replace(problem.spec, dropout=0.0)), layout, backend)
    assert_same_bits(layer(x, states, problem.lengths), calm(x, states, problem.lengths))


class TestParameters:
    """Names, shapes, values."""

    def test_names_and_shapes(self):
        layer = LSTM(4, 2, bidirectional=True, input_size=3, projection_size=2, prefix="net_", backend="reference")
        found = {one.name: one.shape for one in layer.collect_params().values()}
        assert list(found) == list(layer.params) == [f"net_{one.name}" for one in layer._op.spec.layout]
        assert found["net_l0_i2h_weight"] == (16, 3)
        assert found["net_r0_h2h_weight"] == (16, 2)
        assert found["net_l1_i2h_weight"] == (16, 4)
        assert found["net_r1_h2r_weight"] == (2, 4)
        assert found["net_r1_h2h_bias"] == (16,)
        assert layer.r1_h2h_bias is layer.params["net_r1_h2h_bias"]
        assert layer.prefix == "net_"
        assert repr(layer.l0_h2r_weight) == "Parameter net_l0_h2r_weight (shape=(2, 4), dtype=float32)"

    def test_each_layer_has_a_prefix_of_its_own(self):
        prefixes = [kind(2).prefix for kind in (RNN, RNN, GRU, LSTM)]
        assert len(set(prefixes)) == 4
        assert [one.rstrip("0123456789_") for one in prefixes] == ["rnn", "rnn", "gru", "lstm"]
        assert int(prefixes[1][3:-1]) == int(prefixes[0][3:-1]) + 1

    def test_deferred_input_size(self):
        layer = GRU(4, 2)
        assert repr(layer) == "GRU(None -> 4, TNC, num_layers=2)"
        assert layer.l0_i2h_weight.shape == (12, 0)
        assert layer.l1_i2h_weight.shape == (12, 4)
        x = np.ones((3, 2, 7), np.float32)
        for use in (layer, layer.train):
            with pytest.raises(ValueError, match=r"must have values; got none yet: call initialize or load_parameters"):
                use(x)
        layer.initialize(seed=3)
        with pytest.raises(ValueError, match=r"^gru\d+_l0_h2h_bias must have values.*the first call sets"):
            layer.l0_h2h_bias.data()
        y = layer(x)
        assert repr(layer) == "GRU(7 -> 4, TNC, num_layers=2)"
        assert layer.l0_i2h_weight.shape == layer.l0_i2h_weight.data().shape == (12, 7)
        with pytest.raises(ValueError, match=r"^inputs must have 7 features; got 6"):
            layer(x[:, :, :6])
        known = GRU(4, 2, input_size=7)
        known.initialize(seed=3)
        assert_same_bits(known(x), y)

    def test_loading_says_the_input_size(self):
        problem = training_problem("gru", Shape(4, 3, 5, 6))
        layer = layer_of(problem)
        assert repr(layer) == "GRU(5 -> 6, TNC)"
        assert layer(problem.x).shape == (4, 3, 6)

    def test_values_are_used_where_they_lie(self):
        problem = training_problem("gru", Shape(4, 3, 5, 6))
        layer = layer_of(problem)
        before = layer(problem.x)
        layer.l0_i2h_weight.data()[...] *= 2
        assert not np.array_equal(layer(problem.x), before)
        layer.l0_i2h_weight.set_data(layer.l0_i2h_weight.data() / 2)
        assert_same_bits(layer(problem.x), before)

    def test_set_data_refuses(self):
        layer = RNN(3, input_size=2)
        with pytest.raises(ValueError, match=r"_l0_h2h_weight must have values"):
            layer.l0_h2h_weight.set_data(np.zeros((3, 3), np.float32))
        layer.initialize()
        for value, error, message in (
            ([1.0], TypeError, "must be a NumPy array; got list"),
            (np.zeros((3, 2), np.float32), ValueError, r"must have shape \(3, 3\); got \(3, 2\)"),
            (np.zeros((3, 3)), TypeError, "must have dtype float32; got float64"),
        ):
            with pytest.raises(error, match=message):
                layer.l0_h2h_weight.set_data(value)

    def test_shared(self):
        one = GRU(4, 2, dropout=0.5)
        other = GRU(4, 2, layout="NTC", params=one.collect_params())
        one.initialize(seed=0)
        x = np.ones((3, 2, 5), np.float32)
        assert_same_bits(other(x.swapaxes(0, 1)).swapaxes(0, 1), one(x))
        one.l1_h2h_bias.data()[...] = 1
        assert_same_bits(other(x.swapaxes(0, 1)).swapaxes(0, 1), one(x))
        later = GRU(4, 2, input_size=5, params=one.params)
        assert_same_bits(later(x), one(x))
        for wrong in ({"hidden_size": 5}, {"num_layers": 1}, {"input_size": 6}, {"dtype": "float64"}):
            with pytest.raises(ValueError, match=r"^params must be those of a layer like"):
                GRU(**{"hidden_size": 4, "num_layers": 2, "params": one.params, **wrong})
        with pytest.raises(ValueError, match=r"^params must be those of a layer like"):
            RNN(4, 2, params=one.params)
        with pytest.raises(ValueError, match=r"^prefix must be None or that of params \('gru\d+_'\); got 'mine_'"):
            GRU(4, 2, prefix="mine_", params=one.params)
        assert GRU(4, 2, prefix=one.prefix, params=one.params).prefix == one.prefix
        with pytest.raises(TypeError, match=r"^params must be what a layer's collect_params returns; got dict"):
            RNN(4, 2, params={})

    def test_cast(self):
        problem = training_problem("lstm", Shape(4, 3, 5, 6), "float64")
        layer = layer_of(problem.typed("float32"))
        layer.cast("float64")
        assert layer.l0_i2h_weight.dtype == layer.state_info()[0]["dtype"] == "float64"
        assert_same_bits(layer(problem.x), layer_of(problem)(problem.x))
        with pytest.raises(TypeError, match=r"^inputs must have dtype float64; got float32"):
            layer(problem.x.astype(np.float32))
        with pytest.raises(ValueError, match=r"^dtype must be one of float32, float64"):
            layer.cast("float16")

    def test_copies(self):
        problem = training_problem("lstm", DEEP)
        layer = layer_of(problem)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert_same_bits(twin(problem.x), layer(problem.x))
            twin.l0_i2h_weight.data()[...] = 0
            assert layer.l0_i2h_weight.data().all()
            assert not np.array_equal(twin(problem.x), layer(problem.x))

    def test_more_than_ten_layers(self):
        """MXNet cannot save these."""
        layer = RNN(2, 12, bidirectional=True, input_size=3)
        layer.initialize(seed=0)
        twin = RNN(2, 12, bidirectional=True)
        twin.load_parameters(layer.save_parameters())
        assert_same_bits(twin.r11_h2h_weight.data(), layer.r11_h2h_weight.data())
        assert "_unfused.11.r_cell.h2h_weight" in layer.save_parameters()


class TestInitialization:
    def test_defaults(self):
        layer = LSTM(16, 2, input_size=8)
        layer.initialize(seed=0)
        for one in layer.params.values():
            if one.name.endswith("bias"):
                assert not one.data().any()
            else:
                assert 0.05 < np.abs(one.data()).max() <= 0.07
        again = LSTM(16, 2, input_size=8)
        again.initialize(seed=0)
        assert_same_bits(again.l1_h2h_weight.data(), layer.l1_h2h_weight.data())

    def test_each_its_own(self):
        layer = LSTM(
            4, input_size=3, i2h_weight_initializer="ones", h2h_weight_initializer="orthogonal",
            i2h_bias_initializer="lstmbias", h2h_bias_initializer=None, projection_size=2,
            h2r_weight_initializer=lambda shape, rng: np.arange(8).reshape(shape), backend="reference",
        )  # fmt: skip
        layer.initialize(0.5, seed=1)
        assert (layer.l0_i2h_weight.data() == 1).all()
        h2h = layer.l0_h2h_weight.data()
        np.testing.assert_allclose(h2h.T @ h2h, 2 * np.eye(2), atol=1e-6)
        np.testing.assert_array_equal(layer.l0_i2h_bias.data().reshape(4, 4)[:, 0], [0, 1, 0, 0])
        assert not layer.l0_h2h_bias.data().any()
        np.testing.assert_array_equal(layer.l0_h2r_weight.data(), np.arange(8).reshape(2, 4))

    @pytest.mark.parametrize(
        ("init", "holds"),
        [
            ("zeros", lambda w: not w.any()),
            ("normal", lambda w: 0.005 < w.std() < 0.02),
            ("xavier", lambda w: 0.15 < np.abs(w).max() <= (3 / 36) ** 0.5),
            (2, lambda w: (w == 2).all()),
            (lambda shape, rng: rng.integers(1, 3, shape), lambda w: set(w.ravel()) == {1, 2}),
        ],
        ids=["zeros", "normal", "xavier", "number", "function"],
    )
    def test_for_all(self, init, holds):
        layer = GRU(16, input_size=24)
        layer.initialize(init, seed=0)
        assert holds(layer.l0_i2h_weight.data())
        assert not layer.l0_i2h_bias.data().any()

    def test_once(self):
        layer = GRU(4, input_size=3)
        layer.initialize(seed=0)
        view = layer.l0_i2h_weight.data()
        with pytest.raises(ValueError, match=r"^force_reinit must be True to overwrite the values that 'gru\d+_' has"):
            layer.initialize()
        layer.initialize("ones", force_reinit=True)
        assert (view == 1).all()

    @pytest.mark.parametrize(
        ("init", "error", "message"),
        [
            ("glorot", ValueError, "init must be one of zeros, ones, .*got 'glorot'"),
            (None, TypeError, "init must be an initializer; got None"),
            (True, TypeError, "init must be one of .*got True"),
            ([1.0], TypeError, "init must be one of"),
            ("lstmbias", ValueError, "initializer 'lstmbias' must be for the bias of an LSTM"),
            (lambda shape, rng: np.ones(3), ValueError, r"initializer of gru\d+_l0_i2h_weight must give .*got \(3,\)"),
        ],
    )
    def test_refuses(self, init, error, message):
        layer = GRU(4)
        with pytest.raises(error, match=f"^{message}"):
            layer.initialize(init)
            layer(np.ones((1, 1, 2), np.float32))
        assert layer.l0_i2h_weight.shape == (12, 0)
        layer.initialize()
        layer(np.ones((1, 1, 3), np.float32))

    def test_refuses_for_vectors(self):
        for init in ("xavier", "orthogonal"):
            layer = GRU(4, i2h_bias_initializer=init)
            layer.initialize()
            with pytest.raises(ValueError, match=rf"^initializer '{init}' must be for a matrix; got .*\(12,\)"):
                layer(np.ones((1, 1, 3), np.float32))
        with pytest.raises(ValueError, match=r"^h2h_weight_initializer must be one of"):
            GRU(4, h2h_weight_initializer="unknown")


class TestLoading:
    """If anything is wrong, nothing changes."""

    problem = training_problem("gru", Shape(4, 3, 5, 6, layers=2))

    def given(self, **changes):
        found = {**self.problem.spec.layout.unpack(self.problem.params), **changes}
        return {name: one for name, one in found.items() if one is not None}

    @pytest.mark.parametrize(
        ("changes", "options", "error", "message"),
        [
            ({"l1_h2h_bias": None}, {}, ValueError, r"params must hold every parameter; missing gru\d+_l1_h2h_bias"),
            ({"dense0_weight": np.ones(3)}, {}, ValueError, "params must hold no others .*; got dense0_weight"),
            ({"_unfused.0.i2h_bias": np.ones(18, "f4")}, {}, ValueError,
             "params must hold l0_i2h_bias once; got l0_i2h_bias and _unfused.0.i2h_bias"),
            ({"l0_i2h_bias": np.ones(17, "f4")}, {}, ValueError, r"gru\d+_l0_i2h_bias must have shape \(18,\)"),
            ({"l1_h2h_bias": [1.0]}, {}, TypeError, r"gru\d+_l1_h2h_bias must be a NumPy array; got list"),
            ({"l1_h2h_bias": np.ones(18)}, {}, TypeError, r"gru\d+_l1_h2h_bias must have dtype float32; got float64"),
            ({"l1_h2h_bias": np.ones(18, int)}, {"cast_dtype": True}, TypeError, ".*dtype float32; got int64"),
            ({}, {"allow_missing": 1}, TypeError, "allow_missing must be True or False; got 1"),
            ({}, {"prefix": 1}, TypeError, "prefix must be a string; got 1"),
            ({}, {"prefix": "x_", "ignore_extra": True}, ValueError, "params must hold every parameter"),
        ],
    )  # fmt: skip
    def test_refuses(self, changes, options, error, message):
        layer = GRU(6, 2, input_size=5)
        layer.initialize(seed=0)
        before = layer.save_parameters()
        with pytest.raises(error, match=f"^{message}"):
            layer.load_parameters(self.given(**changes), **options)
        for name, one in layer.save_parameters().items():
            assert_same_bits(one, before[name])

    def test_refuses_what_is_no_mapping(self):
        with pytest.raises(TypeError, match=r"^params must be a dict of named arrays; got list"):
            GRU(6).load_parameters([])

    def test_some(self):
        layer = GRU(6, 2)
        given = self.given(l1_h2h_bias=None, more=np.ones(3))
        with pytest.raises(ValueError, match=r"^params must hold gru\d+_l1_h2h_bias, which have no values yet"):
            layer.load_parameters(given, allow_missing=True, ignore_extra=True)
        layer.initialize("ones")
        layer.h = layer(self.problem.x)
        layer.l1_h2h_bias.data()[...] = 3
        layer.load_parameters(given, allow_missing=True, ignore_extra=True)
        assert (layer.l1_h2h_bias.data() == 3).all()
        np.testing.assert_array_equal(layer.l0_i2h_weight.data(), given["l0_i2h_weight"])

    def test_another_dtype(self):
        layer = GRU(6, 2, dtype="float64")
        layer.load_parameters(self.given(), cast_dtype=True)
        assert layer.l0_i2h_weight.data().dtype == np.float64

    def test_from_a_file_of_numpy(self, tmp_path):
        layer = layer_of(self.problem)
        np.savez(tmp_path / "net.npz", **layer.save_parameters())
        twin = GRU(6, 2)
        with np.load(tmp_path / "net.npz") as file:
            twin.load_parameters(file)
        assert_same_bits(twin(self.problem.x), layer(self.problem.x))


class TestErrors:
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
    def test_of_making(self, make, error, message):
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
            (None, {"states": [np.zeros((1, 2, 5), "f4")]}, ValueError, "states must be a tuple of 2.*got 1"),
            (None, {"states": [np.zeros((1, 2, 5), "f4"), np.zeros((1, 3, 5), "f4")]}, ValueError,
             r"states\[1\] must have shape \(1, 2, 5\); got \(1, 3, 5\)"),
            (None, {"sequence_length": [1, 2]}, ValueError, "sequence_length must be given if, and only if"),
        ],
    )  # fmt: skip
    def test_of_calls(self, inputs, options, error, message):
        layer = LSTM(5, layout="NTC", input_size=3)
        layer.initialize()
        inputs = np.ones((2, 4, 3), np.float32) if inputs is None else inputs
        for use in (layer, layer.train):
            with pytest.raises(error, match=f"^{message}"):
                use(inputs, **options)

    def test_of_lengths(self):
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
