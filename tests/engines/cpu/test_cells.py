"""Cells written in the language: the kernels and the reference against the papers' equations in torch, in float64."""

from dataclasses import replace

import numpy as np
import pytest

import fusedrnn
from conformance import KEEPS
from fusedrnn import RNNOp, cells
from fusedrnn.engines.cpu.plan.partition import force_grid
from fusedrnn.jit.host import available_targets
from oracles import reference_results
from pairwise import target_names
from paper_cells import CELLS, cell_problem
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits

pytestmark = pytest.mark.usefixtures("poisoned", "use_all_threads")

SHAPE = Shape(5, 3, 7, 17, layers=2, bidirectional=True, lengths="edges")
SMALL = Shape(1, 1, 1, 2)
TARGETS = target_names()
# One product and one state; two products; vectors and scalars; four states.
SOME = ("janet", "lem", "fast_grnn", "slstm")


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """One target, unless a test goes through all."""
    monkeypatch.setenv("FUSEDRNN_TARGET", available_targets()[0].name)


def train(problem, keep="gates"):
    """The output, the final states and the gradients of a new op."""
    op = RNNOp(problem.spec)
    y, final, reserve = op.forward(
        problem.x, problem.params, problem.states, training=True, lengths=problem.lengths, reserve=keep
    )
    return y, final, op.backward(problem.dy, problem.dstates, reserve)


def check_training(problem, oracle):
    """Training, whatever is kept."""
    spec = problem.spec
    for keep in KEEPS:
        y, final, gradients = train(problem, keep)
        assert_close((y, final), oracle.forward, spec.dtype, spec)
        assert_gradients_close(gradients, oracle.gradients, spec.dtype, spec, *problem.x.shape[:2])


@pytest.mark.parametrize("name", CELLS)
def test_reference(name):
    problem, oracle = cell_problem(name, SHAPE)
    problem = problem.typed("float64")
    actual = reference_results(problem)
    assert_close(actual.forward, oracle.forward, "float64", problem.spec)
    assert_gradients_close(actual.gradients, oracle.gradients, "float64", problem.spec, SHAPE.T, SHAPE.N)


@pytest.mark.parametrize("name", CELLS)
def test_kernels(name):
    for shape in (SHAPE, SMALL):
        problem, oracle = cell_problem(name, shape)
        with fusedrnn.thread_limits(2):
            check_training(problem, oracle)
            y, final, _ = RNNOp(problem.spec).forward(
                problem.x, problem.params, problem.states, lengths=problem.lengths
            )
            assert_close((y, final), oracle.forward, "float32", problem.spec)


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, TARGETS[1 + number % (len(TARGETS) - 1)]) for number, name in enumerate(SOME)],
    indirect=["target"],
)
def test_float64_on_another_target(name, target, small_chunks):
    problem, oracle = cell_problem(name, SHAPE)
    with fusedrnn.thread_limits(2):
        check_training(problem.typed("float64"), oracle)


@pytest.mark.parametrize("name", SOME)
def test_bits(name):
    """They depend neither on how threads divide the work nor on what is kept; nor on chunks of a stream."""
    problem, _ = cell_problem(name, SHAPE)
    results = []
    for grid in ((1, 1, 1), (2, 1, 2), (1, 2, 1), (1, 1, 3)):
        with fusedrnn.thread_limits(int(np.prod(grid))), force_grid(grid):
            results += [train(problem, keep) for keep in KEEPS]
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


@pytest.mark.parametrize(("name", "compute"), [("lem", "bfloat16"), ("lem", "int8"), ("fast_grnn", "int8_weights")])
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


def test_every_cell_is_short_and_names_its_paper():
    assert len(set(CELLS.values())) == len(cells.__all__)
    for cell in CELLS.values():
        assert "https://arxiv.org/abs/" in cell.__doc__
