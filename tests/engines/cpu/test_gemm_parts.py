"""Panels cut in K: the bits of whole panels, for any number of parts."""

import itertools

import numpy as np
import pytest

from fusedrnn.number_formats import from_bfloat16, to_bfloat16
from gemms import aligned, compiled, each_target, emit_packed_gemm, padded, panels_of, rows_of

PART_BYTES = 4096
pytestmark = pytest.mark.pairwise


def operands(compute, target, num_rows, k):
    """A, a panel of B and C_in, and the product in float64."""
    dtype, width = "float64" if compute == "float64" else "float32", target.tile[1]
    lanes, rng = target.lanes(dtype), np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((num_rows, k), (width * lanes, k)))
    c_in = aligned(rng.standard_normal((num_rows, width, lanes)).astype(dtype))
    if compute != "bfloat16":
        panel = aligned(b.reshape(width, lanes, k).transpose(2, 0, 1))
        return aligned(a), panel, c_in, a.astype(float) @ b.T.astype(float)
    a_bits, b_bits = to_bfloat16(a), to_bfloat16(b)
    panel = panels_of(b_bits.reshape(1, width, lanes, k), compute, target)[0]
    product = from_bfloat16(a_bits).astype(float) @ from_bfloat16(b_bits).T.astype(float)
    return aligned(rows_of(padded(a_bits, 2, 1), compute, target)), aligned(panel), c_in, product


@each_target("float32", "float64", "bfloat16")
@pytest.mark.parametrize("k", [1, 15, 17, 31, 32, 33, 130, 1001])
def test_bits(compute, target, k):
    target = target.for_compute(compute)
    num_rows = 3 * target.tile[0] + 1
    a, panel, c_in, product = operands(compute, target, num_rows, k)
    table = np.array([a.ctypes.data + row * a.strides[0] for row in range(num_rows)], np.int64)
    results = []
    for part_bytes in (PART_BYTES, 1 << 30):
        name = f"parts_{compute}_{part_bytes}"
        gemm = compiled(
            name, target, lambda module, size=part_bytes: emit_packed_gemm(module, target, compute, part_bytes=size)
        )
        for in_place, rows in itertools.product((False, True), (num_rows, 1)):
            c = aligned(c_in)
            start = c if in_place else c_in
            output = start.ctypes.data, c.strides[0], c.ctypes.data, c.strides[0]
            gemm(rows, target.tile[1], table.ctypes.data, panel.ctypes.data, len(panel), *output, panel.ctypes.data)
            results.append(c)
    for parts, whole in zip(results[:4], results[4:], strict=True):
        np.testing.assert_array_equal(parts, whole)
    expected = c_in.reshape(num_rows, -1) + product
    np.testing.assert_allclose(results[2].reshape(num_rows, -1), expected, rtol=1e-3, atol=1e-3)
