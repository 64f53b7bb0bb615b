"""The errors of MXNet's fused operator: each with random weights, several layers, both directions, I ≠ H."""

from itertools import permutations

import numpy as np
import pytest

from fusedrnn import RNNOp
from fusedrnn.spec import MODES
from oracles import expected_training, training_problem
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPE = Shape(6, 5, 7, 11, layers=3, bidirectional=True)
DEEP = Shape(4, 3, 13, 5, layers=4, bidirectional=True)
PADDED = Shape(6, 5, 7, 11, layers=3, bidirectional=True, lengths="edges")


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    return request.param


def forward(problem, op, save="gates"):
    """A forward call in training."""
    return op.forward(problem.x, problem.params, problem.states, training=True, lengths=problem.lengths, reserve=save)


def backward(problem, op, reserve, **options):
    return op.backward(problem.dy, problem.dstates, reserve, **options)


def run(problem, op, **options):
    y, final, reserve = forward(problem, op)
    return y, final, backward(problem, op, reserve, **options)


def assert_right(result, mode, shape):
    """All results are those of torch.nn and of the reference."""
    problem = training_problem(mode, shape)
    by_torch, by_reference = expected_training(mode, shape)
    for oracle in (by_torch["nothing"], by_reference):
        assert_close(result[:2], oracle.forward, "float32", problem.spec)
        assert_gradients_close(result[2], oracle.gradients, "float32", problem.spec, shape.T, shape.N)


def test_added_gradients_are_not_scaled_at_each_step(mode, backend):
    """With grad_req 'add' the buffer's content was multiplied once for every time step."""
    problem = training_problem(mode, SHAPE)
    op = RNNOp(problem.spec, backend)
    once = run(problem, op)[2]
    dx, dparams, dstates = once
    total = dx.copy(), dparams.copy(), tuple(map(np.copy, dstates))
    for times in (2, 3):
        run(problem, op, grad_req="add", out=total)
        expected = times * dx, times * dparams, tuple(times * dstate for dstate in dstates)
        assert_gradients_close(total, expected, "float32", problem.spec, SHAPE.T, SHAPE.N)
    assert_right((*run(problem, op)[:2], once), mode, SHAPE)


def test_lengths_count(mode, backend):
    """On the CPU sequence_length was ignored: the same outputs with it and without."""
    problem = training_problem(mode, PADDED)
    op = RNNOp(problem.spec, backend)
    with_lengths = run(problem, op)
    assert_right(with_lengths, mode, PADDED)
    y, final, reserve = op.forward(problem.x, problem.params, problem.states, training=True)
    without = y, final, backward(problem, op, reserve)
    short = np.flatnonzero(problem.lengths < PADDED.T)
    for array, array_without in zip(_arrays(with_lengths), _arrays(without), strict=True):
        if array.ndim == 1:  # the gradients of the parameters
            assert not np.allclose(array, array_without, rtol=0.01)
        for row in short if array.ndim == 3 else ():
            assert not np.allclose(array[:, row], array_without[:, row], rtol=0.01)


def _arrays(result):
    y, final, (dx, dparams, dstates) = result
    return (y, *final, dx, dparams, *dstates)


@pytest.mark.parametrize("layers", [3, 4])
def test_deep_stacks_of_both_directions(mode, backend, layers):
    """From the third layer on the gradients of bidirectional stacks were wrong."""
    shape = SHAPE if layers == 3 else DEEP
    problem = training_problem(mode, shape)
    assert_right(run(problem, RNNOp(problem.spec, backend)), mode, shape)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize(("features", "hidden"), [(7, 11), (11, 7), (1, 5), (40, 3)])
def test_input_size_differs_from_hidden_size(mode, backend, features, hidden, bidirectional):
    """In networks of several layers with I ≠ H a layer read the weights of another."""
    shape = Shape(5, 4, features, hidden, layers=3, bidirectional=bidirectional)
    problem = training_problem(mode, shape)
    assert_right(run(problem, RNNOp(problem.spec, backend)), mode, shape)


@pytest.mark.parametrize("mode", ["gru"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
def test_middle_layers_of_a_gru(mode, backend, bidirectional):
    """The gradients of a GRU's layers between the first and the last were wrong."""
    shape = Shape(5, 4, 7, 11, layers=4, bidirectional=bidirectional)
    problem = training_problem(mode, shape)
    result = run(problem, RNNOp(problem.spec, backend))
    for layer in (1, 2):
        for direction in range(1 + bidirectional):
            for kind in ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias"):
                assert problem.spec.layout.view(result[2][1], layer, direction, kind).all()
    assert_right(result, mode, shape)


def test_gradients_of_biases(mode, backend):
    """With several layers the gradients of the biases were zero."""
    problem = training_problem(mode, SHAPE)
    result = run(problem, RNNOp(problem.spec, backend))
    biases = [entry for entry in problem.spec.layout if entry.kind.endswith("bias")]
    assert len(biases) == 3 * 2 * 2
    for entry in biases:
        view = problem.spec.layout.view(result[2][1], entry.layer, entry.direction, entry.kind)
        # A ReLU that is never on has the gradient zero.
        assert view.any() if mode == "rnn_relu" else view.all()
    assert_right(result, mode, SHAPE)


@pytest.mark.parametrize("save", ["gates", "states"])
def test_weights_updated_in_place(mode, backend, save):
    """After an update the packed weights were still the old ones; the next calls must use the new ones."""
    problem = training_problem(mode, SHAPE)
    op, params = RNNOp(problem.spec, backend), problem.params.copy()
    for _ in range(4):
        options = {"training": True, "reserve": save}
        y, final, reserve = op.forward(problem.x, params, problem.states, **options)
        results = y, final, backward(problem, op, reserve)
        new_op = RNNOp(problem.spec, backend)
        y, final, reserve = new_op.forward(problem.x, params.copy(), problem.states, **options)
        assert_same_bits(results, (y, final, backward(problem, new_op, reserve)))
        params -= np.float32(0.05) * results[2][1] / np.abs(results[2][1]).max()
    params[...] = problem.params
    assert_right(run(problem, op), mode, SHAPE)


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_forwards_before_their_backwards(mode, save, order):
    """The next forward call overwrote the only reserve of the operator."""
    shapes = SHAPE, PADDED, Shape(9, 2, 7, 11, layers=3, bidirectional=True)
    problems = [training_problem(mode, shape) for shape in shapes]
    op = RNNOp(problems[0].spec)
    results = [forward(problem, op, save) for problem in problems]
    for index in order:
        y, final, reserve = results[index]
        assert_right((y, final, backward(problems[index], op, reserve)), mode, shapes[index])


@pytest.mark.parametrize("batches", [(8, 3), (3, 8), (8, 1, 5, 8)], ids=str)
def test_batch_sizes_change(mode, backend, batches):
    """The backward call of a smaller batch after a larger one ended the process."""
    shapes = {N: Shape(6, N, 7, 11, layers=3, bidirectional=True, lengths="some") for N in batches}
    op = RNNOp(SHAPE.spec(mode), backend)
    for N in batches:
        assert_right(run(training_problem(mode, shapes[N]), op), mode, shapes[N])
    # The same with all forward calls before the backward calls.
    reserves = [(N, *forward(training_problem(mode, shapes[N]), op)) for N in batches]
    for N, y, final, reserve in reserves:
        assert_right((y, final, backward(training_problem(mode, shapes[N]), op, reserve)), mode, shapes[N])
