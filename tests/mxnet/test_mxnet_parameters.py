"""Parameters of layers shaped like those of MXNet's gluon.rnn: names, values, initializers, loading, saving."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mxnet_calls import GRU, LSTM, RNN, layer_of
from oracles import training_problem
from problems import Shape, assert_same_bits

pytestmark = pytest.mark.usefixtures("poisoned")

DEEP = Shape(5, 3, 7, 11, layers=3, bidirectional=True)


class TestParameters:
    """Names, shapes, values."""

    def test_names_and_shapes(self):
        layer = LSTM(4, 2, bidirectional=True, input_size=3, projection_size=2, prefix="net_", backend="reference")
        shapes = {parameter.name: parameter.shape for parameter in layer.collect_params().values()}
        assert list(shapes) == list(layer.params) == [f"net_{entry.name}" for entry in layer._op.spec.layout]
        assert shapes["net_l0_i2h_weight"] == (16, 3)
        assert shapes["net_r0_h2h_weight"] == (16, 2)
        assert shapes["net_l1_i2h_weight"] == (16, 4)
        assert shapes["net_r1_h2r_weight"] == (2, 4)
        assert shapes["net_r1_h2h_bias"] == (16,)
        assert layer.r1_h2h_bias is layer.params["net_r1_h2h_bias"]
        assert layer.prefix == "net_"
        assert repr(layer.l0_h2r_weight) == "Parameter net_l0_h2r_weight (shape=(2, 4), dtype=float32)"

    def test_selected_parameters(self):
        layer = GRU(4, 2, input_size=3, prefix="net_")
        weights = layer.collect_params(".*weight|net_l1_i2h_bias")
        assert list(weights) == [name for name in layer.params if "weight" in name or name == "net_l1_i2h_bias"]
        weights.setattr("grad_req", "null")
        assert {name for name, each in layer.params.items() if each.grad_req == "null"} == set(weights)
        assert layer.collect_params("l0") == {}
        assert layer.collect_params(None) is layer.params
        with pytest.raises(TypeError, match=r"^select must be a string or None; got 1"):
            layer.collect_params(1)
        with pytest.raises(ValueError, match=r"^select must be a regular expression; got '\*': nothing to repeat"):
            layer.collect_params("*")

    def test_each_layer_has_a_prefix_of_its_own(self):
        prefixes = [kind(2).prefix for kind in (RNN, RNN, GRU, LSTM)]
        assert len(set(prefixes)) == 4
        assert [prefix.rstrip("0123456789_") for prefix in prefixes] == ["rnn", "rnn", "gru", "lstm"]
        assert int(prefixes[1][3:-1]) == int(prefixes[0][3:-1]) + 1

    def test_deferred_input_size(self):
        layer = GRU(4, 2)
        assert repr(layer) == "GRU(None -> 4, TNC, num_layers=2)"
        assert layer.l0_i2h_weight.shape == (12, 0)
        assert layer.l1_i2h_weight.shape == (12, 4)
        x = np.ones((3, 2, 7), np.float32)
        for call in (layer, layer.train):
            with pytest.raises(ValueError, match=r"must have values; got none yet: call initialize or load_parameters"):
                call(x)
        layer.initialize(seed=3)
        with pytest.raises(ValueError, match=r"^gru\d+_l0_h2h_bias must have values.*the first call sets"):
            layer.l0_h2h_bias.data()
        y = layer(x)
        assert repr(layer) == "GRU(7 -> 4, TNC, num_layers=2)"
        assert layer.l0_i2h_weight.shape == layer.l0_i2h_weight.data().shape == (12, 7)
        with pytest.raises(ValueError, match=r"^inputs must have 7 features; got 6"):
            layer(x[:, :, :6])
        same_layer = GRU(4, 2, input_size=7)
        same_layer.initialize(seed=3)
        assert_same_bits(same_layer(x), y)

    @pytest.mark.parametrize(
        "options",
        [{"states": 3}, {"states": np.zeros((1, 9, 4), np.float32)}, {"sequence_length": [9, 9]}, {"seed": -1}],
        ids=["type", "shape", "lengths", "seed"],
    )
    def test_a_call_that_fails_does_not_set_the_input_size(self, options):
        layer = GRU(4, use_sequence_length=True)
        layer.initialize(seed=3)
        call = layer.train if "seed" in options else layer
        with pytest.raises((TypeError, ValueError)):
            call(np.ones((3, 2, 7), np.float32), **{"sequence_length": [3, 3], **options})
        assert repr(layer) == "GRU(None -> 4, TNC)"
        x = np.ones((3, 2, 6), np.float32)
        same_layer = GRU(4, use_sequence_length=True)
        same_layer.initialize(seed=3)
        assert_same_bits(layer(x, sequence_length=[3, 3]), same_layer(x, sequence_length=[3, 3]))

    def test_a_constructor_that_fails_does_not_set_the_input_size_of_shared_parameters(self):
        owner = GRU(4)
        for options in ({"prefix": "mine_"}, {"backend": "unknown"}):
            with pytest.raises(ValueError, match=r"^(prefix|backend) must be "):
                GRU(4, input_size=5, params=owner.params, **options)
            assert repr(owner) == "GRU(None -> 4, TNC)"
        GRU(4, input_size=5, params=owner.params)
        assert repr(owner) == "GRU(5 -> 4, TNC)"

    @pytest.mark.parametrize("features", [(5, 5), (5, 6)], ids=["same size", "other size"])
    def test_first_calls_from_two_threads(self, features):
        """The second waits until the first has set the input size."""
        inside, go_on = threading.Event(), threading.Event()

        def init(shape, rng):
            inside.set()
            assert go_on.wait(30)
            return rng.uniform(-1, 1, shape)

        layer = GRU(4, h2h_weight_initializer=init)
        layer.initialize()
        first, second = (np.ones((3, 2, size), np.float32) for size in features)
        with ThreadPoolExecutor(2) as threads:
            results = [threads.submit(layer, first)]
            assert inside.wait(30)
            results.append(threads.submit(layer, second))
            time.sleep(0.1)  # time to arrive where the first is
            go_on.set()
            y = results[0].result(60)
            assert_same_bits(y, layer(first))
            if features[0] == features[1]:
                assert_same_bits(results[1].result(60), y)
            else:
                with pytest.raises(ValueError, match=r"^inputs must have 5 features; got 6"):
                    results[1].result(60)

    def test_loading_sets_the_input_size(self):
        problem = training_problem("gru", Shape(4, 3, 5, 6))
        layer = layer_of(problem)
        assert repr(layer) == "GRU(5 -> 6, TNC)"
        assert layer(problem.x).shape == (4, 3, 6)

    def test_values_are_not_copied(self):
        problem = training_problem("gru", Shape(4, 3, 5, 6))
        layer = layer_of(problem)
        before = layer(problem.x)
        layer.l0_i2h_weight.data()[...] *= 2
        assert not np.array_equal(layer(problem.x), before)
        layer.l0_i2h_weight.set_data(layer.l0_i2h_weight.data() / 2)
        assert_same_bits(layer(problem.x), before)

    def test_set_data_errors(self):
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

    def test_shared_parameters(self):
        owner = GRU(4, 2, dropout=0.5)
        sharing = GRU(4, 2, layout="NTC", params=owner.collect_params())
        owner.initialize(seed=0)
        x = np.ones((3, 2, 5), np.float32)
        assert_same_bits(sharing(x.swapaxes(0, 1)).swapaxes(0, 1), owner(x))
        owner.l1_h2h_bias.data()[...] = 1
        assert_same_bits(sharing(x.swapaxes(0, 1)).swapaxes(0, 1), owner(x))
        later = GRU(4, 2, input_size=5, params=owner.params)
        assert_same_bits(later(x), owner(x))
        for wrong in ({"hidden_size": 5}, {"num_layers": 1}, {"input_size": 6}, {"dtype": "float64"}):
            with pytest.raises(ValueError, match=r"^params must be those of a layer like"):
                GRU(**{"hidden_size": 4, "num_layers": 2, "params": owner.params, **wrong})
        with pytest.raises(ValueError, match=r"^params must be those of a layer like"):
            RNN(4, 2, params=owner.params)
        with pytest.raises(ValueError, match=r"^prefix must be None or that of params \('gru\d+_'\); got 'mine_'"):
            GRU(4, 2, prefix="mine_", params=owner.params)
        assert GRU(4, 2, prefix=owner.prefix, params=owner.params).prefix == owner.prefix
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
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert_same_bits(copied(problem.x), layer(problem.x))
            copied.l0_i2h_weight.data()[...] = 0
            assert layer.l0_i2h_weight.data().all()
            assert not np.array_equal(copied(problem.x), layer(problem.x))

    def test_copies_before_the_first_call(self):
        layer, x = GRU(4), np.ones((3, 2, 5), np.float32)
        layer.initialize(seed=0)
        copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        for copied in copies:
            assert_same_bits(copied(x), layer(x))

    def test_more_than_ten_layers(self):
        """MXNet cannot save these."""
        layer = RNN(2, 12, bidirectional=True, input_size=3)
        layer.initialize(seed=0)
        copied = RNN(2, 12, bidirectional=True)
        copied.load_parameters(layer.save_parameters())
        assert_same_bits(copied.r11_h2h_weight.data(), layer.r11_h2h_weight.data())
        assert "_unfused.11.r_cell.h2h_weight" in layer.save_parameters()


class TestInitialization:
    """What :meth:`initialize` fills parameters with."""

    def test_defaults(self):
        layer = LSTM(16, 2, input_size=8)
        layer.initialize(seed=0)
        for parameter in layer.params.values():
            if parameter.name.endswith("bias"):
                assert not parameter.data().any()
            else:
                assert 0.05 < np.abs(parameter.data()).max() <= 0.07
        same_layer = LSTM(16, 2, input_size=8)
        same_layer.initialize(seed=0)
        assert_same_bits(same_layer.l1_h2h_weight.data(), layer.l1_h2h_weight.data())

    def test_initializers_of_kinds(self):
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
        ("init", "is_right"),
        [
            ("zeros", lambda w: not w.any()),
            ("normal", lambda w: 0.005 < w.std() < 0.02),
            ("xavier", lambda w: 0.15 < np.abs(w).max() <= (3 / 36) ** 0.5),
            (2, lambda w: (w == 2).all()),
            (lambda shape, rng: rng.integers(1, 3, shape), lambda w: set(w.ravel()) == {1, 2}),
        ],
        ids=["zeros", "normal", "xavier", "number", "function"],
    )
    def test_initializer_of_all_weights(self, init, is_right):
        layer = GRU(16, input_size=24)
        layer.initialize(init, seed=0)
        assert is_right(layer.l0_i2h_weight.data())
        assert not layer.l0_i2h_bias.data().any()

    def test_force_reinit(self):
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
            (1e300, ValueError, r"initializer of gru\d+_l0_i2h_weight must give .* finite in float32; got 1e\+300"),
            (float("nan"), ValueError, r"initializer of gru\d+_l0_i2h_weight must give .* finite in float32; got nan"),
            (lambda shape, rng: np.full(shape, np.inf), ValueError, r"initializer of gru.* finite in float32; got inf"),
            (lambda shape, rng: np.full(shape, 1j), TypeError, r"initializer of .* real numbers; got dtype complex128"),
            (lambda shape, rng: np.full(shape, "1"), TypeError, r"initializer of gru.* real numbers; got dtype <U1"),
            (lambda shape, rng: np.ones(3), ValueError, r"initializer of gru\d+_l0_i2h_weight must give .*got \(3,\)"),
        ],
    )
    def test_errors(self, init, error, message):
        layer = GRU(4)
        with pytest.raises(error, match=f"^{message}"):
            layer.initialize(init)
            layer(np.ones((1, 1, 2), np.float32))
        assert layer.l0_i2h_weight.shape == (12, 0)
        layer.initialize()
        layer(np.ones((1, 1, 3), np.float32))

    def test_numbers_are_compared_with_the_layers_dtype(self):
        layer = GRU(4, input_size=3, dtype="float64")
        layer.initialize(1e300)
        assert (layer.l0_i2h_weight.data() == 1e300).all()

    def test_an_initializer_that_fails_once(self):
        """What waits for the input size still waits."""
        failures = [OSError("no file")]

        def init(shape, rng):
            if failures:
                raise failures.pop()
            return rng.uniform(-1, 1, shape)

        layer, x = GRU(4), np.ones((1, 1, 2), np.float32)
        layer.initialize(init, seed=1)
        with pytest.raises(OSError, match="no file"):
            layer(x)
        other = GRU(4)
        other.initialize(init, seed=1)
        assert_same_bits(layer(x), other(x))

    def test_a_failed_initialization_changes_nothing(self):
        layer = GRU(4, input_size=3)
        layer.initialize(seed=0)
        before = layer.save_parameters()
        with pytest.raises(ValueError, match=r"^initializer of"):
            layer.initialize(lambda shape, rng: np.ones(3), force_reinit=True)
        layer(np.ones((1, 1, 3), np.float32))
        for name, array in layer.save_parameters().items():
            assert_same_bits(array, before[name])

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"force_reinit": 1}, TypeError, "force_reinit must be True or False; got 1"),
            ({"seed": "1"}, TypeError, "seed must be an integer or None; got '1'"),
            ({"seed": -1}, ValueError, r"seed must be from 0 to 2\*\*64 - 1; got -1"),
        ],
    )
    def test_options(self, options, error, message):
        layer = GRU(4)
        with pytest.raises(error, match=f"^{message}"):
            layer.initialize(**options)
        with pytest.raises(ValueError, match="call initialize"):
            layer.l0_i2h_bias.data()

    def test_matrix_initializers_of_biases(self):
        for init in ("xavier", "orthogonal"):
            layer = GRU(4, i2h_bias_initializer=init)
            layer.initialize()
            with pytest.raises(ValueError, match=rf"^initializer '{init}' must be for a matrix; got .*\(12,\)"):
                layer(np.ones((1, 1, 3), np.float32))
        with pytest.raises(ValueError, match=r"^h2h_weight_initializer must be one of"):
            GRU(4, h2h_weight_initializer="unknown")


class TestLoading:
    """An error changes no parameter."""

    problem = training_problem("gru", Shape(4, 3, 5, 6, layers=2))

    def arrays(self, **changes):
        """The problem's parameters by name with changes; None removes one."""
        arrays = {**self.problem.spec.layout.unpack(self.problem.params), **changes}
        return {name: array for name, array in arrays.items() if array is not None}

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
    def test_errors(self, changes, options, error, message):
        layer = GRU(6, 2, input_size=5)
        layer.initialize(seed=0)
        before = layer.save_parameters()
        with pytest.raises(error, match=f"^{message}"):
            layer.load_parameters(self.arrays(**changes), **options)
        for name, array in layer.save_parameters().items():
            assert_same_bits(array, before[name])

    def test_names_that_are_no_strings(self):
        with pytest.raises(ValueError, match=r"^params must hold no others .*; got 3, dense0_weight"):
            GRU(6, 2).load_parameters({**self.arrays(), 3: np.ones(3), "dense0_weight": np.ones(3)})

    def test_params_must_be_a_mapping(self):
        with pytest.raises(TypeError, match=r"^params must be a dict of named arrays; got list"):
            GRU(6).load_parameters([])

    def test_missing_and_extra(self):
        layer = GRU(6, 2)
        arrays = self.arrays(l1_h2h_bias=None, more=np.ones(3))
        with pytest.raises(ValueError, match=r"^params must hold gru\d+_l1_h2h_bias, which have no values yet"):
            layer.load_parameters(arrays, allow_missing=True, ignore_extra=True)
        layer.initialize("ones")
        layer.h = layer(self.problem.x)
        layer.l1_h2h_bias.data()[...] = 3
        layer.load_parameters(arrays, allow_missing=True, ignore_extra=True)
        assert (layer.l1_h2h_bias.data() == 3).all()
        np.testing.assert_array_equal(layer.l0_i2h_weight.data(), arrays["l0_i2h_weight"])

    @pytest.mark.parametrize("absent", ["l0_i2h_weight", "l1_h2h_weight"])
    def test_missing_in_a_layer_that_waits_for_its_input_size(self, absent):
        """The others are initialized as if nothing had been loaded: at once, if an array gives the input size."""
        layer, expected = GRU(6, 2), GRU(6, 2, input_size=5)
        for each in (layer, expected):
            each.initialize(seed=3)
            each.load_parameters(self.arrays(**{absent: None}), allow_missing=True)
            each.load_parameters({"l1_h2h_bias": np.full(18, 2, np.float32)}, allow_missing=True)
        assert repr(layer) == f"GRU({None if absent == 'l0_i2h_weight' else 5} -> 6, TNC, num_layers=2)"
        assert_same_bits(layer(self.problem.x), expected(self.problem.x))
        for name, array in expected.save_parameters().items():
            assert_same_bits(layer.save_parameters()[name], array)
        assert (layer.l1_h2h_bias.data() == 2).all()

    def test_a_wrong_array_changes_no_initialization_that_waits(self):
        layer, expected = GRU(6, 2), GRU(6, 2)
        for each in (layer, expected):
            each.initialize(seed=3)
        arrays = {"l0_i2h_bias": np.ones(18, np.float32), "l0_h2h_bias": np.ones(17, np.float32)}
        with pytest.raises(ValueError, match=r"_l0_h2h_bias must have shape \(18,\); got \(17,\)"):
            layer.load_parameters(arrays, allow_missing=True)
        assert_same_bits(layer(self.problem.x), expected(self.problem.x))

    def test_arrays_may_be_the_layers_own(self):
        layer = layer_of(self.problem)
        i2h, h2h = layer.l0_i2h_bias.data().copy(), layer.l0_h2h_bias.data().copy()
        swapped = {"l0_i2h_bias": layer.l0_h2h_bias.data(), "l0_h2h_bias": layer.l0_i2h_bias.data()}
        layer.load_parameters(swapped, allow_missing=True)
        assert_same_bits((layer.l0_i2h_bias.data(), layer.l0_h2h_bias.data()), (h2h, i2h))

    def test_cast_dtype(self):
        layer = GRU(6, 2, dtype="float64")
        layer.load_parameters(self.arrays(), cast_dtype=True)
        assert layer.l0_i2h_weight.data().dtype == np.float64

    def test_from_a_file_of_numpy(self, tmp_path):
        layer = layer_of(self.problem)
        np.savez(tmp_path / "net.npz", **layer.save_parameters())
        copied = GRU(6, 2)
        with np.load(tmp_path / "net.npz") as file:
            copied.load_parameters(file)
        assert_same_bits(copied(self.problem.x), layer(self.problem.x))
