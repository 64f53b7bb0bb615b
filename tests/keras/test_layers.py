"""LSTM, GRU, SimpleRNN, Bidirectional and RNN against Keras's own: outputs, states and all gradients."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers

import fusedrnn.keras
from fusedrnn.testing.tolerance import gradient_tolerance, longest_sum, tolerance
from keras_calls import IS_OLD, assert_within, outputs_and_gradients

N, T, I, H = 4, 5, 3, 6
RNG = np.random.default_rng(0)
LENGTHS = np.array([5, 3, 1, 0])
MASKS = {
    "none": None,
    "full": np.ones((N, T), bool),
    "right": np.arange(T) < LENGTHS[:, None],
    "left": np.arange(T) >= T - LENGTHS[:, None],
    "holes": RNG.random((N, T)) > 0.4,
}
SEQUENCES = {"return_sequences": True, "return_state": True}
KINDS = ("LSTM", "GRU", "SimpleRNN")
OPTIONS = {
    "plain": {},
    "sequences": SEQUENCES,
    "backwards": {**SEQUENCES, "go_backwards": True},
    "last-backwards": {"go_backwards": True},
    "zeros": {**SEQUENCES, "zero_output_for_mask": True},
    "last-zeros": {"zero_output_for_mask": True},
    "unrolled": {**SEQUENCES, "unroll": True},
    "unrolled-zeros": {**SEQUENCES, "unroll": True, "zero_output_for_mask": True},
    "no-bias": {**SEQUENCES, "use_bias": False},
    "relu": {**SEQUENCES, "activation": "relu"},
}
# What is different from backend to backend. Compiling takes seconds on JAX.
EVERYWHERE = pytest.mark.every_backend
CASES = [
    *[(kind, "sequences", mask) for kind in KINDS for mask in ("none", "holes") if (kind, mask) != ("LSTM", "holes")],
    pytest.param("LSTM", "sequences", "holes", marks=EVERYWHERE),
    ("GRU", "plain", "left"),
    pytest.param("GRU", "backwards", "left", marks=EVERYWHERE),
    ("LSTM", "last-backwards", "holes"),
    *[("LSTM", "zeros", mask) for mask in ("full", "right")],
    *[("SimpleRNN", name, mask) for name, mask in (("zeros", "left"), ("last-zeros", "right"))],
    pytest.param("SimpleRNN", "plain", "right", marks=EVERYWHERE),
    *[("LSTM", name, "none") for name in ("no-bias", "unrolled")],
    ("GRU", "no-bias", "none"),
    ("SimpleRNN", "relu", "none"),
    ("GRU", "unrolled", "holes"),
    pytest.param("SimpleRNN", "unrolled-zeros", "holes", marks=EVERYWHERE),
]
MERGES = [
    ("LSTM", "none", "concat"),
    ("GRU", "right", "ave"),
    ("SimpleRNN", "holes", None),
    pytest.param("LSTM", "holes", "concat", marks=EVERYWHERE),
    ("GRU", "left", "sum"),
]


def twins(make, **options):
    """Our layer and Keras's, built, with the same weights."""
    ours, theirs = make(fusedrnn.keras, **options), make(layers, **options)
    for layer in (ours, theirs):
        layer.build((N, T, I))
    theirs.set_weights([RNG.normal(0, 0.4, weight.shape) for weight in theirs.get_weights()])
    ours.set_weights(theirs.get_weights())
    return ours, theirs


def arrays(num_states, dtype="float32"):
    x = RNG.standard_normal((N, T, I)).astype(dtype)
    return x, [RNG.standard_normal((N, H)).astype(dtype) for _ in range(num_states)]


def assert_same(ours, theirs, x, states=None, mask=None, training=False, dtype="float32"):
    """Equal outputs and gradients, within the tolerance of the operator."""
    actual = outputs_and_gradients(ours, x, states, mask, training)
    expected = outputs_and_gradients(theirs, x, states, mask, training)
    spec = fusedrnn.RNNSpec("lstm", I + H, H, bidirectional=True)
    for array, other in zip(actual[0], expected[0], strict=True):
        assert_within(array, other, *tolerance(dtype, longest_sum(spec), np.abs(other).max()))
    scale = max(np.abs(other).max() for other in expected[1])
    for array, other in zip(actual[1], expected[1], strict=True):
        assert_within(array, other, *gradient_tolerance(dtype, spec, T, N, scale))


@pytest.mark.parametrize(("kind", "options", "mask"), CASES)
def test_layers(kind, options, mask, fused):
    ours, theirs = twins(lambda module, **given: getattr(module, kind)(H, **given), **OPTIONS[options])
    assert [weight.path.split("/")[1:] for weight in ours.weights] == [
        weight.path.split("/")[1:] for weight in theirs.weights
    ]
    x, states = arrays(2 if kind == "LSTM" else 1)
    assert_same(ours, theirs, x, states, MASKS[mask])
    assert len(fused) == 1


@EVERYWHERE
@pytest.mark.parametrize("mask", ["none", "full", "right", "holes"])
def test_calls_outside_of_graphs(mask, fused):
    """Where the values of masks are known."""
    ours, theirs = twins(lambda module: module.GRU(H, return_sequences=True))
    x, _ = arrays(0)
    mask = None if MASKS[mask] is None else keras.ops.convert_to_tensor(MASKS[mask])
    results = [keras.ops.convert_to_numpy(layer(x, mask=mask)) for layer in (ours, theirs)]
    assert_within(*results, *tolerance("float32", I + H))
    assert len(fused) == 1


@EVERYWHERE
@pytest.mark.skipif(IS_OLD, reason="Keras's own call() takes tensors only")
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arrays_of_numpy(dtype, wrapped, fused):
    """Which only ``__call__`` converts."""

    def make(module):
        return module.Bidirectional(module.GRU(H)) if wrapped else module.GRU(H)

    ours, theirs = twins(make)
    x, states = arrays(1 + wrapped, dtype)
    results = [keras.ops.convert_to_numpy(layer.call(x, initial_state=states)) for layer in (ours, theirs)]
    assert_within(*results, *tolerance("float32", I + H))
    assert fused


@EVERYWHERE
def test_float64(fused):
    """Keras's own loop rounds to float32 here and there, so that NumPy is the oracle."""
    with x64():
        ours, _ = twins(lambda module: module.SimpleRNN(H, dtype="float64", return_sequences=True))
        kernel, recurrent_kernel, bias = map(keras.ops.convert_to_numpy, ours.weights)
        x, (h,) = arrays(1, "float64")
        y, _ = outputs_and_gradients(ours, x, [h])
    expected = []
    for step in x.swapaxes(0, 1):
        h = np.tanh(step @ kernel + bias + h @ recurrent_kernel)
        expected.append(h)
    assert_within(y[0], np.stack(expected, 1), *tolerance("float64", I + H))
    assert fused[0].dtype == "float64"


# JAX's warning, of Keras's own weights.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
@EVERYWHERE
@pytest.mark.parametrize("kind", ["LSTM", "SimpleRNN"])
def test_float64_that_the_backend_does_not_have(kind, fused):
    """JAX without jax_enable_x64 makes float32 of it."""
    ours, theirs = twins(lambda module: getattr(module, kind)(H, dtype="float64", return_sequences=True))
    x, _ = arrays(0)
    results = [keras.ops.convert_to_numpy(layer(x)) for layer in (ours, theirs)]
    assert results[0].dtype == results[1].dtype
    assert_within(*results, *tolerance("float32", I + H))
    assert len(fused) == 1


@contextlib.contextmanager
def x64():
    """JAX has 64-bit numbers."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize(
    ("activation", "recurrent"),
    [
        ("softsign", "hard_sigmoid"),
        pytest.param("elu", "sigmoid", marks=EVERYWHERE),
        ("leaky_relu", "softplus"),
        ("linear", "tanh"),
    ],
)
def test_activations(activation, recurrent, fused):
    ours, theirs = twins(
        lambda module: module.GRU(H, activation=activation, recurrent_activation=recurrent, reset_after=False)
    )
    assert_same(ours, theirs, arrays(0)[0], mask=MASKS["holes"])
    assert fused


@pytest.mark.parametrize(("kind", "mask", "merge"), MERGES)
def test_bidirectional(kind, mask, merge, fused):
    options = SEQUENCES if merge != "ave" else {}
    ours, theirs = twins(lambda module: module.Bidirectional(getattr(module, kind)(H, **options), merge_mode=merge))
    num_states = 4 if kind == "LSTM" else 2
    assert_same(ours, theirs, *arrays(num_states if merge != "ave" else 0), mask=MASKS[mask])
    assert len(fused) == 1
    assert fused[0].bidirectional


def outcome(call):
    """The result of a call, or the type of its error."""
    try:
        return keras.ops.convert_to_numpy(call())
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_bidirectional_with_states_that_are_no_list_of_tensors(kind, fused):
    """Has Keras's results and errors."""
    ours, theirs = twins(lambda module: module.Bidirectional(getattr(module, kind)(H)))
    x, states = arrays(4 if kind == "LSTM" else 2)
    for initial in (keras.ops.convert_to_tensor(np.stack(states)), [None] * len(states)):
        outcomes = [outcome(lambda: layer(x, initial_state=initial)) for layer in (ours, theirs)]  # noqa: B023
        assert all(isinstance(each, type) for each in outcomes) or np.array_equal(*outcomes)
        assert not isinstance(outcomes[0], type) or outcomes[0] is outcomes[1]
    assert not fused


@pytest.mark.parametrize(("name", "value"), [("return_sequences", False), ("return_state", True)])
def test_bidirectional_whose_options_are_not_those_of_its_layers(name, value, fused):
    """As when a user changes an attribute of the wrapper alone."""
    ours, theirs = twins(lambda module: module.Bidirectional(module.GRU(H, return_sequences=True), merge_mode="sum"))
    x, _ = arrays(0)
    for layer in (ours, theirs):
        setattr(layer, name, value)
    results = [layer.call(keras.ops.convert_to_tensor(x)) for layer in (ours, theirs)]
    for own, other in zip(*map(keras.tree.flatten, results), strict=True):
        assert_within(*map(keras.ops.convert_to_numpy, (own, other)), *tolerance("float32", I + H))
    assert not any(spec.bidirectional for spec in fused)


def test_bidirectional_of_different_layers(fused):
    """Each direction runs by itself."""

    def make(module):
        backward = module.GRU(3, go_backwards=True, return_sequences=True)
        return module.Bidirectional(module.LSTM(H, return_sequences=True), backward_layer=backward)

    ours, theirs = twins(make)
    assert_same(ours, theirs, arrays(0)[0], mask=MASKS["holes"])
    assert {(spec.mode, spec.bidirectional) for spec in fused} == {("lstm", False), ("gru", False)}


SUPPORTED_WITH_CUDNN = {"torch": [("LSTM", {}), ("GRU", {}), ("GRU", {"unroll": True})], "jax": [("GRU", {})]}


@EVERYWHERE
@pytest.mark.skipif(IS_OLD, reason="Keras refuses use_cudnn=True in other layers")
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {}),
        ("GRU", {}),
        ("GRU", {"unroll": True}),
        ("GRU", {"reset_after": False}),
        ("LSTM", {"recurrent_dropout": 0.5}),
    ],
)
def test_a_layer_that_requires_cudnn(kind, options, wrapped, fused):
    """Runs where Keras runs it, and raises Keras's error elsewhere."""

    def make(module):
        layer = getattr(module, kind)(H, use_cudnn=True, **options)
        return module.Bidirectional(layer) if wrapped else layer

    ours, theirs = twins(make)
    x = keras.ops.convert_to_tensor(arrays(0)[0])
    is_supported = (kind, options) in SUPPORTED_WITH_CUDNN[keras.backend.backend()]
    if is_supported:
        results = [keras.ops.convert_to_numpy(layer(x)) for layer in (ours, theirs)]
        assert_within(*results, *tolerance("float32", I + H))
        assert fused
    for masks in [{"mask": keras.ops.convert_to_tensor(MASKS["holes"])}, *[{}] * (not is_supported)]:
        for layer in (ours, theirs):
            with pytest.raises(ValueError, match="use_cudnn=True was specified"):
                layer(x, **masks)
    report = fusedrnn.keras.accelerate(getattr(layers, kind)(H, use_cudnn=True, **options))
    assert [layer.reason for layer in report.unchanged] == ["it has use_cudnn=True"] * (not is_supported)


def masked_models():
    """Models that mask steps of zeros, and an input (2, N, T, I) with such steps."""
    for make in (lambda: fusedrnn.keras.GRU(H), lambda: fusedrnn.keras.Bidirectional(fusedrnn.keras.LSTM(H))):
        inputs = keras.Input((T, I))
        yield keras.Model(inputs, make()(layers.Masking()(inputs)))


def masked_input():
    return np.stack([arrays(0)[0] * MASKS[mask][..., None] for mask in ("holes", "right")]).astype("float32")


@EVERYWHERE
def test_masks_in_mapped_functions():
    """Whose values are not known."""
    x = keras.ops.convert_to_tensor(masked_input())
    for model in masked_models():
        y = keras.ops.vectorized_map(model.call, x)
        expected = keras.ops.stack([model(each) for each in x])
        assert_within(*map(keras.ops.convert_to_numpy, (y, expected)), *tolerance("float32", I + H))


def test_masks_in_traced_functions():
    from torch.fx.experimental.proxy_tensor import make_fx

    x = keras.ops.convert_to_tensor(masked_input())
    for model in masked_models():
        graph = make_fx(model)(x[0])
        assert sum(str(node.target).startswith("fusedrnn.") for node in graph.graph.nodes) == 1
        results = [keras.ops.convert_to_numpy(call(x[1])) for call in (graph, model)]
        assert_within(*results, *tolerance("float32", I + H))


@EVERYWHERE
@pytest.mark.parametrize("merge", ["concat", None])
def test_bidirectional_of_which_one_is_unrolled(merge, fused):
    """An unrolled loop on JAX starts from zeros where steps are masked."""

    def make(module):
        backward = module.LSTM(H, go_backwards=True, unroll=True)
        return module.Bidirectional(module.LSTM(H), merge_mode=merge, backward_layer=backward)

    ours, theirs = twins(make)
    mask = np.array([[0] * 5, [1] * 5, [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], bool)
    # Keras fails on PyTorch when it unrolls the loop backwards with a mask.
    assert_same(ours, theirs, *arrays(4), mask=mask if keras.backend.backend() == "jax" else None)
    assert {spec.bidirectional for spec in fused} == {False}


def doubled(base):
    """A subclass with a call of its own."""

    class Doubled(base):
        def call(self, sequences, initial_state=None, mask=None, training=False):
            return 2 * super().call(sequences, initial_state, mask, training)

    return Doubled


def from_ones(base):
    """A subclass with initial states of its own."""

    class FromOnes(base):
        def get_initial_state(self, batch_size):
            return [keras.ops.ones_like(state) for state in super().get_initial_state(batch_size)]

    return FromOnes


@EVERYWHERE
@pytest.mark.parametrize("subclass", [doubled, from_ones])
def test_bidirectional_of_subclasses(subclass, fused):
    def make(module):
        cls = subclass(module.GRU)
        with keras.saving.custom_object_scope({cls.__name__: cls}):
            return module.Bidirectional(cls(H), backward_layer=cls(H, go_backwards=True))

    ours, theirs = twins(make)
    assert_same(ours, theirs, arrays(0)[0])
    assert {spec.bidirectional for spec in fused} == {False}


@EVERYWHERE
def test_bidirectional_of_a_layer_with_its_own_call(fused):
    ours, _ = twins(lambda module: module.Bidirectional(module.GRU(H), merge_mode="sum"))
    x, _ = arrays(0)
    expected = keras.ops.convert_to_numpy(ours(x))
    for layer in (ours.forward_layer, ours.backward_layer):
        layer.call = lambda *given, call=layer.call, **options: 2 * call(*given, **options)
    assert_within(keras.ops.convert_to_numpy(ours(x)), 2 * expected, *tolerance("float32", I + H))
    assert [spec.bidirectional for spec in fused] == [True, False, False]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks(register, fused):
    """PyTorch's, of the layers in Bidirectional and of cells, as Keras calls them."""
    for make in (
        lambda module: module.Bidirectional(module.GRU(H)),
        lambda module: module.RNN(layers.GRUCell(H)),
    ):
        ours, theirs = twins(make)
        calls = {}
        for layer in (ours, theirs):
            calls[layer] = []
            hooked = layer.backward_layer if hasattr(layer, "backward_layer") else layer.cell
            getattr(hooked, register)(lambda *given, own=calls[layer]: own.append(type(given[0])))
            layer(arrays(0)[0])
        assert len(calls[ours]) == len(calls[theirs]) > 0
    assert not any(spec.bidirectional for spec in fused)


STACKS = {
    "cell": lambda: layers.GRUCell(H),
    "cells": lambda: [layers.LSTMCell(H), layers.LSTMCell(H)],
    "mixed": lambda: [layers.SimpleRNNCell(3), layers.GRUCell(H)],
}


@pytest.mark.parametrize(
    ("stack", "mask"), [("cell", "none"), pytest.param("cells", "holes", marks=EVERYWHERE), ("mixed", "left")]
)
def test_rnn_of_cells(stack, mask, fused):
    ours, theirs = twins(lambda module: module.RNN(STACKS[stack](), **SEQUENCES))
    assert_same(ours, theirs, arrays(0)[0], mask=MASKS[mask])
    assert fused


REGULARIZED = {
    "cell": lambda: layers.GRUCell(H, activity_regularizer="l2"),
    "cell of a stack": lambda: [layers.LSTMCell(H), layers.LSTMCell(H, activity_regularizer="l2")],
    "stack": lambda: layers.StackedRNNCells([layers.LSTMCell(H), layers.LSTMCell(H)], activity_regularizer="l2"),
}


@pytest.mark.parametrize("what", REGULARIZED)
@pytest.mark.parametrize("wrapped", [False, True])
def test_activity_regularizer_of_a_cell(wrapped, what, fused):
    """Has a loss for the output of each step."""

    def make(module):
        layer = module.RNN(REGULARIZED[what]())
        return module.Bidirectional(layer) if wrapped else layer

    ours, theirs = twins(make)
    x, _ = arrays(0)
    for layer in (ours, theirs):
        layer(x)
    losses = [keras.ops.convert_to_numpy(keras.ops.stack(layer.losses)) for layer in (ours, theirs)]
    assert len(losses[0]) > T
    assert_within(*losses, *tolerance("float32", I + H))
    assert not fused


@pytest.mark.parametrize("kind", ["LSTM", pytest.param("GRU", marks=EVERYWHERE), "SimpleRNN"])
def test_dropout_has_the_masks_of_keras(kind, fused):
    ours, theirs = twins(lambda module: getattr(module, kind)(H, dropout=0.5, seed=3, **SEQUENCES))
    assert_same(ours, theirs, arrays(0)[0], mask=MASKS["left"], training=True)
    assert fused


@EVERYWHERE
def test_dropout_of_bidirectional(fused):
    """Also after inference, where Keras draws masks and does not use them."""
    ours, theirs = twins(lambda module: module.Bidirectional(module.LSTM(H, dropout=0.5, seed=3)))
    for training in (True, False, True):
        assert_same(ours, theirs, arrays(0)[0], training=training)
    assert {spec.bidirectional for spec in fused} == {False, True}


def test_dropout_of_states_runs_keras_in_training_only(fused):
    ours, theirs = twins(lambda module: module.GRU(H, recurrent_dropout=0.5, seed=3))
    assert_same(ours, theirs, arrays(0)[0], training=True)
    assert not fused
    assert_same(ours, theirs, arrays(0)[0])
    assert fused


@pytest.mark.parametrize("kind", ["LSTM", pytest.param("SimpleRNN", marks=EVERYWHERE)])
def test_stateful(kind, fused):
    # Keras's fast loops on PyTorch overwrite the states that their backward needs.
    options = {"stateful": True, "return_sequences": True} | ({} if kind == "SimpleRNN" else {"use_cudnn": False})
    ours, theirs = twins(lambda module: getattr(module, kind)(H, **options))
    for _ in range(2):
        assert_same(ours, theirs, arrays(0)[0])
        states = [keras.ops.convert_to_numpy(keras.ops.stack(layer.states)) for layer in (ours, theirs)]
        assert_within(*states, *tolerance("float32", I + H))
    assert fused


def replaced_gradients(layer, x, names):
    """The output of a layer of which half the value of some weights is in their place, and the gradients of these."""
    cell, values = layer.cell, [getattr(layer.cell, name).value for name in names]
    operands = [keras.ops.convert_to_numpy(value) for value in values]

    def call(*values):
        for name, value in zip(names, values, strict=True):
            setattr(cell, name, 0.5 * value)
        return layer(x)

    if keras.backend.backend() == "jax":
        import jax

        y, transpose = jax.vjp(call, *operands)
        return [keras.ops.convert_to_numpy(array) for array in (y, *transpose(jax.numpy.cos(y)))]
    import torch

    operands = [torch.tensor(value, requires_grad=True) for value in operands]
    y = call(*operands)
    gradients = torch.autograd.grad(y, operands, y.detach().cos())
    return [keras.ops.convert_to_numpy(array) for array in (y, *gradients)]


@EVERYWHERE
@pytest.mark.parametrize("names", [("recurrent_kernel",), ("kernel", "recurrent_kernel", "bias")])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_tensors_in_place_of_variables(kind, names, fused):
    """As weight drop and weight normalization put them."""
    ours, theirs = twins(lambda module: getattr(module, kind)(H))
    x = keras.ops.convert_to_tensor(arrays(0)[0])
    results = [replaced_gradients(layer, x, names) for layer in (ours, theirs)]
    spec = fusedrnn.RNNSpec("lstm", I, H)
    assert_within(results[0][0], results[1][0], *tolerance("float32", I + H))
    for array, other in zip(*[gradients for _, *gradients in results], strict=True):
        assert_within(array, other, *gradient_tolerance("float32", spec, T, N, np.abs(other).max()))
    assert len(fused) == 1


@EVERYWHERE
def test_bfloat16(fused):
    """Products have bfloat16 operands, as Keras's have; states are not rounded from step to step."""
    ours, theirs = twins(lambda module: module.LSTM(H, dtype="mixed_bfloat16", **SEQUENCES))
    exact = layers.LSTM(H, **SEQUENCES)
    exact.build((N, T, I))
    exact.set_weights(theirs.get_weights())
    x, _ = arrays(0)
    results = [outputs_and_gradients(layer, x) for layer in (ours, theirs, exact)]
    assert {spec.compute for spec in fused} == {"bfloat16"}
    for own, rounded, right in zip(*[outputs + gradients for outputs, gradients in results], strict=True):
        error, limit = (np.linalg.norm(array.astype("float64") - right) for array in (own, rounded))
        assert error <= 1.5 * limit + 2.0**-8 * np.linalg.norm(right)


def test_a_single_step_is_no_loop(fused):
    ours, theirs = twins(lambda module: module.LSTM(H, **SEQUENCES))
    x, states = arrays(2)
    assert_same(ours, theirs, x[:, :1], states)
    assert not fused


@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"dtype": "mixed_float16"}])
def test_keras_own_loop(options, fused):
    """Of other activations and dtypes."""
    ours, theirs = twins(lambda module: module.LSTM(H, **options))
    x, _ = arrays(0)
    np.testing.assert_array_equal(*[keras.ops.convert_to_numpy(layer(x)) for layer in (ours, theirs)])
    assert not fused
