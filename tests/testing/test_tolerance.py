"""Tolerances: rounding stays within them, a missing product does not."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from fusedrnn.bench import contenders
from fusedrnn.bench.data import workload
from fusedrnn.engines.reference import forward as reference
from fusedrnn.spec import MODES
from fusedrnn.testing import tolerance as tolerances
from fusedrnn.testing.cases import CASES, Case
from fusedrnn.testing.tolerance import (
    difference,
    gradient_tolerance,
    kink_tolerance,
    longest_sum,
    norm_difference,
    tolerance,
)

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")


def test_tolerance_grows_with_the_sum_and_the_type():
    assert tolerance("float32", 1600)[0] > tolerance("float32", 100)[0] > tolerance("float64", 1600)[0]
    assert tolerance("float32", 100, scale=50.0)[1] == pytest.approx(50 * tolerance("float32", 100)[1])
    assert tolerance("float32", 100, scale=0.1) == tolerance("float32", 100)
    assert tolerance("float32", 1602)[1] < 1e-4


def test_the_longest_sum_is_over_layers():
    assert longest_sum(CASES["ds2"].spec("lstm")) == 1602
    assert longest_sum(CASES["ds2-5bi"].spec("lstm")) == 2402


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("H", [1, 17, 100])
def test_rounding_is_within_tolerance_and_a_missing_product_is_not(mode, H):
    work = workload(Case("t", 63, 3, 129, H, 2, True), mode, "float32")
    exact = work.exact()
    expected, _ = reference.forward(exact.spec, exact.x, exact.params)
    rtol, atol = tolerance("float32", longest_sum(work.spec))
    assert difference(reference.forward(work.spec, work.x, work.params)[0], expected, rtol, atol) is None
    lossy = work.params.copy()
    work.spec.layout.view(lossy, 0, 0, "i2h_weight")[:, 5] = 0
    assert difference(reference.forward(work.spec, work.x, lossy)[0], expected, rtol, atol)


def test_a_difference_is_located():
    expected = np.zeros((2, 3))
    actual = expected.copy()
    actual[1, 2] = 1.0
    assert difference(actual, expected, 0.1, 0.1) == "[1, 2] is 1 instead of 0"
    actual[0, 1] = np.nan
    assert difference(actual, expected, 0.1, 0.1) == "[0, 1] is nan instead of 0"
    assert difference(expected, expected, 0.1, 0.1) is None
    assert difference(expected[:1], expected, 0.1, 0.1) == "shape (1, 3) instead of (2, 3)"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_differences_are_detected_in_every_block(place):
    size = 2 * tolerances._BLOCK + 5
    index = (0, tolerances._BLOCK, size - 1)[place]
    expected = np.ones((1, size))
    actual = expected.astype(np.float32)
    assert difference(actual, expected, 0.0, 0.1) is None
    for value in (1.2, np.nan, np.inf):
        actual[0, index] = value
        assert (difference(actual, expected, 0.0, 0.1) or "").startswith(f"[0, {index}] is ")
    assert difference(np.empty((0, 3)), np.empty((0, 3)), 0.0, 0.0) is None


@needs_torch
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("H", [1, 17, 100])
def test_gradients_in_single_precision_stay_within_tolerance(mode, H):
    work = workload(Case("t", 63, 3, 129, H, 2, True), mode, "float32")
    expected = contenders.train_torch_nn(work.exact())(work.exact().batch(63))()
    actual = contenders.train_torch_nn(work)(work.batch(63))()
    for name in expected:
        if name.startswith("d"):
            tight = gradient_tolerance("float32", work.spec, 63, 3, float(np.abs(expected[name]).max()))
            assert difference(actual[name], expected[name], *tight) is None


def test_the_gradient_tolerance_is_relative_to_the_gradients():
    spec = CASES["ds2"].spec("lstm")
    rtol, atol = gradient_tolerance("float32", spec, 300, 20, 1e-3)
    assert atol == pytest.approx(1e-3 * rtol) and rtol == tolerance("float32", 1602 + 3200 + 6000)[0] < 1.1e-4
    assert difference(np.zeros(3), np.zeros(3), rtol, 0.0) is None
    assert difference(np.array([0.0, 1e-30]), np.zeros(2), rtol, 0.0) == "[1] is 1e-30 instead of 0"


def test_kink_tolerance_allows_a_few_different_slopes():
    spec = CASES["ds2"].spec("rnn_relu")
    limit = kink_tolerance("float32", spec)
    expected = np.random.default_rng(1).standard_normal((300, 20 * 800))
    actual = expected.copy()
    actual.flat[::1_000_000] = 0  # four of them
    assert limit < 0.005 and norm_difference(actual, expected, limit) is None
    actual[7] = 0
    assert "differs by a norm of" in (norm_difference(actual, expected, limit) or "")
    actual[7] = np.nan
    assert "differs by a norm of nan" in (norm_difference(actual, expected, limit) or "")
    assert "shape (2, 3)" in (norm_difference(np.zeros((2, 3)), np.zeros(2), limit) or "")
    assert norm_difference(np.zeros(2), np.zeros(2), limit) is None
