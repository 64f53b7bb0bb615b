"""The reference on every variant of the cells, against torch's own functions step by step, in float64."""

import numpy as np
import pytest

from oracles import absences, reference_results
from problems import Shape, assert_close, assert_gradients_close, problem_of
from variants import VARIANTS, variant_results, variant_results_by_absence, variant_spec

SHAPES = [
    Shape(5, 3, 4, 6),
    Shape(6, 4, 3, 5, layers=3, bidirectional=True, lengths="edges"),
    Shape(4, 2, 5, 4, layers=2, states=False),
]


@pytest.mark.one_value("shape")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_reference_against_torch(name, shape):
    spec = variant_spec(name, shape.I, shape.H, shape.layers, shape.bidirectional, "float64")
    problem = problem_of(spec, shape)
    for absent, expected in variant_results_by_absence(problem, absences(spec)).items():
        actual = reference_results(problem, absent=absent)
        assert_close(actual.forward, expected.forward, "float64", spec)
        assert_gradients_close(actual.gradients, expected.gradients, "float64", spec, shape.T, shape.N)


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_relu"])
@pytest.mark.parametrize("lengths", ["full", "edges"])
def test_reverse_against_torch(mode, lengths):
    shape = Shape(6, 4, 3, 5, layers=2, lengths=lengths)
    name = {"lstm": "projection", "gru": "reset-before", "rnn_relu": "leaky-relu"}[mode]
    spec = variant_spec(name, shape.I, shape.H, shape.layers, dtype="float64", reverse=True)
    problem = problem_of(spec, shape)
    expected, actual = variant_results(problem), reference_results(problem)
    assert_close(actual.forward, expected.forward, "float64", spec)
    assert_gradients_close(actual.gradients, expected.gradients, "float64", spec, shape.T, shape.N)


def test_clipping_replaces_nan_only_if_asked():
    shape = Shape(3, 2, 3, 4)
    for nan in (False, True):
        spec = variant_spec("state-clip-nan" if nan else "state-clip", shape.I, shape.H, dtype="float64")
        problem = problem_of(spec, shape)
        problem.states[1][0, 0, 1] = np.nan
        results = reference_results(problem)
        y, c_n = results.y, results.states[1]
        assert np.isnan(c_n[0, 0, 1]) != nan
        assert not np.isnan(y[:, 1]).any()
        if nan:
            assert not np.isnan(y).any()
