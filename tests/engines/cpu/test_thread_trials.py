"""Trials of one thread: calls are timed, and run on several threads or on one, whichever is faster."""

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, frozen
from fusedrnn.engines.cpu import tuning
from fusedrnn.engines.cpu.plan.thread_trials import Forecast, ThreadChoice, ThreadChoices
from fusedrnn.runtime import thread_pool
from fusedrnn.runtime.pool_kernel import CONTROL
from problems import Shape, assert_same_bits, make_problem

FORECAST = Forecast(several=60e-6, alone=100e-6)
LONG = Forecast(several=6e-3, alone=10e-3)


class Calls:
    """Calls one after another on a machine where several threads and one take given times."""

    def __init__(self, several, alone, forecast=FORECAST):
        self.thread_choice, self.now, self.several, self.alone = ThreadChoice(), 0.0, several, alone
        self.forecast = forecast

    def call(self, hiccup=0.0):
        """Make a call; return whether it used several threads."""
        several = self.thread_choice.use_several(self.now)
        seconds = (self.several if several else self.alone) + hiccup
        self.now += seconds
        self.thread_choice.note(several, seconds, self.now, self.forecast)
        return several

    def run(self, seconds):
        """Make calls for so many seconds; return the fraction of them that used several threads."""
        end, used = self.now + seconds, []
        while self.now < end:
            used.append(self.call())
        return sum(used) / len(used)


def test_faster_threads_are_used():
    calls = Calls(several=60e-6, alone=100e-6)
    assert calls.run(1.0) == 1


def test_machine_slower_than_its_forecast_needs_one_trial():
    """By the forecast, every call is late; after a trial, only one that takes longer than one thread does here."""
    calls = Calls(several=240e-6, alone=400e-6)
    assert 0.5 < calls.run(0.01) < 1
    assert calls.run(20.0) == 1


@pytest.mark.parametrize("several", [150e-6, 500e-6, 10e-3, 1.0])
def test_slower_threads_are_not_used(several):
    calls = Calls(several, alone=110e-6)
    learning = 0
    while calls.thread_choice.sharing:
        learning += calls.call()
    assert learning <= tuning.current().late_calls
    assert several < 0.5 or learning == tuning.current().min_recent_calls  # the slower, the sooner
    used = calls.run(200 * several)
    assert used * several < 0.1 * (1 - used) * 110e-6 + 0.03 * several
    calls.run(60.0)
    assert not calls.thread_choice.sharing


def test_threads_that_become_faster_are_used_again():
    calls = Calls(several=2e-3, alone=110e-6)
    calls.run(30.0)
    assert not calls.thread_choice.sharing
    calls.several = 60e-6
    calls.run(tuning.current().max_trial_pause + 0.5)
    assert calls.thread_choice.sharing
    assert calls.run(1.0) == 1


def test_long_calls_soon_use_threads_again_after_a_disturbance():
    """Where a trial lost nothing, the next one need not wait: a hypervisor may run two processors on one core."""
    calls = Calls(several=6e-3, alone=10e-3, forecast=LONG)
    calls.run(1.0)
    calls.several = 12e-3
    calls.run(0.5)
    assert not calls.thread_choice.sharing
    calls.several = 6e-3
    calls.run(1.0)
    assert calls.thread_choice.sharing


def test_single_late_calls_change_nothing():
    calls = Calls(several=60e-6, alone=100e-6)
    for number in range(20_000):
        calls.call(hiccup=5e-3 * (number % 100 == 0))
    assert calls.thread_choice.sharing


@pytest.mark.parametrize("hiccup", [0.3e-3, 5e-3, 1.0])
def test_slow_first_call_starts_no_trial(hiccup):
    """The first call gets new memory from the system, whatever the number of threads."""
    calls = Calls(several=60e-6, alone=100e-6)
    assert calls.call(hiccup)
    assert calls.run(1.0) == 1


def test_one_thread_is_used_if_times_are_equal():
    """Several threads must gain something: other programs may want the processors."""
    calls = Calls(several=105e-6, alone=104e-6)
    calls.run(2.0)
    assert not calls.thread_choice.sharing


def test_number_of_choices_is_limited():
    thread_choices = ThreadChoices()
    choices = {id(thread_choices.of("inference", Forecast(0.0, seconds))) for seconds in np.geomspace(1e-7, 1e3, 5000)}
    assert len(choices) < 15
    assert thread_choices.of("inference", None) is None
    assert thread_choices.of("inference", Forecast(0.5, 1.0)) is None
    first = thread_choices.of("inference", FORECAST)
    assert thread_choices.of("inference", FORECAST) is first is not thread_choices.of("training", FORECAST)


SHAPE = Shape(6, 1, 33, 64, 1, bidirectional=True)


def num_pool_jobs():
    """How many jobs the thread pool has had."""
    return thread_pool._pool._control[CONTROL.index["job_count"]]


@pytest.fixture
def worth_sharing():
    """The cost model takes several threads for every call, however small."""
    with tuning.tuned(max_trial_call=1.0, min_speedup=0.0):
        yield


@pytest.mark.parametrize("sharing", [True, False])
def test_calls_follow_the_choice(monkeypatch, worth_sharing, sharing):
    """Checked and cached calls, forward, in training and backward; with the same bits."""
    problem = make_problem("lstm", SHAPE)
    thread_choice = ThreadChoice()
    monkeypatch.setattr(thread_choice.__class__, "note", lambda *_: None)
    monkeypatch.setattr(thread_choice.__class__, "use_several", lambda *_: sharing)
    params = frozen(problem.params)
    with fusedrnn.thread_limits(1):
        alone = RNNOp(problem.spec)
        y, states, reserve = alone.forward(problem.x, params, problem.states, training=True)
        expected = (y, states, alone.backward(problem.dy, problem.dstates, reserve))
    assert thread_pool.ensure_pool(2)
    before = num_pool_jobs()
    with fusedrnn.thread_limits(2):
        op = RNNOp(problem.spec)
        for _ in range(5):
            assert_same_bits(op.forward(problem.x, params, problem.states)[:2], expected[:2])
            y, states, reserve = op.forward(problem.x, params, problem.states, training=True)
            assert_same_bits((y, states, op.backward(problem.dy, problem.dstates, reserve)), expected)
    assert num_pool_jobs() - before == (15 if sharing else 0)


def test_calls_in_torch_follow_the_choice(monkeypatch, worth_sharing):
    torch = pytest.importorskip("torch")
    from fusedrnn.runtime.openmp import OpenMPTeam
    from fusedrnn.torch import LSTM

    runs = []
    for kind in (thread_pool.ThreadTeam, OpenMPTeam):
        plain = kind.run
        monkeypatch.setattr(kind, "run", lambda self, *a, plain=plain: runs.append(1) or plain(self, *a))
    monkeypatch.setattr(ThreadChoice, "note", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # Sizes of their own: an op is kept for a spec, and its plan with it.
        net, x = LSTM(31, 65, bidirectional=True), torch.randn(9, 1, 31)
        results = []
        for sharing in (True, False):
            monkeypatch.setattr(ThreadChoice, "use_several", lambda *_, sharing=sharing: sharing)
            runs.clear()
            y, _ = net(x)
            y.sum().backward()
            results.append((y.detach().numpy(), net.weight_hh_l0.grad.numpy().copy()))
            net.zero_grad()
            assert bool(runs) is sharing
        assert_same_bits(*results)
    finally:
        torch.set_num_threads(before)


def test_calls_are_timed(monkeypatch, worth_sharing):
    notes = []
    monkeypatch.setattr(ThreadChoice, "note", lambda self, *what: notes.append(what))
    problem = make_problem("gru", SHAPE)
    op = RNNOp(problem.spec)
    with fusedrnn.thread_limits(2):
        for _ in range(4):
            op.forward(problem.x, problem.params, problem.states)
    assert len(notes) == 4
    for several, seconds, now, forecast in notes:
        assert several is True
        assert 0 < seconds < now
        assert forecast.several > 0 and forecast.alone > 0
    with fusedrnn.thread_limits(1):
        op.forward(problem.x, problem.params, problem.states)
    assert len(notes) == 4
