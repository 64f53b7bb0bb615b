"""``fusedrnn.jax.eqx`` against scans of Equinox's cells: outputs, states, gradients, one call under vmap."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusedrnn import RNNSpec
from fusedrnn.jax import eqx as ours
from fusedrnn.testing.tolerance import difference, gradient_tolerance, longest_sum, tolerance
from jax_versions import enable_x64

T, N, I, H = 6, 4, 3, 5
CELLS = {ours.LSTM: eqx.nn.LSTMCell, ours.GRU: eqx.nn.GRUCell}
KEY = jax.random.key(0)
each_layer = pytest.mark.parametrize("layer_class", CELLS)


def random(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def random_state(layer_class):
    h, c = random(2, H, seed=2)
    return (h, c) if layer_class is ours.LSTM else h


def scan(cell, x, state):
    """The cell over the steps: outputs and the final state."""

    def step(state, x):
        state = cell(x, state)
        return state, jax.tree.leaves(state)[0]

    final, y = jax.lax.scan(step, state, x)
    return y, final


def spec_of(layer_class, dtype="float32"):
    return RNNSpec("lstm" if layer_class is ours.LSTM else "gru", I, H, dtype=dtype)


def assert_close(actual, expected, limits):
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        array, other = np.asarray(array), np.asarray(other)
        assert array.dtype == other.dtype
        message = difference(array, other, *limits(float(np.abs(other).max(initial=0))))
        assert message is None, message


@pytest.mark.parametrize("use_bias", [True, False])
@each_layer
def test_outputs_states_and_gradients(layer_class, use_bias):
    """In float64, gradients of all parameters, the input and the state."""
    spec = spec_of(layer_class, "float64")
    with enable_x64():
        layer = layer_class(I, H, use_bias, key=KEY)
        cell = CELLS[layer_class](I, H, use_bias, key=KEY)
        assert eqx.tree_equal(layer.to_cell(), cell)
        x, state = random(T, I), random_state(layer_class)
        dy = random(T, H, seed=3)

        def results(module, run):
            def loss(operands):
                y, final = run(*operands)
                return (y * dy).sum() + sum((leaf**2).sum() for leaf in jax.tree.leaves(final)), (y, final)

            return eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))((module, x, state))

        gradients, outputs = results(layer, lambda layer, x, state: layer(x, state))
        (cell_gradient, *others), expected = results(cell, scan)
    assert_close(outputs, expected, lambda scale: tolerance("float64", longest_sum(spec)))
    assert len(jax.tree.leaves(cell_gradient)) == (2 if not use_bias else 3 + (layer_class is ours.GRU))
    assert_close(gradients, (cell_gradient, *others), lambda scale: gradient_tolerance("float64", spec, T, 1, scale))


@each_layer
def test_vmap_is_one_call(layer_class):
    layer, xs = layer_class(I, H, key=KEY), random(N, T, I)
    lengths, state = jnp.array([6, 0, 4, 1]), random_state(layer_class)

    def run(x, length):
        return layer(x, state, length=length)

    mapped = jax.vmap(run)
    assert str(jax.make_jaxpr(mapped)(xs, lengths)).count("fusedrnn[") == 1
    y, final = jax.jit(mapped)(xs, lengths)
    limits = tolerance("float32", longest_sum(spec_of(layer_class)))
    for index, length in enumerate([6, 0, 4, 1]):
        own_y, own_final = jax.tree.map(lambda leaf, index=index: leaf[index], (y, final))
        assert not np.asarray(own_y[length:]).any()
        # A sequence without steps keeps its state.
        expected = scan(layer.to_cell(), xs[index, :length], state) if length else (own_y[:0], state)
        assert_close((own_y[:length], own_final), expected, lambda scale: limits)


@each_layer
def test_reverse(layer_class):
    layer, x = layer_class(I, H, key=KEY), random(T, I)
    y, final = layer(x, reverse=True)
    flipped, expected_final = layer(x[::-1])
    for array, other in zip(jax.tree.leaves((y[::-1], final)), jax.tree.leaves((flipped, expected_final)), strict=True):
        np.testing.assert_array_equal(array, other)


def test_a_layer_shares_the_arrays_of_a_cell():
    cell = eqx.nn.GRUCell(I, H, key=KEY)
    layer = ours.GRU.from_cell(cell)
    assert all(a is b for a, b in zip(jax.tree.leaves(layer), jax.tree.leaves(cell), strict=True))
    paths = [[path for path, _ in jax.tree.leaves_with_path(module)] for module in (layer, cell)]
    assert paths[0] == paths[1]
    assert jax.tree.structure(layer) == jax.tree.structure(ours.GRU(I, H, key=KEY))


def test_an_ensemble_is_mapped():
    layers = eqx.filter_vmap(lambda key: ours.LSTM(I, H, key=key))(jax.random.split(KEY, 2))
    xs = random(2, T, I)
    y, _ = eqx.filter_vmap(lambda layer, x: layer(x))(layers, xs)
    second = jax.tree.map(lambda leaf: leaf[1], layers)
    np.testing.assert_array_equal(y[1], second(xs[1])[0])


LAYER = ours.LSTM(I, H, key=KEY)
X = jnp.ones((T, I))
ERRORS = {
    "x": (lambda: LAYER(X[None]), ValueError, r"x must have shape \(T, 3\); got \(1, 6, 3\): map .* jax\.vmap"),
    "state": (lambda: LAYER(X, (X[0], X[0])), ValueError, r"state must have shape \(5,\); got \(3,\)"),
    "states": (lambda: LAYER(X, jnp.ones(H)), TypeError, r"state must be \(h, c\)"),
    "length": (lambda: LAYER(X, length=jnp.array([3])), ValueError, r"length must have shape \(\); got \(1,\)"),
    "long": (lambda: LAYER(X, length=7), ValueError, "lengths must be from 0 to 6"),
    "dtype": (lambda: LAYER(X.astype(complex)), TypeError, "x and the parameters must give float32 or float64"),
    "cell": (lambda: ours.GRU.from_cell(LAYER), TypeError, r"cell must be an equinox\.nn\.GRUCell; got LSTM"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_messages(case):
    run, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        run()
