"""What cells of users have in common with the built-in ones: targets, formats, bits, streams, dropout."""

from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec, cells
from fusedrnn.cell import cell, language, sigmoid, tanh
from fusedrnn.engines.cpu.plan.partition import force_grid
from fusedrnn.engines.interface import SAVE_POLICIES
from fusedrnn.jit.host import available_targets
from oracles import reference_results
from pairwise import target_names
from paper_cells import ALL_CELLS, HEADS, KERNEL_CELLS, cell_problem, check_training, train
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, problem_of

pytestmark = pytest.mark.usefixtures("poisoned", "use_all_threads")

SHAPE = Shape(5, 3, 7, 17, layers=2, bidirectional=True, lengths="edges")
SOME = (
    "everything", "slstm", "sru", "own_output", "layer_norm_lstm", "everything_heads", "early", "elementwise_moments",
    "products_alone",
)  # fmt: skip
MOST_STATES = "h a b c d e"
OTHER_TARGETS = target_names()[1:]
FORMATS = [
    *zip((name for name in KERNEL_CELLS if name not in HEADS), cycle(["bfloat16", "int8", "int8_weights"])),
    ("everything_heads", "bfloat16"), ("products_alone", "bfloat16"), ("everything", "int8"), ("early", "int8"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """One target, unless a test goes through all."""
    monkeypatch.setenv("FUSEDRNN_TARGET", available_targets()[0].name)


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [("everything", "float32", OTHER_TARGETS[0]), ("early", "float64", OTHER_TARGETS[-1])],
    indirect=["target"],
)
def test_targets(name, dtype, target, small_chunks):
    problem, oracle = cell_problem(name, SHAPE)
    with fusedrnn.thread_limits(2):
        check_training(problem.typed(dtype), oracle)


@pytest.mark.parametrize("name", SOME)
def test_bits(name):
    """They depend neither on how threads divide the work nor on what is kept; nor on chunks of a stream."""
    problem, _ = cell_problem(name, SHAPE)
    results = []
    for grid in ((1, 1, 1), (2, 1, 2), (1, 2, 1), (1, 1, 3)):
        with fusedrnn.thread_limits(int(np.prod(grid))), force_grid(grid):
            results += [train(problem, keep) for keep in SAVE_POLICIES]
    for result in results[1:]:
        assert_same_bits(result, results[0])
    spec = replace(problem.spec, bidirectional=False, num_layers=1)
    params = problem.params[: spec.layout.size]
    states = tuple(state[:1] for state in problem.states)
    y, final, _ = RNNOp(spec).forward(problem.x, params, states)
    stream = RNNOp(spec).stream(params, SHAPE.N, states)
    assert_same_bits(np.concatenate([stream(problem.x[:2]), stream(problem.x[2:])]), y)
    assert_same_bits(tuple(stream.states), final)


@pytest.mark.parametrize("name", SOME)
def test_repeated_calls_and_added_gradients(name):
    problem, oracle = cell_problem(name, Shape(3, 2, 5, 17))
    op, buffers = RNNOp(problem.spec), None
    for repetition in range(1, 4):
        y, final, reserve = op.forward(problem.x, problem.params, problem.states, training=True)
        assert_close((y, final), oracle.forward, "float32", problem.spec)
        req = "write" if buffers is None else "add"
        buffers = op.backward(problem.dy, problem.dstates, reserve, grad_req=req, out=buffers)
        dx, dparams, dstates = oracle.gradients
        expected = dx * repetition, dparams * repetition, tuple(grad * repetition for grad in dstates)
        assert_gradients_close(buffers, expected, "float32", problem.spec, *problem.x.shape[:2])


@cell(gates="i f", states=MOST_STATES)
def six_states(x, recurrent, s):
    h = recurrent(s.h)
    i, f = sigmoid(x.i + h.i), sigmoid(x.f + h.f)
    return tanh(i * s.e + f * s.h), f * s.a + i, i * s.b + f * s.a, f * s.c + s.b, tanh(s.d + s.c), i * s.e + s.d


def test_repeated_calls_with_the_most_states():
    """With resets, such a cell has the most arrays that a call may have."""
    assert len(MOST_STATES.split()) == language._MAX_STATES
    problem = problem_of(RNNSpec(six_states, 5, 17), Shape(4, 3, 5, 17))
    resets = np.zeros((4, 3), bool)
    resets[2, 1] = True
    results = [_results(problem, resets, backend) for backend in ("reference", "cpu", "cpu", "cpu")]
    for forward, gradients in results[1:]:
        assert_close(forward, results[0][0], "float32", problem.spec)
        assert_gradients_close(gradients, results[0][1], "float32", problem.spec, *problem.x.shape[:2])


def _results(problem, resets, backend):
    """(y, final) of inference and the gradients, by the op that RNNOp.get keeps."""
    op, arguments = RNNOp.get(problem.spec, backend), (problem.x, problem.params, problem.states)
    y, final, _ = op.forward(*arguments, resets=resets)
    _, _, reserve = op.forward(*arguments, training=True, resets=resets)
    return (y, final), op.backward(problem.dy, problem.dstates, reserve)


def test_the_engine_accepts_every_format():
    """For all cells but those of several heads, whose blocks are in no format of int8."""
    for compute in ("bfloat16", "int8", "int8_weights"):
        for of in ALL_CELLS.values():
            if of.heads > 1 and compute != "bfloat16":
                with pytest.raises(ValueError, match=f"compute='{compute}' needs a cell of one head"):
                    RNNSpec(of, 32, 32, compute=compute)
            else:
                assert RNNOp(RNNSpec(of, 32, 32, compute=compute)).backend == "cpu", of


@pytest.mark.parametrize(("name", "compute"), FORMATS)
def test_formats(name, compute):
    """The reference rounds the same operands."""
    problem, _ = cell_problem(name, Shape(4, 3, 7, 17, layers=2))
    spec = replace(problem.spec, compute=compute)
    y, final, _ = RNNOp(spec).forward(problem.x, problem.params, problem.states)
    expected = RNNOp(spec, "reference").forward(problem.x, problem.params, problem.states)
    # Rounding may decide otherwise where the sums differ in the last bit.
    np.testing.assert_allclose(y, expected[0], atol=2e-2)
    assert np.abs(y - expected[0]).mean() < 2e-3
    assert len(final) == len(expected[1])


def test_dropout():
    problem, _ = cell_problem("slstm", Shape(4, 3, 5, 17, layers=3))
    problem = replace(problem, spec=replace(problem.spec, dropout=0.4))
    op = RNNOp(problem.spec)
    y, final, reserve = op.forward(problem.x, problem.params, problem.states, training=True, seed=5)
    oracle = reference_results(problem, 5)
    assert_close((y, final), oracle.forward, "float32", problem.spec)
    gradients = op.backward(problem.dy, problem.dstates, reserve)
    assert_gradients_close(gradients, oracle.gradients, "float32", problem.spec, *problem.x.shape[:2])


@pytest.mark.parametrize(("own", "mode"), [(cells.flash_lstm, "lstm"), (cells.flash_gru, "gru")])
def test_built_in_cells_have_the_same_bits_in_the_language(own, mode):
    problem = problem_of(SHAPE.spec(mode), SHAPE)
    with fusedrnn.thread_limits(2):
        for keep in SAVE_POLICIES:
            built_in, written = (train(replace(problem, spec=SHAPE.spec(of)), keep) for of in (mode, own))
            assert_same_bits(written, built_in)
