"""Rows rounded to bfloat16 or quantized to int8 by machine code: the bits that NumPy gives."""

import numpy as np
import pytest

from fusedrnn.engines.cpu.kernels.operand_rows import OWN_RANGE, emit_convert_row
from fusedrnn.number_formats import quantize_rows, round_to_bfloat16
from gemms import aligned, compiled

SIZES = [1, 2, 3, 7, 8, 9, 16, 31, 64, 100]
POISON = 77


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
def test_round_row(target, size):
    lanes = target.lanes("float32")
    run = compiled("round_row", target, lambda module: emit_convert_row(module, target, "bfloat16"))
    into = aligned(np.empty(-(-size // lanes) * lanes, np.float32))
    every = np.concatenate([rows(size), not_finite(size)])
    every = np.concatenate([every, np.random.default_rng(0).integers(0, 2**32, (9, size), np.uint32).view(np.float32)])
    for row in every:
        into[:] = POISON
        run(row.ctypes.data, into.ctypes.data, size, 0)
        np.testing.assert_array_equal(into[:size].view(np.uint32), round_to_bfloat16(row).view(np.uint32))
        np.testing.assert_array_equal(into[size:], 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("largest", [None, 0.0, 1e-40, 0.7, 100.0])
def test_quantize_row(target, size, largest):
    """Rows with a range of their own, and with a given one, beyond which they saturate."""
    operand_range = np.float32([OWN_RANGE if largest is None else largest])
    lanes = target.lanes("float32")
    run = compiled("quantize_row", target, lambda module: emit_convert_row(module, target, "int8"))
    buffer = aligned(np.empty(32 + -(-size // lanes) * lanes, np.int16))
    for row in [*rows(size), *not_finite(size)]:
        buffer[:] = POISON
        run(row.ctypes.data, buffer.ctypes.data + 64, size, operand_range.ctypes.data)
        integers, scale = quantize_rows(row, largest)
        np.testing.assert_array_equal(buffer[30:32].view(np.float32)[0], scale)
        np.testing.assert_array_equal(buffer[:30], POISON)
        if np.isfinite(scale):
            np.testing.assert_array_equal(buffer[32 : 32 + size], integers)
            np.testing.assert_array_equal(buffer[32 + size :], 0)
