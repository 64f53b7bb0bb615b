"""Rows rounded to bfloat16 or quantized to int8 by machine code: the bits that NumPy gives."""

import numpy as np
import pytest

from fusedrnn.engines.cpu.kernels.operand_rows import OWN_RANGE, emit_convert_row
from fusedrnn.number_formats import quantize_rows, to_bfloat16
from gemms import aligned, compiled, each_target, rows_of

SIZES = [1, 2, 3, 7, 8, 9, 16, 31, 64, 100]
POISON = 77
pytestmark = pytest.mark.pairwise


def rows(size):
    """Rows of ordinary numbers and of what is special."""
    rng = np.random.default_rng(size)
    ordinary = rng.standard_normal((4, size)) * np.float32([[1e-30], [1e-3], [1.0], [1e30]])
    special = rng.choice(np.float32([0.0, -0.0, 1e-40, -1e-44, 3e38, -3.4e38, 1.0, 0.5, 1.5, 127.0]), (6, size))
    return np.concatenate([ordinary, special, np.zeros((1, size))]).astype(np.float32)


def not_finite(size):
    """Rows with one NaN or infinity."""
    result = np.ones((3, size), np.float32)
    result[[0, 1, 2], [0, size // 2, size - 1]] = np.nan, np.inf, -np.inf
    return result


@pytest.mark.parametrize("size", SIZES)
@each_target("bfloat16")
def test_round_row(compute, target, size):
    lanes = target.lanes("float32")
    run = compiled("round_row", target, lambda module: emit_convert_row(module, target, compute))
    every = np.concatenate([rows(size), not_finite(size)])
    every = np.concatenate([every, np.random.default_rng(0).integers(0, 2**32, (9, size), np.uint32).view(np.float32)])
    for row in every:
        whole = np.zeros(-(-size // lanes) * lanes, np.float32)
        whole[:size] = row
        expected = rows_of(to_bfloat16(whole), compute, target)
        into = aligned(np.full_like(expected, POISON))
        run(row.ctypes.data, into.ctypes.data, size, 0)
        np.testing.assert_array_equal(into.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("largest", [None, 0.0, 1e-40, 0.7, 100.0])
@each_target("int8")
def test_quantize_row(compute, target, size, largest):
    """Rows with a range of their own, and with a given one, beyond which they saturate."""
    operand_range = np.float32([OWN_RANGE if largest is None else largest])
    lanes = target.lanes("float32")
    run = compiled("quantize_row", target, lambda module: emit_convert_row(module, target, compute))
    for row in [*rows(size), *not_finite(size)]:
        whole = np.zeros(-(-size // lanes) * lanes, np.float32)
        whole[:size] = row
        integers, scale = quantize_rows(whole, largest)
        expected = rows_of(integers, compute, target).view(np.uint8)
        buffer = aligned(np.full(64 + len(expected), POISON, np.uint8))
        run(row.ctypes.data, buffer.ctypes.data + 64, size, operand_range.ctypes.data)
        np.testing.assert_array_equal(buffer[60:64].view(np.float32)[0], scale)
        np.testing.assert_array_equal(buffer[:60], POISON)
        if np.isfinite(scale):
            np.testing.assert_array_equal(buffer[64:], expected)
