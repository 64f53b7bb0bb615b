"""Denormal numbers: flushed inside our kernels, where they would cost much, and nowhere else."""

import threading
from dataclasses import replace

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp
from fusedrnn.engines.reference import forward as reference
from fusedrnn.number_formats import quantize_rows
from fusedrnn.spec import DTYPES, MODES
from problems import Shape, assert_close, make_problem

pytestmark = [pytest.mark.usefixtures("poisoned", "use_all_threads"), pytest.mark.pairwise]

SHAPE = Shape(5, 29, 17, 33, layers=2, bidirectional=True, lengths="edges")


def keeps_denormals():
    """Whether this thread computes with denormals: as result, as operand, in both formats."""
    single, double = np.float32(1e-38), np.float64(1e-308)
    small = single * np.float32(1e-3), double * np.float64(1e-3)
    again = small[0] * np.float32(1e3), small[1] * np.float64(1e3)
    return all(number > 0 for number in (*small, *again))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_caller_keeps_its_denormals(mode, threads, target):
    assert keeps_denormals()
    problem = make_problem(mode, SHAPE)
    with fusedrnn.thread_limits(threads):
        RNNOp(problem.spec).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
    assert keeps_denormals()


def test_every_calling_thread_keeps_its_denormals():
    """Calls that find the pool taken run elsewhere: those threads keep theirs, too."""
    problem = make_problem("gru", SHAPE)
    op, results = RNNOp(problem.spec), []

    def work():
        for _ in range(10):
            op.forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
        results.append(keeps_denormals())

    threads = [threading.Thread(target=work) for _ in range(3)]
    with fusedrnn.thread_limits(2):
        for thread in threads:
            thread.start()
        work()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_flush_denormals(threads, target):
    """A product that is denormal is zero inside, in every thread: without flushing it would not be."""
    spec = fusedrnn.RNNSpec("rnn_relu", 1, 64)
    params = np.zeros(spec.layout.size, np.float32)
    spec.layout.view(params, 0, 0, "i2h_weight")[...] = 1e-20
    x = np.full((1, 30, 1), 1e-20, np.float32)
    with fusedrnn.thread_limits(threads):
        y, (h_n,), _ = RNNOp(spec).forward(x, params)
    assert not y.any()
    assert not h_n.any()
    assert x[0, 0, 0] * params[0] > 0


@pytest.mark.parametrize("compute", [None, "bfloat16", "int8", "int8_weights"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-33, 1e-35, 3e-37, 1e-40])
def test_bounds_in_each_format(compute, magnitude, target):
    """What flushing changes: of a sum of floats K times the smallest number; int8 products where their scales' is."""
    K, rng = 64, np.random.default_rng(0)
    spec = fusedrnn.RNNSpec("rnn_relu", K, 33, bias="none", compute=compute)
    params = rng.uniform(-0.2, 0.2, spec.layout.size).astype(np.float32)
    x = rng.uniform(-magnitude, magnitude, (1, 7, K)).astype(np.float32)
    y, _, _ = RNNOp(spec).forward(x, params)
    expected, _ = reference.forward(spec, x.astype(np.float64), params.astype(np.float64))
    error, rounding, smallest = np.abs(y - expected), 1e-6 * K * magnitude, float(np.finfo(np.float32).tiny)
    if compute != "int8":
        assert (error <= K * smallest + rounding).all()
        return
    x_scales, w_scales = quantize_rows(x[0])[1], quantize_rows(spec.layout.view(params, 0, 0, "i2h_weight"))[1]
    is_flushed = x_scales[:, None].astype(np.float64) * w_scales < smallest
    assert not y[0, is_flushed].any() and (error[0, ~is_flushed] <= rounding).all()
    assert is_flushed.any() == (magnitude < 1e-30) and is_flushed.all() == (magnitude < 1e-34)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["x", "params", "states", "all"])
def test_denormal_input_counts_as_zero(mode, dtype, where, target):
    """Numbers next to nothing count as nothing: no NaN, no infinity, the right result."""
    problem = make_problem(mode, SHAPE, dtype)
    tiny = np.finfo(dtype).smallest_subnormal * 1000
    changes = {"x": problem.x, "params": problem.params, "states": problem.states}
    for name in changes if where == "all" else [where]:
        value = changes[name]
        small = [np.copysign(tiny, array) for array in (value if name == "states" else [value])]
        changes[name] = tuple(small) if name == "states" else small[0]
    problem = replace(problem, **changes)
    actual = RNNOp(problem.spec).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
    x, params, states = problem.astype(np.float64)
    assert_close(actual, reference.forward(problem.spec, x, params, states, problem.lengths), dtype, problem.spec)


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_row(mode, target):
    """What is no number spoils its own sequence from that step on, and nothing else."""
    problem = make_problem(mode, Shape(5, 29, 17, 33, layers=2))
    clean = RNNOp(problem.spec).forward(problem.x, problem.params, problem.states)[0]
    x = problem.x.copy()
    x[2, 7] = np.nan
    y = RNNOp(problem.spec).forward(x, problem.params, problem.states)[0]
    assert np.isnan(y[2:, 7]).all()
    y[2:, 7] = clean[2:, 7]
    np.testing.assert_array_equal(y, clean)
