"""Residual connections, and dropout of the input: against torch in float64, and against calls without them."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import fusedrnn
from conformance import KEEPS
from fusedrnn import RNNOp, RNNSpec, cells
from fusedrnn.dropout import INPUT_STREAM, mask
from fusedrnn.engines.cpu.plan.partition import force_grid
from fusedrnn.jit.host import available_targets
from oracles import reference_results
from paper_cells import PaperSteps, check_training
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, problem_of
from variants import Steps, variant_results

pytestmark = pytest.mark.usefixtures("poisoned", "use_all_threads")

STACK = Shape(5, 3, 7, 17, layers=3, lengths="edges")
NETWORKS = {
    "stack": ("lstm", STACK, {}),
    "every layer": ("gru", replace(STACK, I=17), {}),
    "both directions": ("gru", replace(STACK, bidirectional=True), {}),
    "every layer in both directions": ("rnn_tanh", replace(STACK, I=34, bidirectional=True), {}),
    "one layer": ("lstm", Shape(6, 9, 33, 33, states=False), {}),
    "projection": ("lstm", replace(STACK, I=10, bidirectional=True), {"projection_size": 5}),
    "two stages": ("gru", STACK, {"reset_after": False, "reverse": True}),
    "of a projection": ("lstm", replace(STACK, bidirectional=True), {"residual": "projection"}),
    "of a cell's projection": (cells.minimal_gated_unit, STACK, {"residual": "projection", "bias": "single"}),
    "of a cell's input": (cells.minimal_gated_unit, STACK, {}),
}
GRIDS = ((1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 1, 2), (1, 2, 2))
named = pytest.mark.parametrize("name", NETWORKS)


def residual_problem(name, **more):
    mode, shape, options = NETWORKS[name]
    options = {"residual": "identity", **options, **more}
    return problem_of(RNNSpec(mode, shape.I, shape.H, shape.layers, shape.bidirectional, **options), shape)


def oracle_of(problem, absent="nothing"):
    steps = Steps if isinstance(problem.spec.mode, str) else PaperSteps
    return variant_results(problem, absent, steps)


def train(problem, keep="gates", seed=None):
    op = RNNOp(problem.spec)
    y, final, reserve = op.forward(
        problem.x, problem.params, problem.states, training=True, lengths=problem.lengths, reserve=keep, seed=seed
    )
    return y, final, op.backward(problem.dy, problem.dstates, reserve)


def infer(problem):
    return RNNOp(problem.spec).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)[:2]


@named
def test_against_torch(name, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_TARGET", available_targets()[0].name)
    problem = residual_problem(name)
    oracle, double = oracle_of(problem), problem.typed("float64")
    reference = reference_results(double)
    assert_close(reference.forward, oracle.forward, "float64", double.spec)
    assert_gradients_close(reference.gradients, oracle.gradients, "float64", double.spec, *double.x.shape[:2])
    kinds = [("float32", 1), ("float32", 3), ("float64", 2)]
    for dtype, threads in kinds if name in ("stack", "projection") else kinds[:2]:
        typed = problem.typed(dtype)
        with fusedrnn.thread_limits(threads):
            assert_close(infer(typed), oracle.forward, dtype, typed.spec)
            check_training(typed, oracle)


@pytest.mark.parametrize("name", ["projection", "of a projection"])
def test_on_every_target(name, target, small_chunks):
    problem = residual_problem(name)
    oracle = oracle_of(problem)
    with fusedrnn.thread_limits(2):
        assert_close(infer(problem), oracle.forward, "float32", problem.spec)
        check_training(problem, oracle)


@pytest.mark.parametrize("name", ["stack", "every layer in both directions", "of a projection"])
def test_bits_depend_on_neither_threads_nor_batch(name):
    problem = residual_problem(name, dropout=0.3, input_dropout=0.2)
    results = []
    for grid, keep in product(GRIDS, KEEPS):
        with fusedrnn.thread_limits(int(np.prod(grid))), force_grid(grid):
            results.append((*infer(problem), *train(problem, keep, seed=4)))
    for result in results[1:]:
        assert_same_bits(result, results[0])
    lengths = None if problem.lengths is None else problem.lengths[[2]]
    states = None if problem.states is None else tuple(state[:, [2]] for state in problem.states)
    alone = infer(replace(problem, x=problem.x[:, [2]], lengths=lengths, states=states))
    np.testing.assert_array_equal(alone[0], results[0][0][:, [2]])


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8", "int8_weights"])
@pytest.mark.parametrize("cell", ["lstm", cells.minimal_gated_unit], ids=["lstm", "cell"])
def test_one_layer_adds_its_input_in_any_format(cell, compute):
    """The bits of the plain layer, and one addition."""
    shape = Shape(6, 5, 16, 16, lengths="edges")
    plain = problem_of(RNNSpec(cell, 16, 16, compute=compute), shape)
    problem = replace(plain, spec=replace(plain.spec, residual="identity"))
    (y, final), (plain_y, plain_final) = infer(problem), infer(plain)
    x, dy = (np.where(plain.padding[:, :, None], 0, array) for array in (plain.x, plain.dy))
    assert_same_bits((y, final), (plain_y + x, plain_final))
    if plain.spec.is_trainable:
        y, final, (dx, dparams, dstates) = train(problem)
        plain_y, plain_final, (plain_dx, plain_dparams, plain_dstates) = train(plain)
        assert_same_bits((y, final), (plain_y + x, plain_final))
        assert_same_bits((dx, dparams, dstates), (plain_dx + dy, plain_dparams, plain_dstates))


def test_calls_of_every_kind():
    """Streams, cached calls, gradients that are missing, resets and packed weights that are not needed."""
    problem = replace(residual_problem("stack"), lengths=None)
    op, oracle = RNNOp(problem.spec), oracle_of(problem)
    for _ in range(3):
        y, final, reserve = op.forward(problem.x, problem.params, problem.states, training=True)
        assert_close((y, final), oracle.forward, "float32", problem.spec)
        gradients = op.backward(problem.dy, problem.dstates, reserve)
        assert_gradients_close(gradients, oracle.gradients, "float32", problem.spec, *problem.x.shape[:2])
    stream = op.stream(problem.params, 3, problem.states)
    y = np.concatenate([stream(problem.x[t : t + 1]) for t in range(5)])
    assert_same_bits((y, stream.states), infer(problem))
    without_dy = oracle_of(problem, "dy")
    gradients = op.backward(None, problem.dstates, reserve)
    assert_gradients_close(gradients, without_dy.gradients, "float32", problem.spec, *problem.x.shape[:2])
    resets = np.zeros(problem.x.shape[:2], bool)
    resets[2] = True
    whole, _, _ = op.forward(problem.x, problem.params, problem.states, resets=resets)
    second, _, _ = op.forward(problem.x[2:], problem.params)
    np.testing.assert_array_equal(whole[2:], second)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_state_that_the_output_does_not_show(backend):
    """The states of a step are the final ones of the steps up to it; gradients flow into every one."""
    for name in ("projection", "of a projection"):
        problem = residual_problem(name)
        spec = replace(problem.spec, bidirectional=False, num_layers=2)
        problem = problem_of(spec, Shape(5, 3, spec.input_size, spec.hidden_size, 2))
        op = RNNOp(spec, backend)
        operands = problem.x, problem.params, problem.states
        (y, h, c), final, reserve = op.forward(*operands, all_states=True, training=True)
        for t in range(5):
            part, (h_n, c_n), _ = op.forward(problem.x[: t + 1], problem.params, problem.states)
            np.testing.assert_array_equal(y[t], part[t])
            assert_same_bits((h[t], c[t]), (h_n[-1], c_n[-1]))
        assert_same_bits((h[-1], c[-1]), [state[-1] for state in final])
        # The gradient of the last step's states is that of the final states of the last layer.
        dh, dc = np.zeros_like(h), np.zeros_like(c)
        dh[-1], dc[-1] = (state[-1] for state in problem.dstates)
        dstates = tuple(np.where(np.arange(2)[:, None, None] == 1, state, 0) for state in problem.dstates)
        through_steps = op.backward((problem.dy, dh, dc), None, reserve)
        expected = op.backward((problem.dy, None, None), dstates, reserve)
        assert_same_bits(through_steps, expected)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("residual", [None, "identity"])
def test_input_dropout_is_a_mask_of_the_input(bidirectional, residual):
    """The bits of a call on the input after the mask; its gradient goes through the mask."""
    spec = RNNSpec("gru", 12, 6, 2, bidirectional, input_dropout=0.5, residual=residual)
    problem = problem_of(spec, Shape(5, 3, 12, 6, 2, bidirectional, lengths="edges"))
    factor = mask(9, 0.5, INPUT_STREAM, *problem.x.shape) * np.float32(2)  # exactly
    assert 0.3 < (factor == 0).mean() < 0.7
    plain = replace(problem, spec=replace(spec, input_dropout=0.0), x=problem.x * factor)
    for keep in KEEPS:
        y, final, (dx, *others) = train(problem, keep, seed=9)
        plain_y, plain_final, (plain_dx, *plain_others) = train(plain, keep)
        assert_same_bits((y, final, others), (plain_y, plain_final, plain_others))
        np.testing.assert_array_equal(dx, plain_dx * factor)
    assert_same_bits(infer(problem), infer(replace(plain, x=problem.x)))
    reference = reference_results(problem, 9)
    assert_close((y, final), reference.forward, "float32", spec)
    assert_gradients_close((dx, *others), reference.gradients, "float32", spec, 5, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"residual": True}, "residual must be one of identity, projection; got True"),
        ({"residual": "identity"}, "residual='identity' needs a layer whose input has the size of its output: two "
         "layers or more, or an input_size of 8; got 1 layer of 4 inputs"),
        ({"input_dropout": 1.0}, r"input_dropout must be a probability in \[0, 1\); got 1.0"),
        ({"input_dropout": None}, "input_dropout must be a number; got None"),
    ],
)  # fmt: skip
def test_errors(options, words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        RNNSpec("gru", 4, 8, **options)
