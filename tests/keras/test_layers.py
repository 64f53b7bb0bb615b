"""LSTM, GRU, SimpleRNN, Bidirectional and RNN against Keras's own: outputs, states and all gradients."""

import keras
import numpy as np
import pytest
from keras import layers

import fusedrnn.keras
from fusedrnn.testing.tolerance import gradient_tolerance, longest_sum, tolerance
from keras_calls import assert_within, outputs_and_gradients

N, T, I, H = 4, 7, 5, 6
RNG = np.random.default_rng(0)
LENGTHS = np.array([7, 3, 1, 0])
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
    "no-bias": {**SEQUENCES, "use_bias": False},
    "relu": {**SEQUENCES, "activation": "relu"},
}  # fmt: skip
CASES = [
    *[(kind, "sequences", mask, states) for kind in KINDS for mask in ("none", "holes") for states in (False, True)],
    *[("GRU", name, mask, True) for name in ("plain", "backwards", "last-backwards") for mask in ("none", "left")],
    *[("LSTM", name, mask, True) for name in ("zeros", "last-zeros", "sequences") for mask in ("full", "right")],
    *[("SimpleRNN", name, "left", True) for name in ("zeros", "last-zeros", "plain")],
    *[("LSTM", name, "none", False) for name in ("no-bias", "relu", "unrolled")],
    *[(kind, "no-bias", "none", False) for kind in ("GRU", "SimpleRNN")],
    ("SimpleRNN", "relu", "none", False),
    ("GRU", "unrolled", "holes", True),
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


@pytest.mark.parametrize(("kind", "options", "mask", "with_states"), CASES)
def test_layers(kind, options, mask, with_states, fused):
    ours, theirs = twins(lambda module, **given: getattr(module, kind)(H, **given), **OPTIONS[options])
    x, states = arrays(2 if kind == "LSTM" else 1)
    assert [weight.path for weight in ours.weights] == [
        weight.path.replace(theirs.name, ours.name) for weight in theirs.weights
    ]
    assert_same(ours, theirs, x, states if with_states else None, MASKS[mask])
    assert len(fused) == 2 if keras.backend.backend() == "jax" else 1


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind, fused):
    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    try:
        ours, theirs = twins(lambda module: getattr(module, kind)(H, dtype="float64", **SEQUENCES))
        assert_same(ours, theirs, arrays(0, "float64")[0], dtype="float64")
    finally:
        if keras.backend.backend() == "jax":
            jax.config.update("jax_enable_x64", False)
    assert {spec.dtype for spec in fused} == {"float64"}


@pytest.mark.parametrize(
    "activation", ["sigmoid", "linear", "hard_sigmoid", "softsign", "softplus", "elu", "leaky_relu"]
)
def test_activations(activation, fused):
    ours, theirs = twins(
        lambda module: module.GRU(H, activation=activation, recurrent_activation="hard_sigmoid", reset_after=False)
    )
    assert_same(ours, theirs, arrays(0)[0], mask=MASKS["holes"])
    assert fused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["none", "right", "holes"])
@pytest.mark.parametrize("merge", ["concat", "ave", None])
def test_bidirectional(kind, mask, merge, fused):
    options = SEQUENCES if merge != "ave" else {}
    ours, theirs = twins(
        lambda module: module.Bidirectional(getattr(module, kind)(H, **options), merge_mode=merge)
    )
    num_states = 4 if kind == "LSTM" else 2
    assert_same(ours, theirs, *arrays(num_states if merge is None else 0), mask=MASKS[mask])
    assert fused
    assert all(spec.bidirectional for spec in fused)


def test_bidirectional_of_different_layers(fused):
    """Each direction runs by itself."""

    def make(module):
        backward = module.GRU(3, go_backwards=True, return_sequences=True)
        return module.Bidirectional(module.LSTM(H, return_sequences=True), backward_layer=backward)

    ours, theirs = twins(make)
    assert_same(ours, theirs, arrays(0)[0], mask=MASKS["holes"])
    assert {(spec.mode, spec.bidirectional) for spec in fused} == {("lstm", False), ("gru", False)}


STACKS = {
    "cell": lambda: layers.GRUCell(H),
    "cells": lambda: [layers.LSTMCell(H), layers.LSTMCell(H)],
    "mixed": lambda: [layers.SimpleRNNCell(3), layers.GRUCell(H)],
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("mask", ["none", "holes"])
def test_rnn_of_cells(stack, mask, fused):
    ours, theirs = twins(lambda module: module.RNN(STACKS[stack](), **SEQUENCES))
    assert_same(ours, theirs, arrays(0)[0], mask=MASKS[mask])
    assert fused


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_has_the_masks_of_keras(kind, fused):
    ours, theirs = twins(lambda module: getattr(module, kind)(H, dropout=0.5, seed=3, **SEQUENCES))
    assert_same(ours, theirs, arrays(0)[0], mask=MASKS["left"], training=True)
    assert fused


def test_dropout_of_bidirectional(fused):
    ours, theirs = twins(lambda module: module.Bidirectional(module.LSTM(H, dropout=0.5, seed=3)))
    assert_same(ours, theirs, arrays(0)[0], training=True)
    assert fused


def test_dropout_of_states_runs_keras_in_training_only(fused):
    ours, theirs = twins(lambda module: module.GRU(H, recurrent_dropout=0.5, seed=3))
    assert_same(ours, theirs, arrays(0)[0], training=True)
    assert not fused
    assert_same(ours, theirs, arrays(0)[0])
    assert fused


@pytest.mark.parametrize("kind", KINDS)
def test_stateful(kind, fused):
    ours, theirs = twins(lambda module: getattr(module, kind)(H, stateful=True, return_sequences=True))
    for _ in range(2):
        assert_same(ours, theirs, arrays(0)[0])
        states = [keras.ops.convert_to_numpy(keras.ops.stack(layer.states)) for layer in (ours, theirs)]
        assert_within(*states, *tolerance("float32", I + H))
    for layer in (ours, theirs):
        layer.reset_state()
    assert_same(ours, theirs, arrays(0)[0])
    assert fused


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


@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"dtype": "float16"}])
def test_keras_own_loop(options, fused):
    """Of other activations and dtypes."""
    ours, theirs = twins(lambda module: module.LSTM(H, **options))
    x, _ = arrays(0)
    np.testing.assert_array_equal(*[keras.ops.convert_to_numpy(layer(x)) for layer in (ours, theirs)])
    assert not fused
