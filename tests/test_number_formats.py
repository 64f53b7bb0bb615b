"""Rounding to bfloat16 and quantizing to int8, against definitions of their own."""

import numpy as np
import pytest

from fusedrnn.number_formats import (
    INT8_MAX,
    dequantize_rows,
    from_bfloat16,
    quantize_rows,
    round_to_bfloat16,
    to_bfloat16,
)


def test_every_bfloat16_is_kept():
    """All 65,536 bit patterns survive, but that a signalling NaN becomes quiet."""
    bits = np.arange(2**16, dtype=np.uint16)
    values = from_bfloat16(bits)
    again = to_bfloat16(values)
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(again[~is_nan], bits[~is_nan])
    np.testing.assert_array_equal(again[is_nan], bits[is_nan] | 0x40)


def test_rounds_to_the_nearest_even():
    """Between two neighbours the nearer one is taken; of two equally near ones the even one; beyond all, infinity."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    below = from_bfloat16((values.view(np.uint32) >> 16).astype(np.uint16)).astype(np.float64)
    step = from_bfloat16(((values.view(np.uint32) >> 16) + 1).astype(np.uint16)).astype(np.float64)
    finite = np.isfinite(step)
    exact = values.astype(np.float64)
    expected = np.where(np.abs(exact - below) < np.abs(step - exact), below, step)
    checked = finite & (np.abs(exact - below) != np.abs(step - exact))
    np.testing.assert_array_equal(round_to_bfloat16(values)[checked], expected[checked].astype(np.float32))
    one = np.float32(1.0)
    ties = np.array([one + 2.0**-8, one + 3 * 2.0**-8, -(one + 2.0**-8)], np.float32)
    np.testing.assert_array_equal(round_to_bfloat16(ties), np.float32([1.0, 1.0 + 2.0**-6, -1.0]))
    assert round_to_bfloat16(np.float32([3.4e38]))[0] == np.inf


def test_error_of_bfloat16():
    """The relative error is at most 2**-8 for normal numbers: a bfloat16 has eight significant bits."""
    values = np.random.default_rng(1).standard_normal(10000).astype(np.float32)
    error = np.abs(round_to_bfloat16(values).astype(np.float64) - values) / np.abs(values)
    assert 2.0**-9 < error.max() <= 2.0**-8


@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 4, 33)])
def test_quantized_rows_use_the_whole_range(shape):
    """The largest magnitude becomes ±127, and no element is further than half a step from its value."""
    array = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    integers, scales = quantize_rows(array)
    assert integers.dtype == np.int8 and scales.dtype == np.float32
    assert scales.shape == shape[:-1]
    assert (np.abs(integers).max(axis=-1) == INT8_MAX).all()
    error = np.abs(dequantize_rows(integers, scales) - array)
    assert (error <= 0.5001 * scales[..., None]).all()


def test_rows_without_range():
    """Zeros and denormals become zeros; rows with NaN or infinities are NaN; huge rows are quantized."""
    rows = np.float32([[0, 0], [1e-44, -1e-44], [np.nan, 1], [np.inf, 1], [3e38, -1.5e38], [-0.0, 2]])
    integers, scales = quantize_rows(rows)
    np.testing.assert_array_equal(integers[:4], 0)
    np.testing.assert_array_equal(scales[:4], np.float32([0, 0, np.nan, np.nan]))
    np.testing.assert_array_equal(integers[4:], [[127, -64], [0, 127]])
    assert np.isfinite(scales[4:]).all()


def test_ties_go_to_even():
    """A value half-way between two integers becomes the even one."""
    integers, _ = quantize_rows(np.float32([[127, 0.5, 1.5, -0.5, -2.5]]))
    np.testing.assert_array_equal(integers, [[127, 0, 2, 0, -2]])
