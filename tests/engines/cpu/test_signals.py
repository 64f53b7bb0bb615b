"""Signals in the middle of calls: interrupts leave nothing taken, handlers may call and fork."""

import gc
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp
from fusedrnn.engines.cpu import guarded_call
from fusedrnn.engines.cpu.launch.call_kernel import load_guarded_call
from problems import Shape, assert_same_bits, make_problem

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")

PROBLEM = make_problem("lstm", Shape(2, 2, 4, 4))


@pytest.fixture
def alarm():
    """Sets what a timer's signal does, and stops it in the end."""
    before = signal.getsignal(signal.SIGALRM)
    yield lambda handler: signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def train(op, params=PROBLEM.params):
    y, states, reserve = op.forward(PROBLEM.x, params, training=True)
    dx, dparams, dstates = op.backward(y, None, reserve)
    return y, (*states, dx, dparams, *dstates)


@pytest.fixture
def no_gc_callbacks():
    """Python loses an interrupt that falls into a callback of the garbage collector; hypothesis has one."""
    callbacks = list(gc.callbacks)
    gc.callbacks.clear()
    yield
    gc.callbacks.extend(callbacks)


@pytest.mark.usefixtures("no_gc_callbacks")
@pytest.mark.parametrize("threads", [1, 2])
def test_interrupts_leave_no_lock_taken(alarm, monkeypatch, threads, use_all_threads):
    """No lock stays taken, which other threads would wait for, and no interrupt is lost."""
    op, rng = RNNOp(PROBLEM.spec), np.random.default_rng(0)
    lost, caught = [], 0
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    with fusedrnn.thread_limits(threads):
        expected = train(op)
        alarm(signal.default_int_handler)
        gc.collect()  # what other tests have left: interrupts that fall into its finalizers are lost
        for _ in range(400):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-4))
                deadline = time.monotonic() + 20
                while time.monotonic() < deadline:
                    train(op)
                pytest.fail(f"an interrupt was lost: {lost}")
            except KeyboardInterrupt:
                caught += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
        other = threading.Thread(target=train, args=(op,), daemon=True)
        other.start()
        other.join(30)
        assert not other.is_alive()
        assert caught == 400
        assert not lost
        assert_same_bits(train(op), expected)


def test_handler_may_call_the_interrupted_op(alarm):
    """With more parameter vectors than an op keeps packed."""
    op = RNNOp(PROBLEM.spec)
    vectors = [PROBLEM.params * scale for scale in np.linspace(0.5, 1, 6, dtype=np.float32)]
    expected = [train(op, params) for params in vectors]
    nested, depth, is_done = [], 0, False

    def handler(*_):
        """Handlers interrupt one another, three at most, and the loop goes on before the next: calls may be slow."""
        nonlocal depth
        if is_done:
            return
        depth += 1
        if depth < 3:
            signal.setitimer(signal.ITIMER_REAL, 7e-4)
        index = len(nested) % 6
        nested.append((index, train(op, vectors[index])))
        depth -= 1
        if not depth:
            signal.setitimer(signal.ITIMER_REAL, 7e-4)

    alarm(handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-3)
    for turn in range(6000):
        assert_same_bits(train(op, vectors[turn % 6]), expected[turn % 6])
    is_done = True
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(nested) > 20
    for index, result in nested:
        assert_same_bits(result, expected[index])


def test_builtins_of_two_loads_both_work(monkeypatch):
    """A handler may ask for one while one is being made; whoever has the first keeps calling it."""
    functions = []
    for _ in range(2):
        load_guarded_call.cache_clear()
        functions.append(load_guarded_call())
    assert functions[0] is not functions[1]
    gc.collect()
    problem = make_problem("lstm", Shape(3, 2, 4, 5))
    for call in functions:
        monkeypatch.setattr(guarded_call, "load_guarded_call", lambda call=call: call)
        op = RNNOp(problem.spec)
        results = [op.forward(problem.x, problem.params, problem.states)[:2] for _ in range(4)]
        for result in results[1:]:
            assert_same_bits(result, results[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_handler_may_fork(alarm):
    """The child goes on with the call that was interrupted."""
    op, parent, children = RNNOp(PROBLEM.spec), os.getpid(), []
    with fusedrnn.thread_limits(1):
        expected = train(op)

        def handler(*_):
            if os.getpid() == parent:
                children.append(os.fork())

        alarm(handler)
        try:
            while len(children) < 20:
                before = len(children)
                signal.setitimer(signal.ITIMER_REAL, 1e-4 * (1 + before))
                while len(children) == before:
                    result = train(op)
                if os.getpid() != parent:
                    for _ in range(30):
                        assert_same_bits(result, expected)
                        result = train(op)
                    os._exit(0)
        except BaseException:
            if os.getpid() != parent:
                os._exit(1)
            raise
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
