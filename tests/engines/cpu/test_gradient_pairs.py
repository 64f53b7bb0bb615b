"""Weights' gradients of bfloat16 as dot products of pairs of rows: every row once, in the order of single rows."""

from dataclasses import replace

import numpy as np
import pytest

from fusedrnn import RNNOp, RNNSpec
from fusedrnn.engines.cpu.kernels.gemm import GEMM_TN, emit_gemm
from fusedrnn.jit.host import current_target
from fusedrnn.jit.target import is_x86
from fusedrnn.number_formats import round_to_bfloat16, to_bfloat16
from gemms import aligned, compiled

PAIRED = "avx512-bf16-emulated", "avx512-half-bf16-emulated"
SINGLE = "avx512-emulated", "avx512-half-emulated"
pytestmark = pytest.mark.skipif(not is_x86(), reason="only x86 has these targets")


def pairs(rows):
    """Rows (2·K, columns) of bfloat16 bits as pairs (K, columns, 2), the first in the high half."""
    return np.ascontiguousarray(rows.reshape(-1, 2, rows.shape[1])[:, ::-1].transpose(0, 2, 1))


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_gemm_tn(name, k, monkeypatch):
    """The bits of a chain of float32 multiply-adds over the rows, the first of a pair before the second."""
    monkeypatch.setenv("FUSEDRNN_TARGET", name)
    target = current_target()
    gemm = compiled("gemm_tn_pairs", target, lambda module: emit_gemm(module, target, "bfloat16", GEMM_TN))
    lanes, width = target.lanes("float32"), target.tile[1]
    rng = np.random.default_rng(k)
    a, b = (
        round_to_bfloat16(rng.standard_normal((2 * k, columns)).astype(np.float32))
        for columns in (lanes, width * lanes)
    )
    c = aligned(rng.standard_normal((lanes, width * lanes)).astype(np.float32))
    expected = c.copy()
    for left, right in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        expected = (expected + left[:, None] * right).astype(np.float32)
    packed_a, packed_b = (aligned(pairs(to_bfloat16(rows))) for rows in (a, b))
    output = c.ctypes.data, c.strides[0]
    gemm(lanes, width, packed_a.ctypes.data, packed_b.ctypes.data, k, *output, *output, packed_a.ctypes.data)
    np.testing.assert_array_equal(c, expected)


def gradients(spec, x, params, dy, lengths=None):
    op = RNNOp(spec)
    _, _, reserve = op.forward(x, params, lengths=lengths, training=True, seed=5)
    return op.backward(dy, None, reserve)


@pytest.mark.parametrize("lengths", [None, [4, 0, 3, 4, 1]], ids=["full", "lengths"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_row_counts_once(batch, lengths, monkeypatch):
    """Small integers, which bfloat16 holds exactly: the gradients are those of exact arithmetic."""
    monkeypatch.setenv("FUSEDRNN_TARGET", PAIRED[1])
    spec = RNNSpec("rnn_relu", 70, 37)
    rng = np.random.default_rng(batch)
    x, dy = (rng.integers(-2, 3, (4, batch, size)).astype(np.float32) for size in (spec.input_size, spec.hidden_size))
    lengths = None if lengths is None else np.array(lengths[:batch])
    params = np.zeros(spec.layout.size, np.float32)
    for kind, size in (("i2h_weight", spec.input_size), ("h2h_weight", spec.hidden_size)):
        weights = spec.layout.view(params, 0, 0, kind)
        weights[np.arange(spec.hidden_size), rng.permutation(size)[: spec.hidden_size]] = 1
    exact = gradients(spec, x, params, dy, lengths)
    rounded = gradients(replace(spec, compute="bfloat16"), x, params, dy, lengths)
    for array, expected in zip((*rounded[:2], *rounded[2]), (*exact[:2], *exact[2]), strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(("index", "options"), [(0, {}), (1, {"projection_size": 21})], ids=["lstm", "projection"])
def test_the_bits_of_single_rows(index, options, monkeypatch):
    """Those of the target without pairs, with dropout and an odd number of rows; empty sequences change none."""
    spec = RNNSpec("lstm", 19, 33, num_layers=2, dropout=0.3, compute="bfloat16", **options)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((6, 5, size)).astype(np.float32) for size in (spec.input_size, spec.output_size))
    params = rng.uniform(-0.2, 0.2, spec.layout.size).astype(np.float32)
    for lengths in (None, np.array([6, 5, 3, 2, 0])):
        results = []
        for target in (SINGLE[index], PAIRED[index]):
            monkeypatch.setenv("FUSEDRNN_TARGET", target)
            dx, dparams, _ = gradients(spec, x, params, dy, lengths)
            results.append((dx, dparams))
        for one, other in zip(*results, strict=True):
            np.testing.assert_array_equal(one, other)
    _, without_empty, _ = gradients(spec, x[:, :4], params, dy[:, :4], lengths[:4])
    np.testing.assert_array_equal(without_empty, dparams)
