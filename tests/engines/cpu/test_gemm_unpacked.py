"""Calls of few rows use unpacked weights: the bits are those of packed weights, and nothing is packed or cached."""

from dataclasses import replace

import numpy as np
import pytest

from fusedrnn import RNNOp, frozen
from fusedrnn.engines.cpu.tuning import tuned
from fusedrnn.spec import DTYPES, MODES
from problems import Shape, make_problem

pytestmark = pytest.mark.pairwise

SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(1, 1, 17, 33, layers=2, bidirectional=True),
    Shape(9, 17, 13, 17),
    Shape(1, 5, 300, 100, layers=2, bidirectional=True),  # several parts of a panel are packed
    Shape(3, 3, 16, 64, bidirectional=True, lengths="edges"),
    Shape(6, 1, 40, 40, layers=3),
    Shape(5, 2, 100, 15, bidirectional=True, lengths="edges"),
]


def results(problem, few):
    """Everything that inference, training and backward return, with unpacked weights in up to ``few`` steps."""
    with tuned(max_unpacked_reads=few, max_unpacked_reads_training=few):
        op = RNNOp(problem.spec)
        y, states, _ = op.forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
        trained, final, reserve = op.forward(
            problem.x, problem.params, problem.states, lengths=problem.lengths, training=True
        )
        assert (reserve._residuals.weights.address == 0) == (few > 0)
        dx, dparams, dstates = op.backward(problem.dy, problem.dstates, reserve)
    return [y, *states, trained, *final, dx, dparams, *dstates]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_equal_those_of_packed_weights(mode, dtype, shape, target, poisoned):
    problem = make_problem(mode, shape, dtype)
    unpacked, packed = (results(problem, few) for few in (100, 0))
    for actual, expected in zip(unpacked, packed, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_rounded_weights(mode, shape, target, poisoned):
    problem = make_problem(mode, shape)
    problem = replace(problem, spec=replace(problem.spec, compute="bfloat16"))
    with tuned(wide_weight_bytes=0):
        unpacked, packed = (results(problem, few) for few in (100, 0))
    for actual, expected in zip(unpacked, packed, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_short_calls_pack_only_frozen_parameters():
    """Frozen parameters are packed because they are packed only once."""
    problem = make_problem("gru", Shape(1, 1, 5, 7))
    op = RNNOp(problem.spec)
    weight_cache = op.by_address().weight_cache
    op.forward(problem.x, problem.params)
    assert not weight_cache.num_packed
    params = frozen(problem.params)
    op.forward(problem.x, params)
    assert weight_cache.num_packed == 1


def test_reserve_keeps_its_weights():
    """Backward uses the parameters of the forward call, even if the caller has changed the array since."""
    problem = make_problem("lstm", Shape(2, 1, 5, 7))
    op, params = RNNOp(problem.spec), problem.params.copy()
    expected = op.backward(problem.dy, None, op.forward(problem.x, params, training=True)[2])
    reserve = op.forward(problem.x, params, training=True)[2]
    params[:] = np.nan
    dx, dparams, _ = op.backward(problem.dy, None, reserve)
    np.testing.assert_array_equal(dx, expected[0])
    np.testing.assert_array_equal(dparams, expected[1])
