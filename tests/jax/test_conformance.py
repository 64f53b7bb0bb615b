"""``fusedrnn.jax.rnn`` against torch.nn and the reference: outputs, final states and all gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusedrnn
from conformance import SHAPES, TRAINING_SHAPES, Conformance, TrainingConformance
from fusedrnn.jax import rnn
from fusedrnn.spec import MODES
from jax_versions import enable_x64

pytestmark = [pytest.mark.usefixtures("use_all_threads"), pytest.mark.pairwise]


@pytest.fixture(autouse=True)
def two_threads():
    before = fusedrnn.get_num_threads()
    fusedrnn.set_num_threads(2)
    yield
    fusedrnn.set_num_threads(before)


def _each_shape_once(test, shapes):
    """A test of the suite on all shapes, each in one mode in turn: the engine has the suite in all modes."""

    def own(self, mode, shape):
        test(self, mode, shape)

    pairs = [(MODES[number % len(MODES)], shape) for number, shape in enumerate(shapes)]
    return pytest.mark.parametrize(("mode", "shape"), pairs, ids=str)(own)


def in_numpy(tree):
    return jax.tree.map(np.asarray, tree)


class TestForward(Conformance):
    test_forward = _each_shape_once(Conformance.test_forward, SHAPES)

    def run(self, spec, x, params, states, lengths):
        with enable_x64():
            y, final = rnn(spec, params, x, states, lengths)
            return in_numpy((y, final))


class TestGradients(TrainingConformance):
    keeps = ("gates",)
    test_dropout = test_requests = None
    test_gradients = _each_shape_once(TrainingConformance.test_gradients, TRAINING_SHAPES)

    def train(self, spec, x, params, states, lengths, keep, seed):
        zeros = tuple(np.zeros(shape, x.dtype) for shape in spec.state_shape(x.shape[1]))
        with enable_x64():
            (y, final), vjp = jax.vjp(
                lambda x, params, states: rnn(spec, params, x, states, lengths), x, params, states or zeros
            )

        def backward(dy, dstates):
            with enable_x64():
                dy = jnp.zeros_like(y) if dy is None else jnp.asarray(dy)
                dstates = dstates or (None,) * len(final)
                cotangents = tuple(
                    jnp.zeros_like(state) if gradient is None else jnp.asarray(gradient)
                    for state, gradient in zip(final, dstates, strict=True)
                )
                return in_numpy(vjp((dy, cotangents)))

        return *in_numpy((y, final)), backward


def test_without_initial_states_there_are_no_gradients_of_them():
    spec = fusedrnn.RNNSpec("lstm", 3, 5)
    params, x = jnp.ones(spec.layout.size) / 9, jnp.ones((4, 2, 3))
    with_states = jax.grad(lambda x: rnn(spec, params, x, (jnp.zeros((1, 2, 5)),) * 2)[0].sum())(x)
    without = jax.grad(lambda x: rnn(spec, params, x)[0].sum())(x)
    np.testing.assert_array_equal(with_states, without)
    half = jax.grad(lambda h: rnn(spec, params, x, (h, None))[0].sum())(jnp.zeros((1, 2, 5)))
    assert np.asarray(half).any()


def test_the_spec_may_differ_from_call_to_call():
    x = jnp.ones((4, 2, 3))
    for hidden in range(1, 6):
        spec = replace(fusedrnn.RNNSpec("gru", 3, 5), hidden_size=hidden)
        assert rnn(spec, jnp.zeros(spec.layout.size), x)[0].shape == (4, 2, hidden)
