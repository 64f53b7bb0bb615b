"""Input and output (N, T, features): the bits of the other layout, without a transpose in the compiled program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from fusedrnn import RNNSpec
from fusedrnn.jax import rnn
from problems import Shape, make_problem

SHAPE = Shape(7, 4, 5, 9, layers=2, bidirectional=True, lengths="edges")


def swapped(array):
    return jnp.swapaxes(array, 0, 1)


def time_major(spec, params, x, *others, resets=None, **options):
    """The call in the other layout."""
    y, final = rnn(spec, params, swapped(x), *others, None if resets is None else resets.T, **options)
    return swapped(y), final


def marks(problem):
    resets = (np.random.default_rng(0).random((7, 4)) < 0.3) & ~problem.padding
    return resets.T


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_results_and_gradients(platform):
    problem = make_problem("lstm", SHAPE)
    x, dy = problem.x.swapaxes(0, 1), problem.dy.swapaxes(0, 1)

    def gradients(run, x, params, states):
        def loss(x, params, states):
            y, final = run(problem.spec, params, x, states, problem.lengths, resets=marks(problem))
            results = jax.tree.leaves((y, final))
            return sum((a * b).sum() for a, b in zip(results, (dy, *problem.dstates), strict=True)), results

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, params, states)

    runs = partial(rnn, batch_first=True), time_major
    if platform == "cuda":  # the program for a device that is not here
        for run in runs:
            exported = export.export(jax.jit(partial(gradients, run)), platforms=[platform])
            assert exported(x, problem.params, problem.states).out_avals[1].shape == dy.shape
        return
    results = [jax.jit(partial(gradients, run))(x, problem.params, problem.states) for run in runs]
    for array, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(array, other)


def test_a_second_derivative():
    problem = make_problem("gru", Shape(4, 3, 2, 5))

    def second(run, x):
        def norm(x):
            return (jax.grad(lambda x: (run(problem.spec, problem.params, x)[0] ** 2).sum())(x) ** 2).sum()

        return jax.grad(norm)(x)

    x = problem.x.swapaxes(0, 1)
    expected = second(time_major, x)
    np.testing.assert_allclose(second(partial(rnn, batch_first=True), x), expected, rtol=1e-4, atol=1e-5)


def test_mapped_is_one_larger_batch():
    spec = RNNSpec("lstm", 3, 5)
    params, x = jnp.ones(spec.layout.size) / 9, jnp.linspace(-1, 1, 2 * 3 * 4 * 3).reshape(2, 3, 4, 3)
    states = (jnp.ones((2, 1, 3, 5)), None)

    def run(x, h):
        return rnn(spec, params, x, (h, None), batch_first=True)

    y, (h_n, c_n) = jax.vmap(run)(x, states[0])
    whole, final = rnn(spec, params, x.reshape(6, 4, 3), (jnp.ones((1, 6, 5)), None), batch_first=True)
    np.testing.assert_array_equal(y.reshape(6, 4, 5), whole)
    for state, other in zip((h_n, c_n), final, strict=True):
        np.testing.assert_array_equal(state.swapaxes(0, 1).reshape(1, 6, 5), other)
    program = str(jax.make_jaxpr(jax.vmap(run))(x, states[0]))
    assert program.count("fusedrnn[") == 1


def test_nothing_is_transposed():
    spec = RNNSpec("gru", 3, 5)
    params, x = jnp.zeros(spec.layout.size), jnp.zeros((2, 7, 3))
    run = jax.jit(partial(rnn, spec, batch_first=True))
    assert " transpose(" not in run.lower(params, x).compile().as_text()


def test_wrong_shapes():
    spec = RNNSpec("gru", 3, 5)
    params, x = jnp.zeros(spec.layout.size), jnp.zeros((2, 7, 3))
    with pytest.raises(ValueError, match=r"resets must have shape \(2, 7\); got \(7, 2\)"):
        rnn(spec, params, x, resets=jnp.zeros((7, 2), bool), batch_first=True)
    with pytest.raises(ValueError, match=r"lengths must have shape \(2,\); got \(7,\)"):
        rnn(spec, params, x, lengths=jnp.zeros(7, int), batch_first=True)
