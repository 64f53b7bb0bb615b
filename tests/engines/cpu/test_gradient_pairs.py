"""Gradients of weights in bfloat16, by vectors of pairs of rows and by tiles: every row once, in order."""

from dataclasses import replace

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec
from fusedrnn.engines.cpu.kernels.gemm import GEMM_TN, emit_gemm
from fusedrnn.engines.cpu.kernels.tile_gemm import emit_tile_gemm_tn
from fusedrnn.engines.cpu.plan.plans import make_plan
from fusedrnn.engines.cpu.tuning import tuned
from fusedrnn.jit.host import current_target
from fusedrnn.jit.target import is_x86
from fusedrnn.number_formats import round_to_bfloat16, to_bfloat16
from gemms import aligned, compiled

PAIRED = "avx512-bf16-emulated", "avx512-half-bf16-emulated"
SINGLE = "avx512-emulated", "avx512-half-emulated"
TILED = "avx512-amx-emulated"
pytestmark = [
    pytest.mark.usefixtures("use_all_threads"),
    pytest.mark.skipif(not is_x86(), reason="only x86 has these targets"),
]


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


@pytest.mark.parametrize("num_rows", [1, 7, 16])
@pytest.mark.parametrize("num_vectors", [1, 2, 3, 4])
def test_gemm_tn_of_tiles(num_rows, num_vectors, monkeypatch):
    """Each K-block of 32 rows is summed from zero, the first and the second rows of its pairs apart; rows are exact."""
    monkeypatch.setenv("FUSEDRNN_TARGET", TILED)
    target = current_target()
    gemm = compiled("gemm_tn_tiles", target, lambda module: emit_tile_gemm_tn(module, target, "bfloat16"))
    blocks, lanes, width = 3, target.lanes("float32"), target.tile[1]
    rng = np.random.default_rng(num_rows)
    a, b = (
        round_to_bfloat16(rng.standard_normal((32 * blocks, columns)).astype(np.float32))
        for columns in (lanes, width * lanes)
    )
    c = aligned(rng.standard_normal((lanes, width * lanes)).astype(np.float32))
    expected, columns = c.copy(), num_vectors * lanes
    for block in range(0, 32 * blocks, 32):
        halves = []
        for half in (1, 0):
            total = np.zeros((num_rows, columns), np.float32)
            for row in range(block + half, block + 32, 2):
                product = a[row, :num_rows, None].astype(np.float64) * b[row, :columns]
                total = (total + product).astype(np.float32)
            halves.append(total)
        expected[:num_rows, :columns] += halves[0] + halves[1]
    tiles = pairs(to_bfloat16(a)).reshape(blocks, 16, lanes, 2).transpose(0, 2, 1, 3)
    packed_a, packed_b = aligned(tiles), aligned(pairs(to_bfloat16(b)))
    output = c.ctypes.data, c.strides[0]
    gemm(num_rows, num_vectors, packed_a.ctypes.data, packed_b.ctypes.data, 16 * blocks, *output, *output, 0)
    np.testing.assert_array_equal(c, expected)


def gradients(spec, x, params, dy, lengths=None):
    op = RNNOp(spec)
    _, _, reserve = op.forward(x, params, lengths=lengths, training=True, seed=5)
    return op.backward(dy, None, reserve)


@pytest.mark.parametrize("lengths", [None, [4, 0, 3, 4, 1]], ids=["full", "lengths"])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("target", [PAIRED[1], TILED])
def test_every_row_counts_once(target, batch, lengths, monkeypatch):
    """Small integers, which bfloat16 holds exactly: the gradients are those of exact arithmetic."""
    monkeypatch.setenv("FUSEDRNN_TARGET", target)
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


@pytest.mark.parametrize("spec", [
    RNNSpec("lstm", 19, 33, num_layers=2, bidirectional=True, dropout=0.3, compute="bfloat16"),
    RNNSpec("gru", 70, 32, num_layers=2, compute="bfloat16"),
    RNNSpec("lstm", 19, 48, projection_size=21, compute="bfloat16"),
], ids=["both ways", "pipelined", "projection"])  # fmt: skip
@pytest.mark.parametrize("lengths", [None, [9, 9, 7, 7, 4, 3, 1]], ids=["full", "lengths"])
def test_bits_of_tiles_do_not_depend_on_blocks(spec, lengths, monkeypatch):
    """Rows after a block's last whole K-block are multiplied with the next block; empty sequences change nothing."""
    monkeypatch.setenv("FUSEDRNN_TARGET", TILED)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((9, 11, size)).astype(np.float32) for size in (spec.input_size, spec.output_size))
    params = rng.uniform(-0.2, 0.2, spec.layout.size).astype(np.float32)
    lengths = [9] * 7 if lengths is None else lengths

    def run(batch):
        more = np.array([*lengths, *[0] * (batch - 7)])
        return gradients(spec, x[:, :batch], params, dy[:, :batch], more)[1]

    expected, plans = run(7), set()
    for rows, block, at_once in ((1, 1, 1), (1, 20, 40), (3, 40, 1), (9, 1000, 33)):
        chunks = {"min_chunk_rows": rows, "max_chunk_rows": rows, "min_dx_chunk_rows": rows}
        with tuned(**chunks, l2_bytes=1 << 14, block_rows=block, gemm_rows=at_once):
            plan = make_plan(spec, current_target(), 9, 7, 2, "backward")
            plans.add((plan.share.block, plan.workspace.fields["inner"]))
            for threads, batch in ((1, 7), (2, 11), (3, 8)):
                with fusedrnn.thread_limits(threads):
                    np.testing.assert_array_equal(run(batch), expected)
    assert len(plans) > 2
