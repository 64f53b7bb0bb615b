"""The GEMM in bfloat16 and int8, and on int8 weights: products of rounded operands, in a fixed order."""

import itertools

import numpy as np
import pytest

from fusedrnn.number_formats import quantize_rows, round_to_bfloat16, to_bfloat16
from gemms import aligned, before_poison, compiled, each_target, emit_packed_gemm, padded, panels_of, rows_of

UNTOUCHED = 99.0
KS = [1, 2, 3, 8, 33, 64, 70]
TILE_ROWS = 37  # three tiles, of which the last two overlap
TILE_K = 32


def addresses(array):
    return np.array([array.ctypes.data + row * array.strides[0] for row in range(len(array))], np.int64)


def gemm_for(compute, target):
    """The target for a format, its GEMM, and the rows, the vectors of a panel and the lanes to test it with."""
    target = target.for_compute(compute)
    gemm = compiled(f"gemm_{compute}", target, lambda module: emit_packed_gemm(module, target, compute))
    num_rows = TILE_ROWS if target.has_tiles else 2 * target.tile[0] + 1
    return target, gemm, num_rows, target.tile[1], target.lanes("float32")


def fused_or_rounded(total, product, target):
    """The float32 sum of a total and a product that is exact in float64: rounded once where the target has an FMA."""
    return (total + product).astype(np.float32) if target.fma else total + product.astype(np.float32)


def chain_of_elements(total, a, b, target):
    """The total plus the products of each k, one after the other."""
    for step in range(len(b)):
        total = fused_or_rounded(total, a[:, step, None].astype(np.float64) * b[step], target)
    return total


def chain_of_tiles(total, a, b, target):
    """The total plus the products of 32 k at a time: those of even k, one after the other, plus those of odd k."""
    for first in range(0, len(b), TILE_K):
        low, high = (slice(begin, first + TILE_K, 2) for begin in (first, first + 1))
        zeros = np.zeros_like(total)
        halves = [chain_of_elements(zeros, a[:, half], b[half], target) for half in (low, high)]
        total = total + (halves[0] + halves[1])
    return total


def parts(gemm, rows, panel, c_in, expected, scales=None):
    """The results of a GEMM for some rows and any adjacent vectors of a panel, each with what it should be."""
    num_rows, width, _ = c_in.shape
    for count, (first, last) in itertools.product((1, num_rows), itertools.combinations(range(width + 1), 2)):
        c, whole = aligned(np.full_like(c_in, UNTOUCHED)), np.full_like(c_in, UNTOUCHED)
        output = []
        for array in (c_in, c):
            output += array.ctypes.data + first * array.strides[1], array.strides[0]
        b = panel.ctypes.data + first * panel.strides[1], len(panel)
        of_scales = () if scales is None else (scales.ctypes.data + first * scales.strides[0],)
        gemm(count, last - first, addresses(rows).ctypes.data, *b, *output, panel.ctypes.data, *of_scales)
        whole[:count, first:last] = expected.reshape(c_in.shape)[:count, first:last]
        yield c, whole


@pytest.mark.parametrize("k", KS)
@each_target("bfloat16")
def test_bfloat16(compute, target, k):
    """The bits of chains of float32 multiply-adds on rounded operands, for any rows and vectors of a panel."""
    target, gemm, num_rows, width, lanes = gemm_for(compute, target)
    rng = np.random.default_rng(0)
    a = round_to_bfloat16(rng.standard_normal((num_rows, k)).astype(np.float32))
    b = round_to_bfloat16(rng.standard_normal((k, width * lanes)).astype(np.float32))
    c_in = aligned(rng.standard_normal((num_rows, width, lanes)).astype(np.float32))
    rows = before_poison(rows_of(padded(to_bfloat16(a), 2, 1), compute, target), 1)
    panel = before_poison(panels_of(to_bfloat16(b.T).reshape(1, width, lanes, k), compute, target)[0], 0)
    chain = chain_of_tiles if target.has_tiles else chain_of_elements
    expected = chain(c_in.reshape(num_rows, -1), a, b, target)
    for part, result in parts(gemm, rows, panel, c_in, expected):
        np.testing.assert_array_equal(part, result)


@pytest.mark.parametrize("k", KS)
@each_target("int8")
def test_int8(compute, target, k):
    """Sums are exact integers; one multiply-add scales them and adds the initial accumulator."""
    target, gemm, num_rows, width, lanes = gemm_for(compute, target)
    rng = np.random.default_rng(0)
    a, a_scales = quantize_rows(rng.standard_normal((num_rows, k)).astype(np.float32))
    b, b_scales = quantize_rows(rng.standard_normal((width * lanes, k)).astype(np.float32))
    a[0], b[:3] = 127, -127  # the largest sums
    c_in = aligned(rng.standard_normal((num_rows, width, lanes)).astype(np.float32))
    elements = rows_of(padded(a, 4, 1), compute, target).view(np.uint8)
    rows = before_poison(np.zeros((num_rows, 64 + elements.shape[1]), np.uint8), 1)
    rows[:, 60:64], rows[:, 64:] = a_scales[:, None].view(np.uint8), elements
    panel = before_poison(panels_of(b.reshape(1, width, lanes, k), compute, target)[0], 0)
    scales = aligned(b_scales.reshape(width, lanes))
    sums = a.astype(np.int64) @ b.astype(np.int64).T
    factors = a_scales[:, None] * b_scales
    expected = (sums * factors.astype(np.float64) + c_in.reshape(num_rows, -1)).astype(np.float32)
    for part, result in parts(gemm, rows[:, 64:], panel, c_in, expected, scales):
        if target.fma:
            np.testing.assert_array_equal(part, result)
        else:
            np.testing.assert_allclose(part, result, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", KS)
@each_target("int8_weights")
def test_int8_weights(compute, target, k):
    """The bits of a chain of float32 multiply-adds on integers; one more scales it and adds the initial accumulator."""
    target, gemm, num_rows, width, lanes = gemm_for(compute, target)
    rng = np.random.default_rng(0)
    a = aligned(rng.standard_normal((num_rows, k)).astype(np.float32))
    b, b_scales = quantize_rows(rng.standard_normal((width * lanes, k)).astype(np.float32))
    c_in = aligned(rng.standard_normal((num_rows, width, lanes)).astype(np.float32))
    panel = aligned(panels_of(b.reshape(1, width, lanes, k), compute, target)[0])
    scales = aligned(b_scales.reshape(width, lanes))
    expected = chain_of_elements(np.zeros((num_rows, width * lanes), np.float32), a, b.T, target)
    expected = fused_or_rounded(c_in.reshape(num_rows, -1), expected * b_scales.astype(np.float64), target)
    for part, result in parts(gemm, a, panel, c_in, expected, scales):
        np.testing.assert_array_equal(part, result)


@pytest.mark.parametrize("k", [1, 33, 64])
@each_target("bfloat16", "int8", "int8_weights")
def test_one_row_multiplies_several_panels(compute, target, k):
    """The bits of one panel after the other."""
    target, gemm, _, width, lanes = gemm_for(compute, target)
    rng, count = np.random.default_rng(0), target.one_row_panels
    row = rng.integers(-127, 128, (1, k)).astype(np.int8)
    columns = rng.integers(-127, 128, (count, width, lanes, k)).astype(np.int8)
    c_in = aligned(rng.standard_normal((count * width, lanes)).astype(np.float32))
    scales = aligned(rng.uniform(0.5, 1, (count * width, lanes)).astype(np.float32))
    if compute == "bfloat16":
        elements = rows_of(padded(to_bfloat16(row.astype(np.float32)), 2, 1), compute, target)
        panels = panels_of(to_bfloat16(columns.astype(np.float32)), compute, target)
    else:
        elements = row.astype(np.float32) if compute == "int8_weights" else rows_of(padded(row, 4, 1), compute, target)
        panels = panels_of(columns, compute, target)
    a = np.zeros((1, 64 + elements.nbytes), np.uint8)
    a[:, 60:64], a[:, 64:] = np.float32([[0.7]]).view(np.uint8), np.ascontiguousarray(elements).view(np.uint8)
    panels = aligned(panels)

    def multiply(num_panels, first):
        begin, c = first * width, aligned(np.full_like(c_in, UNTOUCHED))
        output = [value for array in (c_in, c) for value in (array[begin:].ctypes.data, array.nbytes)]
        of_scales = () if compute == "bfloat16" else (scales[begin:].ctypes.data,)
        b = panels[first].ctypes.data, panels.shape[1]
        gemm(1, num_panels * width, addresses(a[:, 64:]).ctypes.data, *b, *output, b[0], *of_scales)
        return c[begin : begin + num_panels * width]

    expected = np.concatenate([multiply(1, first) for first in range(count)])
    np.testing.assert_array_equal(multiply(count, 0), expected)
