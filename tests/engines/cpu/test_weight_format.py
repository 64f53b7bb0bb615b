"""Weights in int8 or as float32 integers, by the number of rows that use them: the same bits, packed once each."""

from math import inf

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec
from fusedrnn.engines.cpu import tuning
from fusedrnn.engines.cpu.plan.weight_format import ANY_ROWS, max_narrow_rows
from fusedrnn.engines.cpu.tuning import tuned
from fusedrnn.engines.cpu.weights.cache import WeightCache
from fusedrnn.frozen_array import frozen
from fusedrnn.jit.host import target_for

SPEC = RNNSpec("lstm", 19, 35, num_layers=2, compute="int8_weights")
PACKINGS = {"narrow": ((inf, ANY_ROWS),), "wide": ((inf, 0),), "by rows": ((inf, 2),)}
MIB = 1 << 20

needs_fma = pytest.mark.skipif(not target_for(35, "float32").fma, reason="weights are never narrow without FMA")


@pytest.fixture
def packed_sizes(monkeypatch):
    """The bytes of packed weights, each time that some are packed."""
    sizes, plain = [], WeightCache._run

    def running(cache, tasks, *rest):
        sizes.append(cache.layout.backward_offset)
        return plain(cache, tasks, *rest)

    monkeypatch.setattr(WeightCache, "_run", running)
    return sizes


def op_with(rows, spec=SPEC):
    """An op whose weights are narrow for so many rows, whatever their size."""
    with tuned(wide_weight_bytes=0, narrow_int8_rows=rows):
        return RNNOp(spec)


def arguments(batch, spec=SPEC):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((7, 8, spec.input_size)).astype(np.float32)[:, :batch].copy()
    return x, rng.uniform(-0.3, 0.3, spec.layout.size).astype(np.float32)


@pytest.mark.parametrize("mode", ["lstm", "gru"])
@pytest.mark.usefixtures("use_all_threads")
def test_bits(mode, target):
    """Every packing gives the bits of every other one, for any batch and threads, and with lengths."""
    spec = RNNSpec(mode, 19, 35, num_layers=2, compute="int8_weights")
    ops = [op_with(rows, spec) for rows in PACKINGS.values()]
    x, params = arguments(8, spec)
    lengths = np.array([7, 1, 3, 5, 7, 1, 6, 2])
    exists = np.arange(7)[:, None, None] < lengths[:, None]
    expected, _, _ = ops[0].forward(x, params, lengths=lengths)  # zero where a sequence has no step
    for op in ops:
        for batch, threads, given in ((8, 2, lengths), (5, 2, None), (3, 1, None), (2, 3, None), (1, 1, None)):
            with fusedrnn.thread_limits(threads):
                y, _, _ = op.forward(x[:, :batch], params, lengths=given)
            np.testing.assert_array_equal(np.where(exists[:, :batch], y, 0), expected[:, :batch])
        # A stream reads narrow weights for its single steps, wide ones for the rest.
        stream = op.stream(params, batch=3)
        y = np.concatenate([stream(x[first:last, :3]) for first, last in ((0, 1), (1, 2), (2, 6), (6, 7))])
        np.testing.assert_array_equal(np.where(exists[:, :3], y, 0), expected[:, :3])


@needs_fma
def test_a_changing_batch_packs_each_format_once(packed_sizes):
    """Batches of 1 and 64 in turns: each format is packed once, and again once after the parameters have changed."""
    op = op_with(PACKINGS["by rows"])
    x, params = arguments(8)
    for batch in (1, 8, 2, 8, 1, 3, 8, 1):
        op.forward(x[:, :batch], params)
    narrow, wide = packed_sizes
    assert 3 * narrow < wide < 4 * narrow  # biases and scales are float32 in both
    params *= 2
    for batch in (1, 8, 2, 8, 1):
        op.forward(x[:, :batch], params)
    assert packed_sizes == [narrow, wide] * 2


@needs_fma
@pytest.mark.parametrize("kind", ["frozen", "quantized", "stream"])
def test_constants_are_packed_once(kind, packed_sizes):
    """Parameters that cannot change, in checked and cached calls and in streams of several batches."""
    op = op_with(PACKINGS["by rows"])
    x, params = arguments(8)
    constants = op.quantize(params) if kind == "quantized" else frozen(params)
    if kind == "stream":
        calls = {batch: op.stream(constants, batch=batch) for batch in (1, 8)}
    else:
        calls = dict.fromkeys((1, 8), lambda chunk: op.forward(chunk, constants)[0])
    results = {1: [], 8: []}
    for batch in (1, 8) * 3 + (8, 8, 8, 1, 1, 1):
        results[batch].append(calls[batch](x[:, :batch]))
    for one, many in zip(results[1], results[8], strict=True):
        np.testing.assert_array_equal(one[:, 0], many[:, 0])
    assert len(packed_sizes) == 2


@needs_fma
def test_memory_is_bounded():
    """Of each format, an op keeps as many parameter vectors as one of a single format."""
    op = op_with(PACKINGS["by rows"])
    x, params = arguments(8)
    executor, most = op.by_address(), tuning.current().max_packed_vectors
    vectors = [params * scale for scale in np.linspace(0.5, 1.5, most + 2, dtype=np.float32)]
    for vector in vectors:
        op.forward(x[:, :1], vector)
        op.forward(x, vector)
    caches = executor.weight_cache_for(7, 1), executor.weight_cache_for(7, 8)
    assert [cache.num_packed for cache in caches] == [most, most]


@needs_fma
def test_compile_compiles_both():
    """No call compiles after :meth:`RNNOp.compile`."""
    op = op_with(PACKINGS["by rows"]).compile()
    executor = op.by_address()
    assert set(executor._jobs) == {("inference", True), ("inference", False)}


@needs_fma
@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        (RNNSpec("lstm", 64, 64, compute="int8_weights"), 0),  # 0.13 MiB as float32: half of L2 holds them
        (RNNSpec("lstm", 192, 192, compute="int8_weights"), 1),  # 1.1 MiB: they come from L2 and L3
        (RNNSpec("lstm", 64, 64, num_layers=40, compute="int8_weights"), 0),  # it is the layer that counts
        (RNNSpec("lstm", 512, 512, compute="int8_weights"), 2),  # 8 MiB: L3
        (RNNSpec("lstm", 800, 1200, compute="int8_weights"), 4),  # 36.7 MiB: memory
        (RNNSpec("lstm", 64, 64, compute="bfloat16"), 0),
        (RNNSpec("lstm", 800, 800, compute="bfloat16"), ANY_ROWS),
    ],
    ids=lambda value: value if isinstance(value, int) else f"{value.compute}-{value.num_layers}x{value.hidden_size}",
)
def test_rows(spec, rows):
    """Narrow weights for as many rows as take less time to multiply than wide weights take to read."""
    sizes = {"wide_weight_bytes": MIB // 4, "narrow_int8_rows": ((4 * MIB, 1), (32 * MIB, 2), (inf, 4))}
    with tuned(**sizes) as installed:
        assert max_narrow_rows(spec, 2, installed) == rows
        executor = RNNOp(spec).by_address()
    for batch in (1, 2, 3, 4, 5, 8, 9, 64):
        for steps, most in ((1, 2 * rows), (2, rows), (50, rows)):
            target = executor.weight_cache_for(steps, batch).tiling.target
            assert target.narrow_weights == (batch <= most or spec.compute in target.dot_products)


def test_thresholds_grow_with_the_weights():
    """More rows pay where the weights come from farther; the last threshold has no end."""
    thresholds = tuning.current().narrow_int8_rows
    assert list(thresholds) == sorted(thresholds)
    assert thresholds[-1][0] == inf
    assert tuning.current().wide_weight_bytes < thresholds[0][0]
