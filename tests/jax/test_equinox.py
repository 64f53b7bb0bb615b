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


def random(*shape, seed=1, dtype=None):
    """Numbers of NumPy, since JAX compiles a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def make(module_class, use_bias=True):
    """A module with random parameters."""
    module = eqx.filter_eval_shape(lambda: module_class(I, H, use_bias, key=KEY))
    leaves, structure = jax.tree.flatten(module)
    return jax.tree.unflatten(structure, [0.5 * random(*leaf.shape, seed=n) for n, leaf in enumerate(leaves)])


def random_state(layer_class):
    h, c = random(2, H, seed=2)
    return (h, c) if layer_class is ours.LSTM else h


def scan(cell, x, state):
    """The cell over the steps: outputs and the state after each step."""

    def step(state, x):
        state = cell(x, state)
        return state, state

    _, states = jax.lax.scan(step, state, x)
    return jax.tree.leaves(states)[0], states


def final_of_scan(cell, x, state):
    y, states = scan(cell, x, state)
    return y, jax.tree.map(lambda state: state[-1], states)


def spec_of(layer_class, dtype="float32"):
    return RNNSpec("lstm" if layer_class is ours.LSTM else "gru", I, H, dtype=dtype)


def assert_close(actual, expected, limits):
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        array, other = np.asarray(array), np.asarray(other)
        assert array.dtype == other.dtype
        message = difference(array, other, *limits(float(np.abs(other).max(initial=0))))
        assert message is None, message


@pytest.mark.parametrize(("layer_class", "use_bias"), [(ours.LSTM, True), (ours.GRU, True), (ours.GRU, False)])
def test_outputs_states_and_gradients(layer_class, use_bias):
    """In float64, gradients of all parameters, the input and the state."""
    spec = spec_of(layer_class, "float64")
    with enable_x64():
        layer = make(layer_class, use_bias)
        cell = layer.to_cell()
        assert type(cell) is CELLS[layer_class]
        x, state = random(T, I), random_state(layer_class)
        dy = random(T, H, seed=3)

        def results(module, run):
            def loss(operands):
                y, final = run(*operands)
                return (y * dy).sum() + sum((leaf**2).sum() for leaf in jax.tree.leaves(final)), (y, final)

            return eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))((module, x, state))

        gradients, outputs = results(layer, lambda layer, x, state: layer(x, state))
        (cell_gradient, *others), expected = results(cell, final_of_scan)
    assert_close(outputs, expected, lambda scale: tolerance("float64", longest_sum(spec)))
    assert len(jax.tree.leaves(cell_gradient)) == (2 if not use_bias else 3 + (layer_class is ours.GRU))
    assert_close(gradients, (cell_gradient, *others), lambda scale: gradient_tolerance("float64", spec, T, 1, scale))


@each_layer
def test_vmap_is_one_call(layer_class):
    layer, xs = make(layer_class), random(N, T, I)
    lengths, state = jnp.array([6, 0, 4, 1]), random_state(layer_class)

    mapped = jax.vmap(lambda x, length: layer(x, state, length=length))
    assert str(jax.make_jaxpr(mapped)(xs, lengths)).count("fusedrnn[") == 1
    y, final = jax.jit(mapped)(xs, lengths)
    expected, states = jax.jit(jax.vmap(lambda x: scan(layer.to_cell(), x, state)))(xs)
    limits = tolerance("float32", longest_sum(spec_of(layer_class)))
    for n, length in enumerate([6, 0, 4, 1]):
        own_final = jax.tree.map(lambda leaf, n=n: leaf[n], final)
        assert not np.asarray(y)[n, length:].any()
        if length == 0:
            assert_close(own_final, state, lambda scale: (0.0, 0.0))
            continue
        last = jax.tree.map(lambda leaf, n=n, length=length: leaf[n, length - 1], states)
        assert_close((y[n, :length], own_final), (expected[n, :length], last), lambda scale: limits)


@each_layer
@pytest.mark.parametrize("wide", ["x", "state", "parameters"])
def test_dtypes_promote_as_in_the_cell(layer_class, wide):
    dtypes = dict.fromkeys(["x", "state", "parameters"], jnp.float32) | {wide: jnp.float64}
    with enable_x64():
        layer = jax.tree.map(lambda leaf: leaf.astype(dtypes["parameters"]), make(layer_class))
        x = random(T, I).astype(dtypes["x"])
        state = jax.tree.map(lambda leaf: leaf.astype(dtypes["state"]), random_state(layer_class))
        actual = layer(x, state)
        operands = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (layer.to_cell(), x, state))
        expected = final_of_scan(*operands)
    assert_close(actual, expected, lambda scale: tolerance("float64", longest_sum(spec_of(layer_class, "float64"))))


@each_layer
def test_no_promotion_of_ranks(layer_class):
    state = random_state(layer_class)
    with jax.numpy_rank_promotion("raise"):
        mapped = jax.vmap(lambda x, length: make(layer_class)(x, state, length=length)[0])
        assert mapped(random(N, T, I), jnp.array([6, 0, 4, 1])).shape == (N, T, H)


@each_layer
def test_reverse(layer_class):
    layer, x = make(layer_class), random(T, I)
    y, final = layer(x, reverse=True)
    flipped, expected_final = layer(x[::-1])
    for array, other in zip(jax.tree.leaves((y[::-1], final)), jax.tree.leaves((flipped, expected_final)), strict=True):
        np.testing.assert_array_equal(array, other)


def test_a_layer_shares_the_arrays_of_a_cell():
    cell = make(eqx.nn.GRUCell)
    layer = ours.GRU.from_cell(cell)
    assert all(a is b for a, b in zip(jax.tree.leaves(layer), jax.tree.leaves(cell), strict=True))
    paths = [[path for path, _ in jax.tree.leaves_with_path(module)] for module in (layer, cell)]
    assert paths[0] == paths[1]
    own = eqx.filter_eval_shape(lambda: ours.GRU(I, H, key=KEY))
    assert jax.tree.structure(layer) == jax.tree.structure(own)


def test_an_ensemble_is_mapped():
    pair, xs = [make(ours.LSTM, False) for _ in range(2)], random(2, T, I)
    ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair)
    y, _ = eqx.filter_vmap(lambda layer, x: layer(x))(ensemble, xs)
    np.testing.assert_array_equal(y[1], pair[1](xs[1])[0])


WRONG_ARRAYS = {
    "ensemble": (ours.LSTM, "weight_ih", lambda w: w[None], r"weight_ih must have .*; got \(1, 20, 3\): map over"),
    "transposed": (ours.LSTM, "weight_ih", lambda w: w.T, r"weight_ih must have shape \(20, 3\); got \(3, 20\)"),
    "gates": (ours.LSTM, "weight_ih", lambda w: w.reshape(4, H, I), r"weight_ih must have .*; got \(4, 5, 3\)"),
    "truncated": (ours.GRU, "weight_hh", lambda w: w[:-1], r"weight_hh must have shape \(15, 5\); got \(14, 5\)"),
    "bias": (ours.LSTM, "bias", lambda b: b[:H], r"bias must have shape \(20,\); got \(5,\)"),
    "bias_n": (ours.GRU, "bias_n", lambda b: b[:1], r"bias_n must have shape \(5,\); got \(1,\)"),
    "no LSTM bias": (ours.LSTM, "bias", lambda b: None, r"bias must have shape \(20,\); got None"),
    "no GRU bias": (ours.GRU, "bias", lambda b: None, r"bias must have shape \(15,\); got None"),
    "no bias_n": (ours.GRU, "bias_n", lambda b: None, r"bias_n must have shape \(5,\); got None"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_arrays_of_a_wrong_shape(case):
    layer_class, field, change, message = WRONG_ARRAYS[case]
    layer = eqx.tree_at(lambda layer: getattr(layer, field), make(layer_class), replace_fn=change)
    with pytest.raises(ValueError, match=message):
        layer(X)


@each_layer
def test_biases_without_use_bias_are_not_read(layer_class):
    """As the cell does not read them."""
    layer = make(layer_class, False)
    biased = eqx.tree_at(lambda layer: layer.bias, layer, jnp.ones(3), is_leaf=lambda leaf: leaf is None)
    np.testing.assert_array_equal(biased(X)[0], layer(X)[0])


LAYER = make(ours.LSTM)
X = jnp.ones((T, I))
ERRORS = {
    "x": (lambda: LAYER(X[None]), ValueError, r"x must have shape \(T, 3\); got \(1, 6, 3\): map .* jax\.vmap"),
    "state": (lambda: LAYER(X, (X[0], X[0])), ValueError, r"state must have shape \(5,\); got \(3,\)"),
    "states": (lambda: LAYER(X, jnp.ones(H)), TypeError, r"state must be \(h, c\)"),
    "length": (lambda: LAYER(X, length=jnp.array([3])), ValueError, r"length must have shape \(\); got \(1,\)"),
    "long": (lambda: LAYER(X, length=7), ValueError, "lengths must be from 0 to 6"),
    "dtype": (lambda: LAYER(X.astype(complex)), TypeError, "x and the parameters must give float32 or float64"),
    "complex": (
        lambda: LAYER(X, (jnp.ones(H), jnp.ones(H, complex))), TypeError, "the parameters and the state .* complex64"
    ),
    "cell": (lambda: ours.GRU.from_cell(LAYER), TypeError, r"cell must be an equinox\.nn\.GRUCell; got LSTM"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_messages(case):
    run, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        run()


def test_a_length_of_64_bits_is_not_cut():
    with pytest.raises(ValueError, match="lengths must be from 0 to 6; got"):
        make(ours.GRU)(random(T, I), length=np.int64(2**32 + 1))
