"""Training by several threads at once on one op, in forked and spawned processes, backward elsewhere than forward."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fusedrnn
from forks import FORK_WARNING, FORKS, busy_threads, in_child
from fusedrnn import RNNOp
from fusedrnn.engines.cpu.launch import kernel_args
from fusedrnn.runtime import thread_pool
from problems import Shape, assert_same_bits, make_problem

pytestmark = pytest.mark.usefixtures("use_all_threads")

SHAPE = Shape(7, 29, 17, 33, layers=2, bidirectional=True, lengths="edges")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What set_num_threads sets ends with the test."""
    monkeypatch.setattr(thread_pool, "_num_threads", None)


def step(problem, op=None, params=None, keep="gates"):
    """A forward and a backward pass: everything that they compute."""
    op = op or RNNOp(problem.spec)
    params = problem.params if params is None else params
    y, final, reserve = op.forward(
        problem.x, params, problem.states, training=True, lengths=problem.lengths, reserve=keep
    )
    return y, final, op.backward(problem.dy, problem.dstates, reserve)


def loop(problem, op, steps=12):
    """Some steps of gradient descent, in place; everything computed on the way."""
    params, results = problem.params.copy(), []
    for number in range(steps):
        results.append(step(problem, op, params, ("gates", "states")[number % 2]))
        dparams = results[-1][2][1]
        params -= np.float32(0.01) * dparams / np.abs(dparams).max()
    return results


@pytest.mark.parametrize("mode", ["lstm", "gru"])
@pytest.mark.parametrize("count", [1, 2])
def test_training_loops_in_several_threads(mode, count):
    """Four threads that share an op, each with data and parameters of its own, get what each gets alone."""
    problems = [make_problem(mode, SHAPE, seed=seed) for seed in range(4)]
    expected = [loop(problem, RNNOp(problem.spec)) for problem in problems]
    op = RNNOp(problems[0].spec)
    start = threading.Barrier(len(problems))

    def work(problem):
        start.wait()
        return loop(problem, op)

    fusedrnn.set_num_threads(count)
    with ThreadPoolExecutor(len(problems)) as pool:
        for _ in range(3):
            for results, alone in zip(pool.map(work, problems), expected, strict=True):
                assert_same_bits(results, alone)


@pytest.mark.parametrize("keep", ["gates", "states"])
def test_one_reserve_in_many_threads(keep):
    """Backward only reads its reserve: any number may use it at once."""
    problem = make_problem("lstm", SHAPE)
    op = RNNOp(problem.spec)
    expected = step(problem, op)[2]
    reserve = op.forward(
        problem.x, problem.params, problem.states, training=True, lengths=problem.lengths, reserve=keep
    )[2]
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: op.backward(problem.dy, problem.dstates, reserve), range(40)):
            assert_same_bits(results, expected)


def test_backward_in_another_thread():
    """Each forward's backward elsewhere, with another number of threads, as frameworks run it."""
    problem = make_problem("gru", SHAPE)
    op = RNNOp(problem.spec)
    expected = step(problem, op)

    def backward(reserve, count):
        with fusedrnn.thread_limits(count):
            return op.backward(problem.dy, problem.dstates, reserve)

    fusedrnn.set_num_threads(2)
    with ThreadPoolExecutor(1) as pool:
        for count in (1, 2, 3, 2):
            y, final, reserve = op.forward(
                problem.x, problem.params, problem.states, training=True, lengths=problem.lengths
            )
            results = pool.submit(backward, reserve, count).result()
            del reserve
            assert_same_bits((y, final, results), expected)


def test_inference_beside_training():
    """Inference and training on the same op at once, with the same parameters, which change in between."""
    problem = make_problem("lstm", SHAPE)
    op, expected = RNNOp(problem.spec), step(problem)
    stop = threading.Event()

    def infer():
        while not stop.is_set():
            y, final, _ = op.forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
            assert_same_bits((y, final), expected[:2])

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(infer) for _ in range(2)]
        try:
            for _ in range(30):
                assert_same_bits(step(problem, op), expected)
        finally:
            stop.set()
        for other in others:
            other.result()


def flat(result):
    """The bytes of a result."""
    y, final, (dx, dparams, dstates) = result
    return b"".join(array.tobytes() for array in (y, *final, dx, dparams, *dstates))


@FORKS
@FORK_WARNING
def test_fork_after_training():
    """A child trains on with the op of its parent, and with one of its own; the parent does as before."""
    problem = make_problem("lstm", SHAPE)
    op = RNNOp(problem.spec)
    fusedrnn.set_num_threads(2)
    expected = flat(step(problem, op))
    for _ in range(2):
        assert in_child(lambda: flat(step(problem, op))) == expected
        assert in_child(lambda: flat(step(problem))) == expected
        assert flat(step(problem, op)) == expected


@FORKS
@FORK_WARNING
def test_fork_between_forward_and_backward():
    """A reserve is memory like any other: both have it."""
    problem = make_problem("gru", SHAPE)
    op = RNNOp(problem.spec)
    fusedrnn.set_num_threads(2)
    y, final, reserve = op.forward(
        problem.x, problem.params, problem.states, training=True, lengths=problem.lengths
    )
    expected = flat(step(problem))
    for _ in range(2):
        assert in_child(lambda: flat((y, final, op.backward(problem.dy, problem.dstates, reserve)))) == expected
    assert flat((y, final, op.backward(problem.dy, problem.dstates, reserve))) == expected


@FORKS
@FORK_WARNING
def test_fork_during_training():
    """A child forked while others train finds no lock held by a thread that it does not have."""
    problem = make_problem("gru", SHAPE)
    op = RNNOp(problem.spec)
    fusedrnn.set_num_threads(2)
    expected = flat(step(problem, op))
    with busy_threads(lambda: step(problem, op)):
        for _ in range(10):
            assert in_child(lambda: flat(step(problem, op))) == expected


@FORK_WARNING
@pytest.mark.parametrize("method", [pytest.param("fork", marks=FORKS), "spawn"])
def test_training_in_other_processes(method):
    problem = make_problem("rnn_tanh", SHAPE)
    fusedrnn.set_num_threads(2)
    expected = step(problem)
    with multiprocessing.get_context(method).Pool(2) as pool:
        for result in pool.map(step, [problem] * 3):
            assert_same_bits(result, expected)


def test_failed_backward_leaves_the_pool_free(monkeypatch):
    """A call that fails before its job does not keep the pool, and the reserve is as good as before."""
    problem = make_problem("lstm", SHAPE)
    op = RNNOp(problem.spec)
    fusedrnn.set_num_threads(2)
    expected = step(problem, op)
    reserve = op.forward(problem.x, problem.params, problem.states, training=True, lengths=problem.lengths)[2]
    with monkeypatch.context() as patch:
        patch.setattr(kernel_args.KernelArgs, "bind", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            op.backward(problem.dy, problem.dstates, reserve)
    assert thread_pool.ensure_pool(2)
    assert_same_bits(op.backward(problem.dy, problem.dstates, reserve), expected[2])
