"""The tolerance of a format: results in the format pass with room, and results that are wrong do not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fusedrnn.bench.data import parameters
from fusedrnn.engines.reference import backward, forward
from fusedrnn.engines.reference.rounding import row_rounding
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.format_tolerance import format_gradient_tolerance, format_tolerance, pre_activation_error
from fusedrnn.testing.tolerance import difference, norm_difference

MODES = "lstm", "gru", "rnn_relu", "rnn_tanh"
T, N = 12, 5


def network(mode, compute, layers=2):
    """A spec that rounds, one that does not, and their data."""
    spec = RNNSpec(mode, 40, 64, layers, bidirectional=True, compute=compute)
    rng = np.random.default_rng(7)
    x = rng.uniform(-1, 1, (T, N, 40)).astype(np.float32)
    return spec, replace(spec, compute=None), x, parameters(spec)


@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
@pytest.mark.parametrize("mode", MODES)
def test_rounded_operands_stay_within_half_of_the_bound(mode, compute):
    spec, exact, x, params = network(mode, compute)
    y = forward.forward(spec, x, params)[0]
    expected = forward.forward(exact, x.astype(np.float64), params.astype(np.float64))[0]
    norm, atol = format_tolerance(pre_activation_error(spec, params), float(np.abs(expected).max()))
    assert difference(y, expected, 0.0, atol / 2) is None
    assert norm_difference(y, expected, norm / 2) is None
    assert norm_difference(y, expected, norm / 40) is not None


@pytest.mark.parametrize("mode", MODES)
def test_gradients_stay_within_half_of_the_bound(mode):
    spec, exact, x, params = network(mode, "bfloat16")
    rng = np.random.default_rng(8)
    dy = rng.standard_normal((T, N, spec.output_size)).astype(np.float32)
    dstates = [np.zeros(shape, np.float32) for shape in spec.state_shape(N)]

    def gradients(network, dtype):
        tape = forward.train(network, x.astype(dtype), params.astype(dtype))[2]
        dx, dparams, _ = backward.backward(network, tape, dy.astype(dtype), [d.astype(dtype) for d in dstates])
        return dx, dparams

    limit = format_gradient_tolerance(spec, pre_activation_error(spec, params))
    for gradient, expected in zip(gradients(spec, np.float32), gradients(exact, np.float64), strict=True):
        assert norm_difference(gradient, expected, limit / 2) is None
        assert norm_difference(gradient, expected, limit / 200) is not None


@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
@pytest.mark.parametrize("mode", MODES)
def test_two_gates_exchanged_are_found(mode, compute):
    """As in a wrong order of gates; in a vanilla RNN, two blocks of units."""
    spec, exact, x, params = network(mode, compute, layers=1)
    wrong = params.copy()
    rows = spec.layout.view(wrong, 0, 0, "i2h_weight")
    half = 64 if spec.num_gates > 1 else 32
    rows[: 2 * half] = np.concatenate((rows[half : 2 * half], rows[:half]))
    expected = forward.forward(exact, x, params)[0]
    norm, _ = format_tolerance(pre_activation_error(spec, params), 1.0)
    assert norm_difference(forward.forward(exact, x, wrong)[0], expected, 2 * norm) is not None


def test_the_error_of_a_pre_activation():
    """That of rounding, measured: random errors of both operands add up in squares."""
    for compute in ("bfloat16", "int8"):
        spec, _, _, params = network("rnn_tanh", compute)
        weight = np.concatenate([spec.layout.view(params, 0, 0, kind) for kind in ("i2h_weight", "h2h_weight")], axis=1)
        data = np.random.default_rng(9).uniform(-1, 1, (200, weight.shape[1])).astype(np.float32)
        rounded = row_rounding(compute)
        errors = rounded(data).astype(np.float64) @ rounded(weight).T - data.astype(np.float64) @ weight.T
        typical = math.sqrt(float(np.mean(errors**2)))
        assert typical < pre_activation_error(spec, params) < 4 * typical
    assert pre_activation_error(replace(spec, compute=None), params) == 0.0
