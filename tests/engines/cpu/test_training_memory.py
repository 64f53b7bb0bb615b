"""Reserves: how large they are, whose they are, how their memory is used again; training loops that need no more."""

import gc
import os
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp
from fusedrnn.engines.cpu import tuning
from fusedrnn.runtime import buffers
from fusedrnn.spec import DTYPES, MODES
from problems import Shape, assert_same_bits, make_problem

SHAPE = Shape(5, 4, 17, 33, layers=2, bidirectional=True, lengths="edges")
KEEPS = ("gates", "states")
# What a step of a cell leaves to backward besides the states, for each unit.
NUM_SAVED = {"rnn_relu": 0, "rnn_tanh": 0, "lstm": 4, "gru": 4}


def forward(problem, op, keep="gates", params=None):
    params = problem.params if params is None else params
    return op.forward(
        problem.x, params, problem.states, training=True, lengths=problem.lengths, reserve=keep, seed=5
    )


def backward(problem, op, reserve):
    return op.backward(problem.dy, problem.dstates, reserve)


def fresh(problem, keep="gates"):
    """The gradients by an op that does nothing else."""
    problem = replace(problem, params=problem.params.copy())
    op = RNNOp(problem.spec)
    return backward(problem, op, forward(problem, op, keep)[2])


@pytest.fixture(params=KEEPS)
def keep(request):
    return request.param


def round_up_to_cache_line(size):
    return -(-size // 64) * 64


@pytest.mark.pairwise
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [SHAPE, Shape(1, 1, 1, 1), Shape(7, 3, 100, 64, layers=3), Shape(3, 20, 5, 129, bidirectional=True)],
    ids=str,
)
def test_reserve_has_the_size_of_its_layout(mode, dtype, shape, keep, target, use_all_threads, monkeypatch):
    """The reserve is as large as it is said to be beforehand, and as its layout makes it."""
    allocations = []
    plain = buffers.aligned_empty
    problem = make_problem(mode, shape, dtype)
    op, spec = RNNOp(problem.spec), problem.spec
    for _ in range(3):  # packed weights and workspace are there now, also that of a loop's many threads
        forward(problem, op, keep)
    op.by_address()._reserves._idle.clear()
    monkeypatch.setattr(buffers, "aligned_empty", lambda *args: allocations.append(args) or plain(*args))
    reserve = forward(problem, op, keep)[2]
    assert allocations == [((reserve.nbytes,), np.uint8)]
    assert op.reserve_size(shape.T, shape.N, keep) == reserve.nbytes

    item, rows = np.dtype(dtype).itemsize, shape.T * shape.N
    vector = target.vector_bits // 8
    state_row = (round_up_to_cache_line(spec.output_size * item) // 64 | 1) * 64
    units = -(-shape.H * item // vector) * vector
    gates = round_up_to_cache_line(units * NUM_SAVED[mode] * (keep == "gates"))
    size = round_up_to_cache_line(rows * shape.I * item)
    size += shape.layers * len(spec.state_names) * (shape.T + 2) * shape.N * state_row
    size += shape.layers * spec.num_directions * rows * gates
    # And behind it what is read past the end: two rows of a panel.
    assert reserve.nbytes == size + 2 * target.tile[1] * vector


@pytest.mark.parametrize("mode", MODES)
def test_reserve_of_states_is_smaller(mode):
    """Where there is something else to keep; and by what there is."""
    op = RNNOp(SHAPE.spec(mode))
    sizes = [op.reserve_size(100, 20, keep) for keep in KEEPS]
    if NUM_SAVED[mode]:
        assert sizes[1] < 0.6 * sizes[0]
    else:
        assert sizes[1] == sizes[0]


@pytest.mark.parametrize("lengths", [False, True], ids=["full", "lengths"])
def test_memory_of_reserves_is_reused(keep, lengths):
    """What one reserve leaves the next one gets, also a smaller one; one that is held keeps its own."""
    problem = make_problem("lstm", replace(SHAPE, lengths="some" if lengths else "full"))
    op = RNNOp(problem.spec)
    small = replace(
        problem, x=problem.x[:3], lengths=None if problem.lengths is None else problem.lengths.clip(max=3)
    )

    def address(reserve):
        return reserve._residuals.lease.address

    reserve = forward(problem, op, keep)[2]
    first = address(reserve)
    other = forward(problem, op, keep)[2]
    second = address(other)
    assert second != first
    del reserve
    for case in (problem, small, problem):
        assert address(forward(case, op, keep)[2]) == first
    del other
    reserves = [forward(problem, op, keep)[2] for _ in range(2)]
    assert {address(case) for case in reserves} == {first, second}


def test_number_of_idle_reserves_is_limited():
    problem = make_problem("gru", SHAPE)
    op = RNNOp(problem.spec)
    held = [forward(problem, op)[2] for _ in range(20)]
    assert len({reserve._residuals.lease.address for reserve in held}) == 20
    del held
    gc.collect()
    assert len(op.by_address()._reserves._idle) == tuning.current().max_idle_reserves


@pytest.mark.parametrize("mode", MODES)
def test_reserve_outlives_its_op(mode, keep):
    problem = make_problem(mode, SHAPE)
    expected = fresh(problem, keep)
    op = RNNOp(problem.spec)
    reserve = forward(problem, op, keep)[2]
    del op
    gc.collect()
    held = [np.full(1000, np.nan) for _ in range(2000)]  # what was freed would now be overwritten
    assert_same_bits(backward(problem, RNNOp(problem.spec), reserve), expected)
    del held


@pytest.mark.parametrize("between", ["an update", "another vector", "more vectors than are kept", "an op's end"])
@pytest.mark.parametrize("mode", MODES)
def test_backward_uses_the_parameters_of_its_forward(mode, keep, between):
    problem = make_problem(mode, SHAPE)
    expected = fresh(problem, keep)
    op, params = RNNOp(problem.spec), problem.params.copy()
    reserve = forward(problem, op, keep, params)[2]
    if between == "an update":
        params *= np.float32(0.5)
        forward(problem, op, keep, params)
    elif between == "another vector":
        forward(problem, op, keep, problem.params * np.float32(0.5))
    elif between == "an op's end":
        params[...] = np.nan
        op = RNNOp(problem.spec)
    else:
        for scale in np.linspace(0.1, 0.9, 2 * tuning.current().max_packed_vectors, dtype=np.float32):
            forward(problem, op, keep, problem.params * scale)
            op.forward(problem.x, problem.params * -scale)
    for _ in range(2):
        assert_same_bits(backward(problem, op, reserve), expected)


def test_updates_between_many_forwards_and_backwards(keep):
    """Each of several reserves goes with the parameters that there were at its time."""
    problem = make_problem("lstm", SHAPE)
    op, params = RNNOp(problem.spec), problem.params.copy()
    reserves, expected = [], []
    for _ in range(2 * tuning.current().max_packed_vectors):
        expected.append(fresh(replace(problem, params=params), keep))
        reserves.append(forward(problem, op, keep, params)[2])
        params *= np.float32(0.9)
    for number in np.random.default_rng(0).permutation(len(reserves)):
        assert_same_bits(backward(problem, op, reserves[number]), expected[number])


@pytest.mark.parametrize("mode", MODES)
def test_arrays_may_change_after_forward(mode, keep):
    """Input, states, lengths, and what was returned: backward uses none of them."""
    problem = make_problem(mode, SHAPE)
    problem = replace(problem, spec=replace(problem.spec, dropout=0.3))
    expected = fresh(problem, keep)
    own = replace(
        problem, x=problem.x.copy(), params=problem.params.copy(), lengths=problem.lengths.copy(),
        states=tuple(map(np.copy, problem.states)),
    )  # fmt: skip
    op = RNNOp(problem.spec)
    y, final, reserve = forward(own, op, keep)
    for array in (own.x, own.params, *own.states, y, *final):
        array.fill(np.nan)
    own.lengths.fill(1)
    assert_same_bits(backward(problem, op, reserve), expected)


class Loop:
    """A training loop that brings all memory that results take, but final states."""

    def __init__(self, shape, keep, mode="lstm"):
        self.problem = make_problem(mode, shape)
        self.spec, self.keep = self.problem.spec, keep
        self.op, self.params = RNNOp(self.spec), self.problem.params.copy()
        self.update = np.empty_like(self.params)
        self.y, self.dx = np.empty_like(self.problem.dy), np.empty_like(self.problem.x)
        self.dparams, self.dstates = np.empty_like(self.params), tuple(map(np.empty_like, self.problem.dstates))

    def step(self, T, N, lengths=None):
        """One step on a part of the problem; what it returns besides the caller's memory, in bytes."""
        p = self.problem
        x, dy = p.x[:T, :N], p.dy[:T, :N]
        _, final, reserve = self.op.forward(
            x, self.params, training=True, lengths=lengths, out=self.y[:T, :N], reserve=self.keep
        )
        shapes = self.spec.state_shape(N)
        dstates = tuple(
            whole.reshape(-1)[: np.prod(shape)].reshape(shape)
            for whole, shape in zip(self.dstates, shapes, strict=True)
        )
        self.op.backward(dy, final, reserve, out=(self.dx[:T, :N], self.dparams, dstates))
        np.multiply(self.dparams, np.float32(1e-3), out=self.update)
        np.subtract(self.params, self.update, out=self.params)
        return sum(state.nbytes for state in final)


@pytest.mark.one_value("keep")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lengths", [False, True], ids=["full", "lengths"])
def test_steady_state_allocates_nothing_but_its_results(threads, lengths, keep, use_all_threads, traced):
    """Steps of hundreds of shapes: nothing stays, and at no time is there much beside what is returned."""
    loop, rng = Loop(Shape(30, 40, 16, 48, layers=2, bidirectional=True), keep), np.random.default_rng(0)
    allowed = 70_000 if lengths else 60_000  # every shape's plans and records; with lengths their tables too

    def call(T=None, N=None):
        T, N = T or int(rng.integers(1, 31)), N or int(rng.integers(1, 41))
        valid = rng.integers(0, T + 1, N) if lengths else None
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        returned = loop.step(T, N, valid)
        _, peak = tracemalloc.get_traced_memory()
        return peak - before - returned

    tracemalloc.start()
    try:
        with fusedrnn.thread_limits(threads):
            for N in (*range(1, 40, 4), 40):
                call(30, N)  # scratch and reserves are now as large as they will ever be
            for _ in range(40):
                call()
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            assert max(call() for _ in range(60)) < allowed
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 40_000  # what Python keeps to use again


def test_caches_do_not_grow_with_shapes():
    """Nothing is kept by T or N, but one plan of each kind of call."""
    loop, sizes = Loop(Shape(20, 21, 3, 5, layers=2), "gates"), []
    for T in range(1, 20):
        for loop.keep in KEEPS:
            loop.step(T, T + 1)
        engine = loop.op.by_address()
        sizes.append([engine.weight_cache.num_packed, len(engine.scratch_pool._idle), len(engine._planned)])
        assert len(engine._reserves._idle) <= tuning.current().max_idle_reserves
    assert sizes == [[1, 1, 2]] * len(sizes)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_resident_memory_does_not_grow():
    """Two thousand steps of small nets on batches of all sizes take no page more, whatever their reserves save."""
    shape, rng = Shape(12, 12, 8, 24, layers=2, bidirectional=True), np.random.default_rng(0)
    loops = [Loop(shape, keep) for keep in KEEPS]

    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def steps(count):
        for number in range(count):
            T, N = (int(size) for size in rng.integers(1, 13, 2))
            loops[number // 2 % 2].step(T, N, rng.integers(0, T + 1, N) if number % 2 else None)

    for loop in loops:
        loop.step(12, 12)
    steps(400)
    before = resident()
    steps(2000)
    assert resident() - before < 1_000_000  # 500 bytes a step would be as much


def test_memory_is_freed_with_the_op(keep, traced):
    """Reserves and packed weights included, once nobody holds a reserve."""
    problem = make_problem("lstm", Shape(20, 30, 64, 100, layers=2))
    fresh(problem, keep)
    gc.collect()
    tracemalloc.start()
    try:
        op = RNNOp(problem.spec)
        reserve = forward(problem, op, keep)[2]
        backward(problem, op, reserve)
        with_op, _ = tracemalloc.get_traced_memory()
        size = reserve.nbytes
        del op
        with_reserve, _ = tracemalloc.get_traced_memory()
        del reserve
        gc.collect()
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert with_op > size + 2 * problem.params.nbytes
    assert with_reserve > size
    assert left < problem.params.nbytes / 10  # a few objects of Python's, no weights or reserve


def test_memory_of_many_reserves_is_reused(keep):
    """As many forwards before their backwards as a pipeline may have: the next round finds all their memory."""
    problem = make_problem("gru", Shape(20, 9, 17, 33))
    op = RNNOp(problem.spec)

    def addresses():
        held = [op.forward(problem.x, problem.params, training=True, reserve=keep)[2] for _ in range(12)]
        return {reserve._residuals.lease.address for reserve in held}

    first = addresses()
    assert len(first) == 12
    assert addresses() == first


def test_small_reserve_does_not_hold_a_large_buffer(keep):
    problem = make_problem("lstm", Shape(129, 100, 17, 33))
    op = RNNOp(problem.spec)
    op.forward(problem.x, problem.params, training=True, reserve=keep)
    small = op.forward(problem.x[:1, :1], problem.params, training=True, reserve=keep)[2]
    assert small._residuals.lease.buffer.nbytes <= op.reserve_size(129, 100, keep) // 16


def test_buffers_of_growing_size_replace_each_other():
    pool = buffers.BufferPool(16)
    for size in range(1 << 20, 40 << 20, 1 << 20):
        assert pool.lease(size).buffer.nbytes == size
        assert len(pool._idle) == 1
