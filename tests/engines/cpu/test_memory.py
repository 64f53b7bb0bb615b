"""Packed weights follow their parameters, scratch is reused, memory does not grow."""

import gc
import mmap
import pickle
import tracemalloc
import weakref

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec
from fusedrnn.engines.cpu import tuning
from fusedrnn.engines.cpu.jobs import load_job
from fusedrnn.engines.cpu.weights import cache as weight_cache
from fusedrnn.runtime import buffers
from fusedrnn.runtime import fingerprint as fingerprints
from fusedrnn.runtime.fingerprint import fingerprint_of
from fusedrnn.spec import DTYPES
from problems import Shape, make_problem

SHAPE = Shape(5, 4, 17, 33, layers=2, bidirectional=True)


@pytest.fixture
def counts(monkeypatch):
    """How often weights are packed, and parameters fingerprinted."""
    calls = {"packed": 0, "fingerprinted": 0}
    plain_pack, plain_fingerprint = weight_cache.WeightCache._pack, fingerprints.fingerprint_of

    def packing(*args):
        calls["packed"] += 1
        return plain_pack(*args)

    def fingerprinting(parts):
        calls["fingerprinted"] += 1
        return plain_fingerprint(parts)

    monkeypatch.setattr(weight_cache.WeightCache, "_pack", packing)
    monkeypatch.setattr(fingerprints, "fingerprint_of", fingerprinting)
    return calls


def fingerprint(array):
    return fingerprint_of(np.array([[array.ctypes.data, array.nbytes, 0]]))


def fresh(problem, params):
    return RNNOp(problem.spec).forward(problem.x, params.copy())[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 1, -1, "every weight", "every sign", "one ulp", "swap", "negated zero"])
def test_update_in_place_is_noticed(place, dtype, counts):
    """MXNet's fused op went on with the weights of before."""
    problem = make_problem("lstm", SHAPE, dtype)
    op, params = RNNOp(problem.spec), problem.params.copy()
    params[-2:] = 0.0
    op.forward(problem.x, params)
    if place == "every weight":
        params *= 2
    elif place == "every sign":
        params *= -1
    elif place == "one ulp":
        params[5] += np.spacing(params[5])
    elif place == "swap":
        params[[3, 11]] = params[[11, 3]]
    elif place == "negated zero":
        params[-1] = -0.0
    else:
        params[place] += 0.25
    np.testing.assert_array_equal(op.forward(problem.x, params)[0], fresh(problem, params))
    assert counts["packed"] == 3


def test_fingerprint_changes_with_any_bit():
    """A fingerprint follows every element, wherever it is, for lengths of every remainder."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 15, 16, 17, 31, 33, 100):
        array = rng.standard_normal(size).astype(np.float32)
        fingerprints = {fingerprint(array)}
        for place in range(size):
            for bit in (0, 7, 22, 23, 30, 31):
                changed = array.copy()
                changed.view(np.uint32)[place] ^= np.uint32(1 << bit)
                fingerprints.add(fingerprint(changed))
        assert len(fingerprints) == 6 * size + 1
        assert fingerprint(array.copy()) in fingerprints


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [1, 2, 7, 8, 9, 15, 16, 17, 24, 32, 64])
def test_fingerprint_changes_with_two_elements(dtype, distance):
    """Two signs, or two neighbouring powers of two: the highest bits of a word are seen like any others."""
    array = np.random.default_rng(0).standard_normal(256).astype(dtype)
    fingerprints = {fingerprint(array)}
    for first in range(100):
        for change in (np.negative, lambda value: value * 2):
            changed = array.copy()
            pair = [first, first + distance]
            changed[pair] = change(changed[pair])
            fingerprints.add(fingerprint(changed))
    assert len(fingerprints) == 201


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 99, 4096])
@pytest.mark.parametrize("scale", [-1, 2, 0.5, -2, 0])
def test_fingerprint_changes_with_all_elements(dtype, size, scale):
    array = np.random.default_rng(0).standard_normal(size).astype(dtype)
    assert fingerprint((array * scale).astype(dtype)) != fingerprint(array)


def test_weights_are_packed_once(counts):
    problem = make_problem("gru", SHAPE)
    op = RNNOp(problem.spec)
    for _ in range(5):
        op.forward(problem.x, problem.params)
    assert counts == {"packed": 1, "fingerprinted": 1 + 4}  # once with packing


def test_frozen_weights_are_fingerprinted_once(counts):
    """The content of a bytes object cannot change."""
    problem = make_problem("gru", SHAPE)
    op, params = RNNOp(problem.spec), fusedrnn.frozen(problem.params)
    expected = fresh(problem, problem.params)
    before = dict(counts)
    for _ in range(5):
        np.testing.assert_array_equal(op.forward(problem.x, params)[0], expected)
    assert (counts["packed"] - before["packed"], counts["fingerprinted"] - before["fingerprinted"]) == (1, 1)


def test_frozen_is_a_read_only_copy():
    params = np.arange(6, dtype=np.float32)[::-2]
    copy = fusedrnn.frozen(params)
    params *= 2
    np.testing.assert_array_equal(copy, [5, 3, 1])
    with pytest.raises(ValueError, match="read-only"):
        copy[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        copy.flags.writeable = True
    with pytest.raises(TypeError, match=r"^params must be a NumPy array of floating-point numbers; got list"):
        fusedrnn.frozen([1.0])


def test_unpickled_array_is_not_frozen():
    """NumPy leaves an array that it unpickles on the bytes that it came in, writable."""
    problem = make_problem("gru", SHAPE)
    op, params = RNNOp(problem.spec), pickle.loads(pickle.dumps(problem.params))
    writer = params[:]
    for _ in range(2):
        op.forward(problem.x, params)
        writer *= 0.5
        np.testing.assert_array_equal(op.forward(problem.x, params)[0], fresh(problem, params.copy()))
        params.flags.writeable = False


@pytest.mark.parametrize("how", ["flag lifted", "another view", "its owner"])
def test_read_only_array_is_not_frozen(how):
    """A read-only array may change all the same: by its flag, or through another array."""
    problem = make_problem("gru", SHAPE)
    owner = problem.params.copy()
    writer = owner.view()
    params = owner if how == "flag lifted" else owner.view()
    params.flags.writeable = False
    op = RNNOp(problem.spec)
    op.forward(problem.x, params)
    if how == "flag lifted":
        params.flags.writeable = True
        params *= 2
        params.flags.writeable = False
    elif how == "another view":
        writer *= 2
    else:
        owner *= 2
    np.testing.assert_array_equal(op.forward(problem.x, params)[0], fresh(problem, params))


def test_alternating_parameter_vectors(counts):
    """Parameter vectors in turn: every result is right, whichever are still packed."""
    problem = make_problem("lstm", SHAPE)
    op = RNNOp(problem.spec)
    max_packed = tuning.current().max_packed_vectors
    vectors = [problem.params * scale for scale in np.linspace(0.5, 1.5, max_packed + 2, dtype=np.float32)]
    expected = [fresh(problem, params) for params in vectors]
    before = counts["packed"]
    for turn in (range(max_packed), range(max_packed)):
        for number in turn:
            np.testing.assert_array_equal(op.forward(problem.x, vectors[number])[0], expected[number])
    assert counts["packed"] - before == max_packed
    for number, params in enumerate(vectors):
        np.testing.assert_array_equal(op.forward(problem.x, params)[0], expected[number])
    assert op.by_address().weight_cache.num_packed == max_packed


def test_new_parameters_at_the_address_of_old_ones():
    """New parameters for each call, often at the address of old ones that have been freed."""
    problem = make_problem("lstm", SHAPE)
    op, addresses = RNNOp(problem.spec), set()
    for scale in np.linspace(0.5, 1.5, 20, dtype=np.float32):
        params = problem.params * scale
        addresses.add(params.ctypes.data)
        np.testing.assert_array_equal(op.forward(problem.x, params)[0], fresh(problem, params))
        del params
    assert len(addresses) < 20


def test_one_workspace_serves_smaller_calls(use_all_threads, monkeypatch):
    problem = make_problem("lstm", Shape(30, 20, 17, 33, layers=3))
    op, allocations = RNNOp(problem.spec), []
    plain = buffers.aligned_empty
    monkeypatch.setattr(buffers, "aligned_empty", lambda *args: allocations.append(args) or plain(*args))
    for T, N in ((30, 20), (30, 20), (3, 2), (30, 1), (1, 20), (29, 19), (30, 20)):
        op.forward(problem.x[:T, :N], problem.params)
    assert len(allocations) == 2  # the packed weights, the scratch
    assert len(op.by_address().scratch_pool._idle) == 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lengths", [False, True], ids=["full", "lengths"])
def test_steady_state_allocates_nothing_but_its_results(threads, lengths, use_all_threads, traced):
    """Calls of hundreds of shapes: memory does not grow, and little is allocated beside the output."""
    problem = make_problem("lstm", Shape(40, 50, 16, 48, layers=2, bidirectional=True))
    op, rng = RNNOp(problem.spec), np.random.default_rng(0)
    # Each shape has a plan and kernel arguments of four layer-directions, dropped with the next shape; with lengths
    # also tables, for which NumPy converts booleans in a buffer of its own.
    allowed = 60_000 if lengths else 35_000

    def call(T=None, N=None):
        T, N = T or rng.integers(1, 41), N or rng.integers(1, 51)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        valid = rng.integers(0, T + 1, N) if lengths else None
        y, states, _ = op.forward(problem.x[:T, :N], problem.params, lengths=valid)
        _, peak = tracemalloc.get_traced_memory()
        return peak - before - y.nbytes - sum(state.nbytes for state in states)

    tracemalloc.start()
    try:
        with fusedrnn.thread_limits(threads):
            for N in range(1, 51):
                call(40, N)  # the scratch is now as large as it will ever be
            for _ in range(100):
                call()
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            assert max(call() for _ in range(150)) < allowed
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 40_000  # what Python keeps to use again varies; plans kept by shape would be five times it


def test_caches_do_not_grow_with_shapes():
    """No cache has T or N in its key."""
    problem = make_problem("rnn_tanh", Shape(40, 50, 3, 5))
    kernels = load_job.cache_info().currsize
    op = RNNOp(problem.spec)
    op.forward(problem.x, problem.params)
    sizes = []
    for T in range(1, 40):
        op.forward(problem.x[:T, : T + 1], problem.params)
        engine = op.by_address()
        sizes.append((engine.weight_cache.num_packed, len(engine.scratch_pool._idle), len(engine._planned)))
    assert set(sizes) == {(1, 1, 1)}
    assert load_job.cache_info().currsize <= kernels + 2  # forward and packing


def test_memory_is_freed_with_the_op(traced):
    problem = make_problem("lstm", Shape(40, 50, 64, 100, layers=2))
    RNNOp(problem.spec).forward(problem.x, problem.params)
    gc.collect()
    tracemalloc.start()
    try:
        op = RNNOp(problem.spec)
        op.forward(problem.x, problem.params)
        held, _ = tracemalloc.get_traced_memory()
        del op
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held > problem.params.nbytes
    assert left < problem.params.nbytes / 10  # a few objects of Python's, no weights or reserve


def test_peak_memory_of_inference(traced):
    """Packed weights and scratch together stay below 1.2 times the parameters and a fixed amount."""
    spec = RNNSpec("lstm", 300, 300)
    x, params = np.zeros((300, 20, 300), np.float32), np.zeros(spec.layout.size, np.float32)
    RNNOp(RNNSpec("lstm", 1, 1)).compile()
    gc.collect()
    tracemalloc.start()
    try:
        y, states, _ = RNNOp(spec).forward(x, params)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - y.nbytes - sum(state.nbytes for state in states) < 1.2 * params.nbytes + 4_000_000


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs a system with large pages")
def test_large_buffers_begin_at_huge_pages():
    """They are aligned, of the right size, and freed with their array."""
    page = 2 << 20
    for size in (1 << 20, page, page + 64):
        buffer = buffers.aligned_empty((size // 8,), np.float64)
        assert buffer.ctypes.data % page == 0 and buffer.nbytes == size
        buffer[:] = 1.0
        memory = buffer
        while isinstance(memory, np.ndarray):
            memory = memory.base
        memory = weakref.ref(memory.obj)
        assert memory() is not None
        del buffer
        assert memory() is None
    assert buffers.aligned_empty((64,), np.uint8).ctypes.data % 64 == 0


def test_update_during_packing_is_noticed(monkeypatch):
    """A write between fingerprinting and packing is not stored under the fingerprint of before."""
    problem = make_problem("lstm", SHAPE)
    op, params = RNNOp(problem.spec), problem.params.copy()
    plain = weight_cache.WeightCache._pack

    def packing(self, *args):
        params[:] *= 2
        packed = plain(self, *args)
        params[:] /= 2
        return packed

    with monkeypatch.context() as patch:
        patch.setattr(weight_cache.WeightCache, "_pack", packing)
        op.forward(problem.x, params)
    assert np.array_equal(op.forward(problem.x, params)[0], fresh(problem, params))
