"""Calls on buffers that machine code runs without the interpreter: the bits of the operator, from any thread."""

import ctypes
import gc
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec
from fusedrnn.engines.cpu import buffer_call, tuning
from fusedrnn.engines.cpu.buffer_call import BufferCall
from fusedrnn.engines.cpu.executor import Executor
from fusedrnn.engines.cpu.kernels.lowered_cell import state_letters
from fusedrnn.engines.cpu.launch.buffer_kernel import BAD_LENGTH, NO_MEMORY, NOT_ALIGNED, OK
from fusedrnn.engines.cpu.launch.kernel_args import state_symbols
from fusedrnn.engines.cpu.reserve_layout import ReserveLayout
from fusedrnn.engines.cpu.weights.cache import WeightCache
from fusedrnn.runtime import native_memory
from fusedrnn.runtime.buffers import aligned_empty
from fusedrnn.runtime.thread_pool import ensure_pool, set_num_threads
from problems import Shape, problem_of

SMALL = Shape(9, 7, 24, 40, layers=2, bidirectional=True)
SPECS = [
    RNNSpec("lstm", 24, 40, 2, True), RNNSpec("gru", 24, 40, 2, True, dtype="float64"), RNNSpec("rnn_tanh", 24, 40),
    RNNSpec("lstm", 24, 40, projection_size=17), RNNSpec("gru", 24, 40, reset_after=False),
    RNNSpec("lstm", 24, 40, compute="bfloat16"),
]  # fmt: skip


@pytest.fixture(params=[1, 2], ids="{}threads".format)
def threads(request, use_all_threads):
    with fusedrnn.thread_limits(request.param):
        yield request.param


def poison():
    """Fill the scratch that calls share with bytes that are NaN as floats."""
    for slot in native_memory._slots:
        if slot[1] and not slot[0]:
            ctypes.memset(int(slot[1]), 255, int(slot[2]))


class Forward:
    """Forward calls of a problem on buffers, and what the operator says."""

    def __init__(self, spec, shape, threads, lengths=False, resets=False, seed=0):
        rng = np.random.default_rng(seed)
        self.problem = problem_of(spec, replace(shape, lengths="edges" if lengths else "full"), seed)
        self.spec, self.executor = spec, Executor(spec)
        self.lengths = self.problem.lengths
        self.resets = (rng.random((shape.T, shape.N)) < 0.2) & ~self.problem.padding if resets else None
        self.op = RNNOp(spec)
        letters = state_letters(len(spec.state_names))[: len(spec.state_names)]
        initial, final = state_symbols(letters, "{}0"), state_symbols(letters, "{}_n")
        self.doutputs, self.dinitial = state_symbols(letters, "d{}_n"), state_symbols(letters, "d{}0")
        self.options = ["lengths"] * lengths + ["resets"] * resets
        self.names = ["x", "params", *initial, *self.options, "y", *final]
        self.layout = ReserveLayout.of(self.executor.tiling, shape.T, shape.N, "gates", resets)
        self.problem_size = shape.T, shape.N
        problem = self.executor.problem("inference", *self.problem_size, None)
        self.call = BufferCall(self.executor, problem, threads, self.names)

    @property
    def optional(self):
        """The operands beside x, params and states."""
        lengths = [] if self.lengths is None else [self.lengths.astype(np.int32)]
        return lengths + ([] if self.resets is None else [self.resets])

    def results(self, like):
        """Arrays for results, filled with NaN."""
        return [np.full_like(array, np.nan) for array in like]

    def run(self, call, operands, results, *more):
        """Run a call; the results."""
        arrays = [*operands, *results, *more]
        assert call.run([array.ctypes.data for array in arrays]) == OK
        return results

    @property
    def operands(self):
        """All operands of forward."""
        return [self.problem.x, self.problem.params, *self.problem.states, *self.optional]

    def expected(self, **options):
        """What the operator returns."""
        p = self.problem
        return self.op.forward(p.x, p.params, p.states, lengths=self.lengths, resets=self.resets, **options)

    def check(self):
        """Compare one call with the operator."""
        y, final, _ = self.expected()
        poison()
        self.check_equal(self.run(self.call, self.operands, self.results([y, *final])), [y, *final])

    @staticmethod
    def check_equal(actual, expected):
        for array, other in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("lengths, resets", [(False, False), (True, True)], ids=["plain", "lengths-resets"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.mode}-{spec.dtype}-{spec.compute}-{spec.state_size}")
def test_training_and_inference(spec, lengths, resets, threads):
    forward = Forward(spec, SMALL, threads, lengths, resets)
    for _ in range(3):
        forward.check()
    problem, executor = forward.problem, forward.executor
    y, final, reserve = forward.expected(training=True)
    gradients = forward.op.backward(problem.dy, problem.dstates, reserve)
    flat = [gradients[0], gradients[1], *gradients[2]]
    size = forward.problem_size
    names = [*forward.names, "reserve"]
    train = BufferCall(executor, executor.problem("training", *size, forward.layout), threads, names)
    names = ["reserve", "params", "dy", *forward.doutputs, *forward.options, "dx", "dparams", *forward.dinitial]
    backward = BufferCall(executor, executor.problem("backward", *size, forward.layout), threads, names)
    for _ in range(2):
        saved = aligned_empty((forward.layout.size,), np.uint8)
        saved[:] = 255
        poison()
        forward.check_equal(
            forward.run(train, forward.operands, forward.results([y, *final]), saved), [y, *final]
        )
        operands = [saved, problem.params, problem.dy, *problem.dstates, *forward.optional]
        forward.check_equal(forward.run(backward, operands, forward.results(flat)), flat)


@pytest.mark.parametrize("compute", ["int8", "int8_weights"])
def test_integer_formats(compute, threads):
    forward = Forward(RNNSpec("gru", 24, 40, compute=compute), SMALL, threads, lengths=True)
    forward.check()
    forward.problem.params[:] = -forward.problem.params
    forward.check()


def test_an_interrupt_while_parameters_are_packed(monkeypatch):
    """The call fails, and the next one packs again."""
    forward = Forward(RNNSpec("gru", 24, 40, compute="int8"), SMALL, 1)
    y, final, _ = forward.expected()
    buffers = [*forward.operands, *forward.results([y, *final])]
    addresses = [array.ctypes.data for array in buffers]

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda entry: None)
        patch.setattr(WeightCache, "pack_quantized_into", interrupt)
        assert forward.call.run(addresses) == forward.call.run(addresses) == NO_MEMORY
    forward.check()


def test_changed_parameters_are_packed_again(threads):
    """In place, and other vectors in turn, more of them than there are slots."""
    forward = Forward(SPECS[0], SMALL, threads)
    rng = np.random.default_rng(1)
    for _ in range(3):
        for vector in [rng.uniform(-0.3, 0.3, forward.spec.layout.size).astype(np.float32) for _ in range(6)]:
            forward.problem = replace(forward.problem, params=vector)
            forward.check()
            vector[-1] += 1
            forward.check()


def test_unpacked_parameters(threads):
    with tuning.tuned(max_unpacked_floats=1 << 40, max_unpacked_floats_training=1 << 40):
        forward = Forward(RNNSpec("lstm", 24, 40), Shape(1, 2, 24, 40), threads)
        assert forward.executor.is_short(1, 2, False)
        forward.check()
        forward.problem.params[:] *= 2
        forward.check()


def test_many_threads_at_once(use_all_threads):
    """Calls of different sizes and parameters, while a call of Python takes the pool away and resizes it."""
    with fusedrnn.thread_limits(2):
        calls = [
            Forward(spec, Shape(5 + n, 3 + n, 24, 40), 2, lengths=n % 2 == 0, seed=n)
            for n, spec in enumerate([SPECS[0], SPECS[2], SPECS[3]] * 2)
        ]
    expected = [forward.expected() for forward in calls]
    errors = []

    def loop(forward, results):
        try:
            y, final, _ = results
            for _ in range(30):
                forward.check_equal(
                    forward.run(forward.call, forward.operands, forward.results([y, *final])), [y, *final]
                )
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=loop, args=pair) for pair in zip(calls, expected, strict=True)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        for size in (3, 2):
            ensure_pool(size)
    assert not errors


def test_the_pool_is_made_when_it_is_missing(use_all_threads):
    """The first call of a process, and one after the number of threads has changed."""
    forward = Forward(SPECS[0], SMALL, 2)
    for size in (3, 1):
        assert ensure_pool(size)
        forward.check()


@pytest.mark.parametrize("length", [-1, 10, 2**31 - 1, -(2**31)])
def test_a_length_out_of_range(length, threads):
    forward = Forward(SPECS[2], SMALL, threads, lengths=True)
    forward.lengths[3] = length
    y = np.zeros((9, 7, 40), np.float32)
    arrays = [*forward.operands, y, np.zeros((1, 7, 40), np.float32)]
    assert forward.call.run([array.ctypes.data for array in arrays]) == BAD_LENGTH


def test_a_reserve_that_is_not_aligned():
    forward = Forward(SPECS[2], SMALL, 1)
    problem = forward.executor.problem("training", 9, 7, forward.layout)
    train = BufferCall(forward.executor, problem, 1, [*forward.names, "reserve"])
    saved = aligned_empty((forward.layout.size + 64,), np.uint8)[4:]
    arrays = [*forward.operands, np.zeros((9, 7, 40), np.float32), np.zeros((1, 7, 40), np.float32), saved]
    assert train.run([array.ctypes.data for array in arrays]) == NOT_ALIGNED


def test_number_of_threads_is_published():
    from fusedrnn.runtime import native_state, thread_pool

    before = thread_pool._num_threads
    try:
        set_num_threads(3)
        assert ctypes.c_int64.from_address(native_state.num_threads_cell()).value == 3
    finally:
        set_num_threads(before or thread_pool.get_num_threads())


def test_packed_weights_are_freed():
    """With the last call that uses them and the cache's entry, and with the memory of every slot."""
    with tuning.tuned(max_unpacked_floats=0):
        forward = Forward(SPECS[2], SMALL, 1)
        problem = forward.executor.problem("inference", 9, 7, None)
        shared = BufferCall(forward.executor, problem, 1, forward.names)
    forward.check()
    slots = forward.call._weights._slots
    assert slots[:, 1].any() and shared._weights is forward.call._weights
    buffer_call._native_weights.cache_clear()
    forward.call = None
    assert slots[:, 1].any()
    del shared
    gc.collect()
    assert not slots[:, 1:3].any()
