"""Outputs that bypass the caches: the same bits, of memory that begins at a cache line or not."""

import math

import numpy as np
import pytest

import fusedrnn
from assembly import TARGETS, parsed
from fusedrnn import RNNOp, RNNSpec, cells, init_params
from fusedrnn.cell.cells import Variant
from fusedrnn.engines.cpu.kernels.forward import build_forward
from fusedrnn.engines.cpu.kernels.training import build_training
from fusedrnn.engines.cpu.plan.plans import make_plan
from fusedrnn.engines.cpu.tuning import tuned
from fusedrnn.jit.host import target_for
from fusedrnn.jit.target import is_x86
from fusedrnn.runtime.buffers import aligned_empty
from problems import Shape, assert_same_bits, problem_of

SHAPES = {
    "whole lines": Shape(5, 3, 4, 32),
    "two directions": Shape(5, 4, 4, 16, layers=2, bidirectional=True, lengths="edges"),
    "tail": Shape(5, 3, 4, 33, layers=2),
    "half a line": Shape(5, 3, 4, 8, bidirectional=True),
}
NONTEMPORAL, CACHED = {"max_cached_output_bytes": 0}, {"max_cached_output_bytes": 1 << 40}


def between_lines(shape, dtype):
    """An array that begins in the middle of a cache line."""
    size = math.prod(shape)
    return aligned_empty((size + 4,), dtype)[4:].reshape(shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name, dtype", [("ind_rnn", "float32"), ("min_gru", "float64")])
@pytest.mark.parametrize("place", [aligned_empty, between_lines])
@pytest.mark.usefixtures("use_all_threads")
def test_bits(shape, name, dtype, place, target):
    """Of inference and training, at once and in a second call."""
    spec = RNNSpec(getattr(cells, name), shape.I, shape.H, shape.layers, shape.bidirectional, dtype=dtype)
    problem = problem_of(spec, shape)
    results = []
    for tuning in (CACHED, NONTEMPORAL):
        with tuned(**tuning), fusedrnn.thread_limits(2):
            op, out = RNNOp(spec), place((shape.T, shape.N, spec.output_size), np.dtype(dtype))
            for training in (False, True, False):
                out[...] = np.nan  # also makes the memory resident
                y, _, _ = op.forward(problem.x, problem.params, lengths=problem.lengths, training=training, out=out)
                results.append(y.copy())
    for y in results:
        assert_same_bits(y, results[0])


def test_plan():
    """An output that no cache holds is stored past the caches, unless a step has a GEMM."""
    for mode, expected in ((cells.ind_rnn, True), ("gru", False)):
        spec = RNNSpec(mode, 4, 1024)
        with tuned(max_cached_output_bytes=1 << 20):
            plans = [make_plan(spec, target_for(1024, "float32"), steps, 32, 1) for steps in (4, 64)]
        assert [plan.nontemporal_output for plan in plans] == [False, expected]


@pytest.mark.skipif(not is_x86(), reason="reads x86 assembly")
@pytest.mark.parametrize("pinned", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("build", [build_forward, build_training])
def test_emitted(build, pinned):
    """Non-temporal stores of whole vectors, and a fence after them; neither in a cell with a GEMM at each step."""
    variants = Variant(cells.ind_rnn), RNNSpec("gru", 8, 8).variant
    elementwise, gated = ("\n".join(parsed(build(v, "float32", pinned), pinned)["direction_loop"]) for v in variants)
    for instruction in ("movntps", "sfence"):
        assert instruction in elementwise
        assert instruction not in gated


def test_new_memory():
    """Its pages are in the caches already: a first call stores ordinarily, and has the same bits."""
    spec = RNNSpec(cells.ind_rnn, 4, 1024)
    rng = np.random.default_rng(0)
    x, params = rng.standard_normal((64, 32, 4), np.float32), init_params(spec, rng)
    with tuned(**NONTEMPORAL):
        op, out = RNNOp(spec), aligned_empty((64, 32, 1024), np.float32)
        first = op.forward(x, params, out=out)[0].copy()
        assert_same_bits(op.forward(x, params, out=out)[0], first)
