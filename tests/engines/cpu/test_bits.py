"""The same bits: whatever the threads, the batch, the place in it, the padding, the memory's layout, the call."""

from dataclasses import replace

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp
from fusedrnn.engines.cpu.plan.plans import make_plan
from fusedrnn.spec import DTYPES, MODES
from layouts import LAYOUTS
from problems import Problem, Shape, assert_same_bits, make_problem

pytestmark = [pytest.mark.usefixtures("poisoned", "use_all_threads"), pytest.mark.pairwise]

MANY_ROWS = Shape(17, 29, 17, 33, layers=2, bidirectional=True, lengths="edges")
FEW_ROWS = Shape(17, 3, 17, 129, layers=2, lengths="edges")
ONE_WAY = Shape(9, 37, 5, 33, layers=2, lengths="edges")


def run(problem, **changes):
    """A call of a new op: outputs and final states."""
    options = {"states": problem.states, "lengths": problem.lengths, **changes}
    return RNNOp(problem.spec).forward(problem.x, problem.params, **options)[:2]


def rows(problem, indices):
    """The same problem with these sequences of the batch, in this order."""
    lengths = None if problem.lengths is None else problem.lengths[indices]
    states = tuple(state[:, indices] for state in problem.states)
    return Problem(problem.spec, problem.x[:, indices], problem.params, states, lengths)


def select(result, indices):
    """Those sequences of a result."""
    return result[0][:, indices], tuple(state[:, indices] for state in result[1])


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.mark.parametrize("shape", [MANY_ROWS, FEW_ROWS, ONE_WAY], ids=str)
def test_bits_do_not_depend_on_threads(mode, dtype, target, shape, small_chunks):
    problem = make_problem(mode, shape, dtype)
    results, grids = [], set()
    for threads in (1, 2, 3, 4, 6):
        grids.add(make_plan(problem.spec, target, shape.T, shape.N, threads).grid)
        with fusedrnn.thread_limits(threads):
            results.append(run(problem))
    assert len(grids) > 2
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_the_batch(mode, dtype, target, threads):
    """Alone, permuted, in part, repeated: a row's bits depend on the row."""
    problem = make_problem(mode, MANY_ROWS, dtype)
    rng = np.random.default_rng(0)
    some = [[row] for row in range(4)] + [rng.permutation(29), rng.integers(0, 29, 7), np.arange(29)[::-2]]
    with fusedrnn.thread_limits(threads):
        whole = run(problem)
        for indices in some:
            assert_same_bits(run(rows(problem, indices)), select(whole, indices))


@pytest.mark.parametrize("shape", [MANY_ROWS, FEW_ROWS, ONE_WAY], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_padded_sequence_has_the_bits_of_the_trimmed_one(mode, dtype, target, threads, shape, small_chunks):
    """A padded sequence is the trimmed one, zeros behind it, whatever the padding holds."""
    problem = make_problem(mode, shape, dtype)
    x = problem.x.copy()
    x[np.arange(shape.T)[:, None] >= problem.lengths] = np.nan
    with fusedrnn.thread_limits(threads):
        y, final = run(replace(problem, x=x))
        for row, length in enumerate(problem.lengths[:6]):
            assert not y[length:, row].any()
            sequence = rows(problem, [row])
            trimmed = replace(sequence, x=sequence.x[:length], lengths=None)
            result = run(trimmed) if length else (y[:0, [row]], sequence.states)
            assert_same_bits(result, select((y[:length], final), [row]))


def test_full_lengths_have_the_bits_of_no_lengths(mode, dtype, target):
    problem = make_problem(mode, MANY_ROWS, dtype)
    assert_same_bits(run(problem, lengths=[MANY_ROWS.T] * MANY_ROWS.N), run(problem, lengths=None))


def test_zero_states_have_the_bits_of_no_states(mode, dtype, target):
    problem = make_problem(mode, MANY_ROWS, dtype)
    zeros = tuple(np.zeros_like(state) for state in problem.states)
    assert_same_bits(run(problem, states=zeros), run(problem, states=None))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bits_do_not_depend_on_the_layout_of_inputs(mode, dtype, layout):
    problem = make_problem(mode, MANY_ROWS, dtype)
    states = tuple(map(layout, problem.states))
    other = Problem(problem.spec, layout(problem.x), layout(problem.params), states, problem.lengths)
    assert_same_bits(run(other), run(problem))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_of_zero_have_the_bits_of_copies(mode, dtype, axis):
    """A stride of zero is as good as the copies it stands for."""
    problem = make_problem(mode, MANY_ROWS, dtype)
    x = np.broadcast_to(problem.x.take([0], axis), problem.x.shape)
    assert_same_bits(run(replace(problem, x=x)), run(replace(problem, x=x.copy())))


def test_calls_do_not_affect_later_calls(mode, dtype, target):
    """Calls do not remember each other: not through state, nor through scratch of other sizes."""
    problem = make_problem(mode, MANY_ROWS, dtype)
    op = RNNOp(problem.spec)
    first = op.forward(problem.x, problem.params, problem.states, lengths=problem.lengths)[:2]
    expected = first[0].copy(), tuple(state.copy() for state in first[1])
    for shape in (Shape(40, 50, 17, 33), Shape(1, 1, 17, 33)):
        op.forward(make_problem(mode, shape, dtype).x, problem.params)
    last = op.forward(problem.x, problem.params, problem.states, lengths=problem.lengths)[:2]
    assert_same_bits(last, expected)
    assert_same_bits(first, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_out_has_the_bits_of_a_new_array(mode, dtype, target, threads):
    """``out`` gets what a new array gets; what lies between its rows stays."""
    problem = make_problem(mode, MANY_ROWS, dtype)
    width = problem.spec.output_size
    holder = np.full((17, 2 * 29, width + 3), 7, dtype)
    out = holder[::-1, ::-2, 1 : 1 + width]
    with fusedrnn.thread_limits(threads):
        y, final = run(problem, out=out)
        assert y is out
        assert_same_bits((out, final), run(problem))
    out[...] = 7
    assert (holder == 7).all()


def test_function_has_the_bits_of_the_op(mode, dtype):
    """``fusedrnn.rnn`` is the op."""
    problem = make_problem(mode, MANY_ROWS, dtype)
    y, *final = fusedrnn.rnn(
        problem.x, problem.params, *problem.states, sequence_length=problem.lengths, use_sequence_length=True,
        state_size=33, num_layers=2, mode=mode, bidirectional=True, state_outputs=True, p=0.5,
    )  # fmt: skip
    assert_same_bits((y, final), run(problem))
