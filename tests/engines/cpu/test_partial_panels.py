"""GEMMs of part of a panel, and threads whose units begin in the middle of one: the bits of whole panels."""

import itertools

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp
from fusedrnn.engines.cpu.kernels.gemm import GEMM, GEMM_TN, emit_gemm
from fusedrnn.engines.cpu.kernels.lowered_cell import Blocking
from fusedrnn.engines.cpu.plan.partition import force_grid
from fusedrnn.engines.cpu.plan.plans import make_plan
from fusedrnn.engines.cpu.tuning import tuned
from fusedrnn.spec import DTYPES, MODES
from gemms import aligned, compiled
from problems import Shape, make_problem

UNTOUCHED = 99.0
pytestmark = pytest.mark.pairwise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["nn", "tn"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 33])
def test_gemm_of_any_vectors_of_a_panel(target, dtype, transposed, k):
    """The bits do not depend on the number of rows and vectors or on the first vector; nothing else is written."""
    signature = GEMM_TN if transposed else GEMM
    gemm = compiled(f"partial_{dtype}_{transposed}", target, lambda module: emit_gemm(module, target, dtype, signature))
    max_rows, width = target.tile
    num_rows = 2 * max_rows + 1
    lanes = target.lanes(dtype)
    rng = np.random.default_rng(0)
    a = aligned(rng.standard_normal((k, lanes) if transposed else (num_rows, k)).astype(dtype))
    b = aligned(rng.standard_normal((k, width, lanes)).astype(dtype))
    c_in = aligned(rng.standard_normal((num_rows, width, lanes)).astype(dtype))

    def run(rows, first, col_vecs):
        c = aligned(np.full_like(c_in, UNTOUCHED))
        table = np.array([a.ctypes.data + row * a.strides[0] for row in range(rows)], np.int64)
        output = []
        for array in (c_in, c):
            output += array.ctypes.data + first * array.strides[1], array.strides[0]
        source = a.ctypes.data if transposed else table.ctypes.data
        arguments = [rows, col_vecs, source, b.ctypes.data + first * b.strides[1], k, *output]
        gemm(*arguments, b.ctypes.data)
        return c

    for rows in range(1, (min(lanes, num_rows) if transposed else num_rows) + 1):
        whole = run(rows, 0, width)
        factors = a[:, :rows].T if transposed else a[:rows]
        expected = c_in[:rows] + np.tensordot(factors, b, 1)
        np.testing.assert_allclose(whole[:rows], expected, rtol=1e-4, atol=1e-4)
        assert np.all(whole[rows:] == UNTOUCHED)
        for first, last in itertools.combinations(range(width + 1), 2):
            part = run(rows, first, last - first)
            expected = np.full_like(whole, UNTOUCHED)
            expected[:rows, first:last] = whole[:rows, first:last]
            np.testing.assert_array_equal(part, expected)


def results(problem, keep):
    """Everything that inference, training and backward return."""
    op = RNNOp(problem.spec)
    y, states, _ = op.forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
    trained, final, reserve = op.forward(
        problem.x, problem.params, problem.states, lengths=problem.lengths, training=True, reserve=keep, seed=3
    )
    dx, dparams, dstates = op.backward(problem.dy, problem.dstates, reserve)
    return [y, *states, trained, *final, dx, dparams, *dstates]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("few", [0, 100], ids=["packed", "unpacked"])
@pytest.mark.parametrize("shape", [Shape(5, 7, 37, 149, layers=2, lengths="edges"), Shape(3, 2, 101, 83)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_threads_begin_inside_panels(mode, dtype, shape, few, target):
    problem = make_problem(mode, shape, dtype)
    blocking = Blocking(problem.spec.num_gates, target.tile[1])
    expected, within = None, {"forward": 0, "backward": 0}
    for threads, keep in zip(range(1, 6), itertools.cycle(("gates", "states")), strict=False):
        sizes = problem.spec, target, shape.T, shape.N, threads
        with (
            tuned(max_unpacked_reads=few, max_unpacked_reads_training=few),
            fusedrnn.thread_limits(threads),
            force_grid((1, 1, threads)),
        ):
            forward, backward = make_plan(*sizes), make_plan(*sizes, "backward")
            assert forward.grid == backward.grid == (1, 1, threads)
            within["forward"] += any(unit % blocking.block_unit_vecs for unit in forward.bounds["unit_starts"][:-1])
            within["backward"] += any(unit % target.tile[1] for unit in backward.bounds["unit_starts"][:-1])
            actual = results(problem, keep)
        expected = expected or actual
        for array, expected_array in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(array, expected_array)
    assert within["backward"]
    assert within["forward"] or blocking.block_unit_vecs == 1
