"""Resets inside sequences have the bits of separate calls on the pieces; every state of every step."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec, cells
from fusedrnn.engines.cpu.plan.partition import force_grid
from fusedrnn.engines.interface import SAVE_POLICIES
from fusedrnn.jit.host import available_targets
from paper_cells import cell_problem
from pieces import in_pieces, random_resets, random_state_gradients
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, make_problem, problem_of
from variants import variant_problem

pytestmark = pytest.mark.usefixtures("poisoned", "use_all_threads", "small_chunks")

BOTH_WAYS = Shape(7, 4, 5, 17, layers=2, bidirectional=True, lengths="edges")
STACK = Shape(6, 3, 4, 9, layers=3)
ONE = Shape(9, 5, 3, 33, lengths="some", states=False)
GRIDS = (1, 1, 1), (1, 1, 2), (2, 2, 1)
PROBLEMS = {
    "lstm": lambda: make_problem("lstm", BOTH_WAYS),
    "gru": lambda: make_problem("gru", STACK),
    "rnn_tanh": lambda: make_problem("rnn_tanh", ONE, "float64"),
    "projection": lambda: variant_problem("projection", BOTH_WAYS)[0],
    "reset-before-all": lambda: variant_problem("reset-before-all", ONE)[0],
    "everything": lambda: cell_problem("everything", STACK)[0],
    "slstm": lambda: cell_problem("slstm", BOTH_WAYS)[0],
    "early": lambda: cell_problem("early", BOTH_WAYS)[0],
    "sru": lambda: cell_problem("sru", BOTH_WAYS)[0],
    "own_output": lambda: cell_problem("own_output", BOTH_WAYS)[0],
    "residual": lambda: problem_of(RNNSpec("lstm", 4, 9, 3, residual="identity"), STACK),
    "ind_rnn": lambda: cell_problem("ind_rnn", BOTH_WAYS)[0],
    "min_lstm": lambda: cell_problem("min_lstm", ONE)[0],
    "layer_norm_lstm": lambda: problem_of(BOTH_WAYS.spec(cells.layer_norm_lstm), BOTH_WAYS),
    "slstm_heads": lambda: cell_problem("slstm_heads", ONE)[0],
    "reverse": lambda: problem_of(RNNSpec("gru", 3, 9, reverse=True), Shape(7, 4, 3, 9, lengths="edges")),
}


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """One target: there is a great deal to compile."""
    monkeypatch.setenv("FUSEDRNN_TARGET", available_targets()[0].name)


def train(op, problem, resets, reset_states, dall, keep="gates", **options):
    every, final, reserve = op.forward(
        problem.x, problem.params, problem.states, lengths=problem.lengths, training=True, reserve=keep, resets=resets,
        reset_states=reset_states, all_states=True, seed=3,
    )  # fmt: skip
    return every, final, op.backward((problem.dy, *dall), problem.dstates, reserve, **options)


@pytest.mark.parametrize("name", PROBLEMS)
def test_bits_of_the_pieces(name):
    """For any threads and both kinds of reserve, and in inference."""
    problem = PROBLEMS[name]()
    op, dall = RNNOp(problem.spec), random_state_gradients(problem)
    resets, reset_states = random_resets(problem)
    expected = in_pieces(op, problem, resets, reset_states, dall, training=True)
    y, final, _ = op.forward(
        problem.x, problem.params, problem.states, lengths=problem.lengths, resets=resets, reset_states=reset_states
    )
    assert_same_bits((y, *final), (expected.outputs[0], *expected.final))
    for grid, keep in product(GRIDS, SAVE_POLICIES):
        with fusedrnn.thread_limits(int(np.prod(grid))), force_grid(grid):
            every, final, (dx, dparams, dstates, dreset) = train(op, problem, resets, reset_states, dall, keep)
            assert_same_bits((every, final, dx), (expected.outputs, expected.final, expected.dx))
            assert_same_bits((dstates, dreset), (expected.dstates, expected.dreset))
            gradients, pieces = (dx, dparams, dstates), (expected.dx, expected.dparams, expected.dstates)
            assert_gradients_close(gradients, pieces, problem.spec.dtype, problem.spec, *problem.x.shape[:2])


@pytest.mark.parametrize("name", PROBLEMS)
def test_reference(name):
    """In float64, which knows of no order of sums."""
    problem = PROBLEMS[name]().typed("float64")
    dall, (resets, reset_states) = random_state_gradients(problem), random_resets(problem, seed=1)
    expected = train(RNNOp(problem.spec, "reference"), problem, resets, reset_states, dall)
    every, final, gradients = train(RNNOp(problem.spec), problem, resets, reset_states, dall)
    assert_close((every[0], final), (expected[0][0], expected[1]), "float64", problem.spec)
    for actual, exact in zip(every, expected[0], strict=True):
        np.testing.assert_allclose(actual, exact, atol=1e-12)
    size = problem.x.shape[:2]
    assert_gradients_close(gradients[:3], expected[2][:3], "float64", problem.spec, *size)
    for actual, exact in zip(gradients[3], expected[2][3], strict=True):
        np.testing.assert_allclose(actual, exact, atol=1e-10)


def test_zeros_and_initial_states():
    """Without given states a reset means zeros; one at step 0 leaves the initial states no gradient."""
    problem = PROBLEMS["gru"]()
    op, resets = RNNOp(problem.spec), np.zeros(problem.x.shape[:2], bool)
    resets[0] = True
    zeros = tuple(np.zeros_like(state) for state in problem.states)
    y, final, reserve = op.forward(problem.x, problem.params, problem.states, training=True, resets=resets)
    assert_same_bits((y, final), op.forward(problem.x, problem.params, zeros)[:2])
    dx, _, dstates = op.backward(problem.dy, None, reserve)
    assert not any(grad.any() for grad in dstates)
    assert dx.any()


def test_gradients_are_written_added_or_left_out():
    problem = PROBLEMS["lstm"]()
    op, dall = RNNOp(problem.spec), random_state_gradients(problem)
    resets, reset_states = random_resets(problem)
    written = train(op, problem, resets, reset_states, dall)[2]
    out = tuple(np.ones_like(grad) for grad in written[:2]) + tuple(
        tuple(np.ones_like(grad) for grad in group) for group in written[2:]
    )
    result = train(op, problem, resets, reset_states, dall, grad_req="add", out=out)[2]
    assert all(one is other for one, other in zip(result[3], out[3], strict=True))
    flat = ((*grads[:2], *grads[2], *grads[3]) for grads in (result, written))
    for actual, exact in zip(*flat, strict=True):
        expected = exact + 1
        if actual is result[0]:
            expected[problem.padding] = 1
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    for name, index in (("x", 0), ("params", 1), ("states", 2), ("reset_states", 3)):
        alone = dict.fromkeys(("x", "params", "states", "reset_states"), "null") | {name: "write"}
        result = train(op, problem, resets, reset_states, dall, grad_req=alone)[2]
        assert_same_bits(result[index], written[index])
        assert [grad is None for grad in result] == [number != index for number in range(4)]


@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
def test_formats(compute):
    problem = make_problem("lstm", Shape(6, 4, 7, 17, layers=2))
    problem = replace(problem, spec=replace(problem.spec, compute=compute))
    op, (resets, reset_states) = RNNOp(problem.spec), random_resets(problem)
    trains = {"training": True} if problem.spec.is_trainable else {}
    expected = in_pieces(op, problem, resets, reset_states, **trains)
    every, final, reserve = op.forward(
        problem.x, problem.params, problem.states, resets=resets, reset_states=reset_states, all_states=True, **trains
    )
    assert_same_bits((every, final), (expected.outputs, expected.final))
    if trains:
        dx, _, dstates, dreset = op.backward((problem.dy, None), problem.dstates, reserve)
        assert_same_bits((dx, dstates, dreset), (expected.dx, expected.dstates, expected.dreset))


@pytest.mark.parametrize("mode", ["gru", cells.variational_gru], ids=str)
def test_dropout_is_that_of_the_whole_sequence(mode):
    problem = problem_of(STACK.spec(mode, "float64"), STACK)
    problem = replace(problem, spec=replace(problem.spec, dropout=0.4))
    resets, reset_states = random_resets(problem)
    results = [train(RNNOp(problem.spec, name), problem, resets, reset_states, ()) for name in ("cpu", "reference")]
    (every, _, gradients), (exact, _, exact_gradients) = results
    np.testing.assert_allclose(every[0], exact[0], atol=1e-12)
    assert_gradients_close(gradients[:3], exact_gradients[:3], "float64", problem.spec, *problem.x.shape[:2])


@pytest.mark.parametrize("given", [False, True])
def test_streams(given):
    """A chunk's resets are those of its steps in the whole."""
    problem = make_problem("lstm", Shape(7, 3, 4, 9, layers=2))
    op, (resets, reset_states) = RNNOp(problem.spec), random_resets(problem)
    stream, options = op.stream(problem.params, 3, problem.states), {"reset_states": reset_states if given else None}
    chunks = [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 7)]
    parts, states = [], []
    for chunk in chunks:
        states.append(stream.states)
        parts.append(stream(problem.x[chunk], resets=resets[chunk], **options))
    y, final, _ = op.forward(problem.x, problem.params, problem.states, resets=resets, **options)
    assert_same_bits((np.concatenate(parts), stream.states), (y, final))
    assert_same_bits(states[0], problem.states)  # what a stream has shown stays


def test_no_reset_changes_nothing():
    problem = PROBLEMS["lstm"]()
    op, dall = RNNOp(problem.spec), random_state_gradients(problem)
    plain = train(op, problem, None, None, dall)
    marked = train(op, problem, problem.padding, None, dall)
    assert_same_bits(marked, plain)


def test_calls_with_and_without_resets_in_turn():
    """A cached call of one kind is none of another."""
    problem = make_problem("lstm", Shape(3, 2, 4, 9))
    op, (resets, _) = RNNOp(problem.spec), random_resets(problem)
    options = [{}, {"resets": resets}, {"all_states": True}]
    arrays = problem.x, problem.params, problem.states
    results = [[op.forward(*arrays, **more)[:2] for more in options] for _ in range(4)]
    for others in results[1:]:
        assert_same_bits(others, results[0])
    y, final = results[0][0]
    (same_y, c), same_final = results[0][2]
    assert_same_bits((y, final), (same_y, same_final))
    assert_same_bits(c[-1], final[1][0])
