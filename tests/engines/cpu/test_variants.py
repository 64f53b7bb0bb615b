"""Every variant of the cells on the kernels: against torch's own functions, on every target, in every split."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import fusedrnn
from conformance import KEEPS, REQUESTS, TrainingConformance
from fusedrnn import RNNOp, RNNSpec
from fusedrnn.cell.activations import ACTIVATIONS
from fusedrnn.engines.cpu.plan.partition import force_grid
from fusedrnn.jit.host import available_targets
from fusedrnn.spec import DTYPES
from oracles import near_kink, reference_results
from pairwise import target_names
from problems import Shape, assert_close, assert_gradients_close
from variants import VARIANTS, recorded, variant_problem, variant_spec

pytestmark = pytest.mark.usefixtures("poisoned", "use_all_threads")

SHAPES = (
    Shape(1, 1, 1, 2),
    Shape(5, 3, 7, 17, layers=2, bidirectional=True, lengths="edges"),
    Shape(7, 9, 3, 33, states=False),
    Shape(3, 2, 20, 49, layers=3, lengths="some"),
)
# One of two stages of either kind, one that has everything, one of a cell of its own.
SOME = ("projection", "reset-before", "lstm-all", "coupled-peepholes", "reset-before-all", "thresholded-relu")
GRIDS = ((1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 1, 3), (2, 1, 1), (2, 1, 2), (2, 2, 1), (1, 2, 2))


def train(problem, keep="gates", backend=None, seed=None, **options):
    """Outputs, final states and gradients of a new op."""
    op = RNNOp(problem.spec, backend)
    y, final, reserve = op.forward(
        problem.x, problem.params, problem.states, training=True, lengths=problem.lengths, reserve=keep, seed=seed
    )
    return y, final, op.backward(problem.dy, problem.dstates, reserve, **options)


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """One target, unless a test goes through all: there is a great deal to compile."""
    monkeypatch.setenv("FUSEDRNN_TARGET", available_targets()[0].name)


def check(problem, oracle):
    """Inference and training of a problem."""
    y, final, _ = RNNOp(problem.spec).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
    assert_close((y, final), oracle.forward, problem.spec.dtype, problem.spec)
    check_training(problem, oracle)


def check_training(problem, oracle):
    """Training, whatever is kept."""
    spec, dtype = problem.spec, problem.spec.dtype
    for keep in KEEPS:
        y, final, gradients = train(problem, keep)
        assert_close((y, final), oracle.forward, dtype, spec)
        assert_gradients_close(gradients, oracle.gradients, dtype, spec, *problem.x.shape[:2])
        for array in (y, gradients[0]):
            assert not array[problem.padding].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name):
    """In float32, and some in float64: the others are compiled for that in the next test."""
    for shape in SHAPES:
        problem, oracle = variant_problem(name, shape)
        for dtype, threads in product(DTYPES if name in SOME else ["float32"], (1, 2, 3)):
            with fusedrnn.thread_limits(threads):
                check(problem.typed(dtype), oracle)


def on_targets():
    """Some on every target but the native one, the others on one in turn, in float64."""
    others = target_names()[1:]
    for number, name in enumerate(VARIANTS):
        if name in SOME:
            yield from ((name, target, "float32") for target in others)
        else:
            yield name, others[number % len(others)], "float64"


@pytest.mark.parametrize(("name", "target", "dtype"), [*on_targets()], indirect=["target"])
def test_training_on_every_target(name, target, dtype, small_chunks):
    """Training alone, whose forward kernels do all that those of inference do."""
    problem, oracle = variant_problem(name, SHAPES[1])
    with fusedrnn.thread_limits(2):
        check_training(problem.typed(dtype), oracle)


@pytest.mark.parametrize("name", SOME)
def test_inference_on_every_target(name, target, small_chunks):
    problem, oracle = variant_problem(name, SHAPES[1])
    with fusedrnn.thread_limits(2):
        y, final, _ = RNNOp(problem.spec).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
    assert_close((y, final), oracle.forward, "float32", problem.spec)


@pytest.mark.parametrize("lengths", ["full", "edges"])
@pytest.mark.parametrize("name", ["projection", "reset-before", "peepholes", "leaky-relu"])
def test_reverse(name, lengths):
    problem, oracle = variant_problem(name, Shape(6, 5, 4, 19, layers=2, lengths=lengths), reverse=True)
    with fusedrnn.thread_limits(2):
        check(problem, oracle)


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_relu", "rnn_tanh"])
def test_reverse_is_forward_on_reversed_input(mode):
    rng = np.random.default_rng(1)
    spec = RNNSpec(mode, 3, 5, 2)
    x = rng.standard_normal((6, 2, 3)).astype(np.float32)
    params = rng.uniform(-0.5, 0.5, spec.layout.size).astype(np.float32)
    y, final, _ = RNNOp(spec).forward(np.ascontiguousarray(x[::-1]), params)
    back, last, _ = RNNOp(replace(spec, reverse=True)).forward(x, params)
    np.testing.assert_array_equal(back, y[::-1])
    np.testing.assert_array_equal(last, final)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_bits_do_not_depend_on_the_grid(name, shape):
    problem, _ = variant_problem(name, shape)
    results = []
    for grid in GRIDS:
        for keep in KEEPS:
            with fusedrnn.thread_limits(int(np.prod(grid))), force_grid(grid):
                y, final, (dx, dparams, dstates) = train(problem, keep)
            results.append((y, *final, dx, dparams, *dstates))
    for result in results[1:]:
        for expected, array in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("name", SOME)
def test_bits_do_not_depend_on_the_batch(name):
    problem, _ = variant_problem(name, SHAPES[1])
    y, final, _ = RNNOp(problem.spec).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
    index = [2]
    states = tuple(state[:, index] for state in problem.states)
    y_alone, last, _ = RNNOp(problem.spec).forward(
        problem.x[:, index], problem.params, states, lengths=problem.lengths[index]
    )
    np.testing.assert_array_equal(y_alone, y[:, index])
    for state, whole in zip(last, final, strict=True):
        np.testing.assert_array_equal(state, whole[:, index])


@pytest.mark.parametrize("name", SOME[:4])
def test_dropout(name):
    """The mask depends on nothing but the seed: the reference's is the same."""
    problem, _ = variant_problem(name, Shape(4, 3, 5, 17, layers=3, bidirectional=True, lengths="edges"))
    problem = replace(problem, spec=replace(problem.spec, dropout=0.4))
    seed = next(seed for seed in range(100) if not near_kink(problem, seed))
    y, final, gradients = train(problem, seed=seed)
    oracle = reference_results(problem, seed)
    assert_close((y, final), oracle.forward, "float32", problem.spec)
    assert_gradients_close(gradients, oracle.gradients, "float32", problem.spec, *problem.x.shape[:2])


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("name", SOME)
def test_grad_reqs(name, request_):
    problem, oracle = variant_problem(name, SHAPES[1])
    buffers, expected = zip(
        *(TrainingConformance._buffer(request_, gradient, "float32") for gradient in oracle.gradients), strict=True
    )
    train(problem, grad_req=request_, out=None if request_ == "null" else buffers)
    assert_gradients_close(buffers, expected, "float32", problem.spec, *problem.x.shape[:2])


@pytest.mark.parametrize("name", SOME)
def test_cached_calls(name):
    """The short way of a call like the one before has states of two sizes, and weights of every kind."""
    problem, oracle = variant_problem(name, Shape(3, 2, 5, 17))
    op = RNNOp(problem.spec)
    for _ in range(4):
        y, final, reserve = op.forward(problem.x, problem.params, problem.states, training=True)
        gradients = op.backward(problem.dy, problem.dstates, reserve)
        assert_close((y, final), oracle.forward, "float32", problem.spec)
        assert_gradients_close(gradients, oracle.gradients, "float32", problem.spec, *problem.x.shape[:2])
        y, final, _ = op.forward(problem.x, problem.params, problem.states)
        assert_close((y, final), oracle.forward, "float32", problem.spec)


@pytest.mark.parametrize("name", SOME)
def test_streams(name):
    problem, oracle = variant_problem(name, Shape(6, 2, 5, 17, layers=2))
    stream = RNNOp(problem.spec).stream(problem.params, 2, problem.states)
    y = np.concatenate([stream(problem.x[t : t + 2]) for t in (0, 2, 4)])
    assert_close((y, stream.states), oracle.forward, "float32", problem.spec)


def test_gradient_of_clipped_states():
    """The gradient passes at the bound and stops beyond it, as that of torch.clamp does."""
    spec = replace(variant_spec("state-clip", 1, 2, dtype="float64"), state_clip_min=-0.5, state_clip_max=0.5)
    # No weights: f = i = o = 1/2, g = 0, so that c is half of what it was.
    x, params = np.zeros((1, 1, 1)), np.zeros(spec.layout.size)
    h0, c0 = np.zeros((1, 1, 2)), np.array([[[1.0, 1.5]]])
    op = RNNOp(spec)
    _, (_, c_n), reserve = op.forward(x, params, (h0, c0), training=True)
    np.testing.assert_array_equal(c_n, [[[0.5, 0.5]]])
    _, _, (_, dc0) = op.backward(None, (None, np.ones((1, 1, 2))), reserve)
    np.testing.assert_array_equal(dc0, [[[0.5, 0.0]]])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_in_a_state(backend):
    """Clipping leaves it where it is, unless it is to replace it: by the lower bound, with no gradient."""
    for replaces in (False, True):
        spec = replace(variant_spec("state-clip-nan", 3, 17), state_clip_nan=replaces)
        rng = np.random.default_rng(1)
        x, params = rng.standard_normal((2, 2, 3), np.float32), rng.standard_normal(spec.layout.size, np.float32)
        h0, c0 = np.zeros((2, 1, 2, 17), np.float32)
        c0[0, 1, 3] = np.nan
        y, _, reserve = RNNOp(spec, backend).forward(x, params, (h0, c0), training=True)
        assert np.isnan(y).any() != replaces
        assert not np.isnan(y[:, 0]).any()
        if replaces:
            _, _, (_, dc0) = RNNOp(spec, backend).backward(np.ones_like(y), None, reserve)
            assert dc0[0, 1, 3] == 0


def test_problems_are_far_from_kinks():
    """The problems that the gradients are compared on do not depend on rounding."""
    for name in ("leaky-relu", "lstm-gate-clip", "state-clip", "reset-before-all"):
        assert recorded(variant_problem(name, SHAPES[1])[0])[2] > 1e-7


def test_variants_have_every_activation():
    used = {activation.name for name in VARIANTS for activation in variant_spec(name, 4, 8).variant.activations}
    assert used == set(ACTIVATIONS)
