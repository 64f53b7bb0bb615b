"""The same bits of gradients: whatever the threads, blocks, batch, padding, memory's layout, kind of reserve."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp
from fusedrnn.engines.cpu.plan.plans import make_plan
from fusedrnn.engines.cpu.tuning import tuned
from fusedrnn.spec import DTYPES, MODES
from layouts import LAYOUTS, spread
from problems import Shape, assert_same_bits, make_problem

pytestmark = [pytest.mark.usefixtures("poisoned", "use_all_threads"), pytest.mark.pairwise]

MANY_ROWS = Shape(9, 29, 17, 33, layers=2, bidirectional=True, lengths="edges")
FEW_ROWS = Shape(9, 3, 17, 129, layers=2, lengths="edges")
ONE_WAY = Shape(9, 37, 5, 33, layers=3, lengths="edges")


def train(problem, op=None, keep="gates", seed=0, **changes):
    """A forward pass in training: outputs, final states, reserve."""
    options = {"states": problem.states, "lengths": problem.lengths, **changes}
    op = op or RNNOp(problem.spec)
    return op.forward(problem.x, problem.params, **options, training=True, reserve=keep, seed=seed)


def run(problem, op=None, keep="gates", seed=0, **options):
    """Outputs, final states, gradients of a new op."""
    op = op or RNNOp(problem.spec)
    y, final, reserve = train(problem, op, keep, seed)
    return y, final, op.backward(problem.dy, problem.dstates, reserve, **options)


def rows(problem, indices):
    """The same problem with these sequences of the batch, in this order."""
    lengths = None if problem.lengths is None else problem.lengths[indices]
    states, dstates = (tuple(state[:, indices] for state in some) for some in (problem.states, problem.dstates))
    return replace(
        problem, x=problem.x[:, indices], states=states, lengths=lengths, dy=problem.dy[:, indices], dstates=dstates
    )


def select(result, indices):
    """What belongs to those sequences in a result, gradients of parameters left out."""
    y, final, (dx, _, dstates) = result
    states = [state[:, indices] for state in (*final, *dstates)]
    return y[:, indices], dx[:, indices], states


def all_sequences(result):
    return select(result, slice(None))


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.mark.parametrize(("shape", "p"), [(MANY_ROWS, 0.4), (FEW_ROWS, 0.0), (ONE_WAY, 0.4)], ids=str)
def test_bits_do_not_depend_on_threads_and_reserve(mode, dtype, target, shape, p, small_chunks):
    problem = make_problem(mode, shape, dtype)
    problem = replace(problem, spec=replace(problem.spec, dropout=p))
    expected, grids = run(problem, seed=7), set()
    for threads, keep in product((1, 2, 3, 4, 6), ("gates", "states")):
        grids.add(make_plan(problem.spec, target, shape.T, shape.N, threads, "backward").grid)
        with fusedrnn.thread_limits(threads):
            assert_same_bits(run(problem, keep=keep, seed=7), expected)
    assert len(grids) > 2


@pytest.mark.parametrize("shape", [MANY_ROWS, FEW_ROWS], ids=str)
def test_bits_do_not_depend_on_blocks(mode, dtype, target, shape):
    """However many rows are multiplied at once, and packed for it."""
    problem = make_problem(mode, shape, dtype)
    expected, plans = run(problem), set()
    sizes = (1, 1, 1, 1), (70, 100, 8, 1 << 14), (3, 10_000, 11, 1 << 20), (999, 1, 64, 1)
    for chunk, block, at_once, cache in sizes:
        rows = {"min_chunk_rows": chunk, "max_chunk_rows": chunk, "min_dx_chunk_rows": chunk}
        with tuned(**rows, l2_bytes=cache, block_rows=block, gemm_rows=at_once):
            plan = make_plan(problem.spec, target, shape.T, shape.N, 2, "backward")
            gemms = (plan.workspace.fields[name] for name in ("inner", "packed_panels"))
            plans.add((plan.share.chunk, plan.share.block, *gemms))
            for threads, keep in ((1, "states"), (2, "gates"), (3, "states")):
                with fusedrnn.thread_limits(threads):
                    assert_same_bits(run(problem, keep=keep), expected)
    assert len(plans) == 4


def test_training_has_the_bits_of_inference(mode, dtype, target):
    problem = make_problem(mode, MANY_ROWS, dtype)
    for keep in ("gates", "states"):
        plain = RNNOp(problem.spec).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
        assert_same_bits(train(problem, keep=keep)[:2], plain[:2])


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_the_batch(mode, dtype, target, threads):
    """Alone, permuted, in part, repeated: what a sequence gets depends on the sequence."""
    problem = make_problem(mode, MANY_ROWS, dtype)
    rng = np.random.default_rng(0)
    some = [[row] for row in range(4)] + [rng.permutation(29), rng.integers(0, 29, 7), np.arange(29)[::-2]]
    with fusedrnn.thread_limits(threads):
        whole = run(problem)
        for indices in some:
            assert_same_bits(all_sequences(run(rows(problem, indices))), select(whole, indices))


@pytest.mark.parametrize("keep", ["gates", "states"])
@pytest.mark.parametrize("shape", [MANY_ROWS, FEW_ROWS, ONE_WAY], ids=str)
def test_padded_sequence_has_the_bits_of_the_trimmed_one(mode, dtype, target, shape, keep, small_chunks):
    """What padding holds is not read; a padded sequence is the trimmed one."""
    problem = make_problem(mode, shape, dtype)
    x, dy = problem.x.copy(), problem.dy.copy()
    x[problem.padding] = dy[problem.padding] = np.nan
    with fusedrnn.thread_limits(2):
        whole = run(replace(problem, x=x, dy=dy), keep=keep)
        assert_same_bits(whole, run(problem, keep=keep))
        y, final, (dx, _, dstates) = whole
        assert not dx[problem.padding].any()
        for row, length in enumerate(problem.lengths[:4]):
            sequence = rows(problem, [row])
            trimmed = replace(sequence, x=sequence.x[:length], dy=sequence.dy[:length], lengths=None)
            result = y[:0, [row]], dx[:0, [row]], [*sequence.states, *sequence.dstates]
            if length:
                result = all_sequences(run(trimmed, keep=keep))
            cut = y[:length], final, (dx[:length], None, dstates)
            assert_same_bits(result, select(cut, [row]))


def test_empty_sequences_do_not_change_parameter_gradients(mode, dtype):
    """Empty sequences in the batch change no gradient of the parameters, wherever they are."""
    problem = make_problem(mode, replace(MANY_ROWS, lengths="some"), dtype)
    larger = make_problem(mode, replace(MANY_ROWS, N=40, lengths="none"), dtype)
    indices = np.sort(np.random.default_rng(0).permutation(40)[:29])
    x, dy, lengths = larger.x, larger.dy, larger.lengths
    x[:, indices], dy[:, indices], lengths[indices] = problem.x, problem.dy, problem.lengths
    for wide, narrow in zip((*larger.states, *larger.dstates), (*problem.states, *problem.dstates), strict=True):
        wide[:, indices] = narrow
    assert_same_bits(run(replace(larger, params=problem.params))[2][1], run(problem)[2][1])


def test_full_lengths_have_the_bits_of_no_lengths(mode, dtype, target):
    problem = make_problem(mode, MANY_ROWS, dtype)
    full = np.full(MANY_ROWS.N, MANY_ROWS.T)
    for keep in ("gates", "states"):
        with_lengths, without = (run(replace(problem, lengths=lengths), keep=keep) for lengths in (full, None))
        assert_same_bits(with_lengths, without)


def test_zeros_have_the_bits_of_none(mode, dtype, target):
    """Of the gradients of outputs and of each final state, and of initial states; and all of them at once."""
    problem = make_problem(mode, MANY_ROWS, dtype)
    zeros = replace(problem, states=tuple(map(np.zeros_like, problem.states)))
    assert_same_bits(run(zeros), run(replace(problem, states=None)))
    op = RNNOp(problem.spec)
    reserve = train(problem, op)[2]
    no_dy, no_dstates = np.zeros_like(problem.dy), tuple(map(np.zeros_like, problem.dstates))
    assert_same_bits(op.backward(no_dy, problem.dstates, reserve), op.backward(None, problem.dstates, reserve))
    assert_same_bits(op.backward(problem.dy, no_dstates, reserve), op.backward(problem.dy, None, reserve))
    for index in range(len(no_dstates)):
        zero, none = list(problem.dstates), list(problem.dstates)
        zero[index], none[index] = no_dstates[index], None
        assert_same_bits(op.backward(problem.dy, zero, reserve), op.backward(problem.dy, none, reserve))
    dx, dparams, dstates = op.backward(None, None, reserve)
    assert not any(gradient.any() for gradient in (dx, dparams, *dstates))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bits_do_not_depend_on_the_layout_of_inputs(mode, dtype, layout):
    problem = make_problem(mode, MANY_ROWS, dtype)
    states, dstates = (tuple(map(layout, some)) for some in (problem.states, problem.dstates))
    other = replace(
        problem, x=layout(problem.x), params=layout(problem.params), states=states, dy=layout(problem.dy),
        dstates=dstates,
    )  # fmt: skip
    assert_same_bits(run(other), run(problem))


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 1, 2)], ids=str)
def test_strides_of_zero_have_the_bits_of_copies(mode, dtype, axis):
    """Strides of zero, as in the gradient of a sum or a mean."""
    problem = make_problem(mode, MANY_ROWS, dtype)
    part = problem.dy[tuple(slice(1) if number in np.atleast_1d(axis) else slice(None) for number in range(3))]
    dy = np.broadcast_to(part, problem.dy.shape)
    assert_same_bits(run(replace(problem, dy=dy)), run(replace(problem, dy=dy.copy())))


def buffers(problem, fill):
    """A buffer for every gradient, dx with gaps between its rows."""
    spec, dtype = problem.spec, problem.spec.dtype
    dx = spread(np.empty(problem.x.shape, dtype), (-2, 3, 1))
    result = dx, np.empty(spec.layout.size, dtype), tuple(np.empty(buffer.shape, dtype) for buffer in problem.dstates)
    for buffer in (dx, result[1], *result[2]):
        buffer[...] = fill(buffer.shape)
    return result


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [MANY_ROWS, ONE_WAY], ids=str)
def test_out_has_the_bits_of_new_arrays(mode, dtype, target, shape, threads):
    """Buffers that are given get what new ones get; what lies between the rows of dx stays."""
    problem = make_problem(mode, shape, dtype)
    with fusedrnn.thread_limits(threads):
        out = buffers(problem, lambda shape: np.nan)
        holder = out[0].base
        result = run(problem, out=out)
        assert_same_bits(result, run(problem))
    assert result[2][0] is out[0] and result[2][1] is out[1]
    assert all(gradient is buffer for gradient, buffer in zip(result[2][2], out[2], strict=True))
    out[0][...] = np.nan
    assert np.isnan(holder).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [MANY_ROWS, ONE_WAY], ids=str)
def test_add_rounds_once(mode, dtype, target, shape, threads, small_chunks):
    """Added means: what would be written, added to what was there, rounded once."""
    problem = make_problem(mode, shape, dtype)
    rng = np.random.default_rng(0)
    with fusedrnn.thread_limits(threads):
        written = run(problem)[2]
        out = buffers(problem, lambda shape: rng.standard_normal(shape).astype(dtype))
        dx, dparams, dstates = written
        totals = out[0] + dx, out[1] + dparams, tuple(a + b for a, b in zip(out[2], dstates, strict=True))
        padding = out[0][problem.padding].copy()
        added = run(problem, grad_req="add", out=out)[2]
    assert_same_bits(added, totals)
    assert_same_bits(out[0][problem.padding], padding)


@pytest.mark.parametrize("keep", ["gates", "states"])
def test_single_gradient_has_the_bits_of_all_gradients(mode, dtype, target, keep):
    """Each gradient for itself is the one among all."""
    problem = make_problem(mode, MANY_ROWS, dtype)
    op = RNNOp(problem.spec)
    reserve = train(problem, op, keep)[2]
    gradients = op.backward(problem.dy, problem.dstates, reserve)
    for index, name in enumerate(("x", "params", "states")):
        requests = {other: "write" if other == name else "null" for other in ("x", "params", "states")}
        actual = op.backward(problem.dy, problem.dstates, reserve, grad_req=requests)
        expected = [None] * len(gradients)
        expected[index] = gradients[index]
        assert_same_bits(actual, tuple(expected))


@pytest.mark.parametrize("keep", ["gates", "states"])
def test_calls_do_not_affect_later_calls(mode, dtype, target, keep):
    """Calls do not remember each other: not through a reserve, nor memory used before, of other sizes too."""
    problem = make_problem(mode, MANY_ROWS, dtype)
    op = RNNOp(problem.spec)
    y, final, reserve = train(problem, op, keep)
    first = y, final, op.backward(problem.dy, problem.dstates, reserve)
    assert_same_bits(op.backward(problem.dy, problem.dstates, reserve), first[2])
    expected = run(problem, keep=keep)
    assert_same_bits(first, expected)
    del reserve
    for shape in (Shape(40, 50, 17, 33, 2, True), Shape(1, 1, 17, 33, 2, True), MANY_ROWS):
        run(make_problem(mode, shape, dtype, seed=1), op, keep)
    assert_same_bits(run(problem, op, keep), expected)
    assert_same_bits(first, expected)
