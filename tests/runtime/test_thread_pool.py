"""How many threads, calls at once, forks, spawned processes, the end of the process, sleep."""

import contextvars
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fusedrnn
from forks import FORK_WARNING, FORKS, busy_threads, in_child
from fusedrnn import RNNOp
from fusedrnn.engines.cpu.launch import kernel_args
from fusedrnn.runtime import thread_pool
from fusedrnn.runtime.pool_kernel import CONTROL
from problems import Shape, assert_same_bits, make_problem

pytestmark = pytest.mark.usefixtures("use_all_threads")

SHAPE = Shape(7, 29, 17, 33, layers=2, bidirectional=True, lengths="edges")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What set_num_threads sets ends with the test."""
    monkeypatch.setattr(thread_pool, "_num_threads", None)


def call(problem, op=None):
    return (op or RNNOp(problem.spec)).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)[:2]


def test_default_is_the_affinity_mask_of_the_first_call():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity masks here")
    mask = os.sched_getaffinity(0)
    thread_pool._default.cache_clear()
    os.sched_setaffinity(0, {min(mask)})
    try:
        assert fusedrnn.get_num_threads() == 1
        os.sched_setaffinity(0, mask)
        assert fusedrnn.get_num_threads() == 1
    finally:
        os.sched_setaffinity(0, mask)
        thread_pool._default.cache_clear()
    assert fusedrnn.get_num_threads() == len(mask)


def test_thread_limits_override_set_num_threads():
    fusedrnn.set_num_threads(5)
    assert fusedrnn.get_num_threads() == 5
    with fusedrnn.thread_limits(3):
        assert fusedrnn.get_num_threads() == 3
        with fusedrnn.thread_limits(7):
            assert fusedrnn.get_num_threads() == 7
        fusedrnn.set_num_threads(4)
        assert fusedrnn.get_num_threads() == 3
    assert fusedrnn.get_num_threads() == 4
    with pytest.raises(KeyError), fusedrnn.thread_limits(2):
        raise KeyError
    assert fusedrnn.get_num_threads() == 4


def test_thread_limits_apply_to_one_thread():
    fusedrnn.set_num_threads(5)
    with fusedrnn.thread_limits(3), ThreadPoolExecutor(1) as pool:
        assert pool.submit(fusedrnn.get_num_threads).result() == 5
        inherited = contextvars.copy_context()
        assert pool.submit(inherited.run, fusedrnn.get_num_threads).result() == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that says where threads run")
def test_threads_that_share_a_processor_spread_out():
    """The system may wake both where one was; it would part them only milliseconds later."""
    ours = os.sched_getaffinity(0)
    if len(ours) < 2:
        pytest.skip("needs two processors")
    problem = make_problem("lstm", SHAPE)
    with fusedrnn.thread_limits(2):
        call(problem)
        (worker,) = [thread.native_id for thread in thread_pool._pool._threads]
        cpus = thread_pool._pool._cpu_of_thread
        try:
            here = min(ours)
            os.sched_setaffinity(0, {here})
            os.sched_setaffinity(worker, {here})
            together = call(problem)
            assert list(cpus) == [here, here]
            os.sched_setaffinity(worker, ours)
            apart = call(problem)
            assert cpus[0] == here != cpus[1]
            assert os.sched_getaffinity(worker) == ours
            assert_same_bits(apart, together)
        finally:
            for thread in (0, worker):
                os.sched_setaffinity(thread, ours)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_pool_has_the_requested_threads(count):
    """The count that is asked for, above the number of cores as well; and the right bits."""
    problem = make_problem("lstm", SHAPE)
    with fusedrnn.thread_limits(1):
        alone = call(problem)
    with fusedrnn.thread_limits(count):
        for _ in range(3):
            assert_same_bits(call(problem), alone)
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("fusedrnn-")]
    assert sorted(names) == sorted(f"fusedrnn-{tid}" for tid in range(1, count))


def test_changing_numbers_of_threads():
    problem = make_problem("gru", SHAPE)
    op = RNNOp(problem.spec)
    expected = call(problem)
    for count in (1, 4, 2, 2, 3, 1, 2):
        with fusedrnn.thread_limits(count):
            assert_same_bits(call(problem, op), expected)


def test_concurrent_calls():
    """Threads that share one op, each with data of its own, get what each gets alone; so do those with other ops."""
    problems = [make_problem(mode, SHAPE, seed=seed) for mode in ("lstm", "gru") for seed in range(4)]
    ops = {problem.spec: RNNOp(problem.spec) for problem in problems}
    expected = [call(problem) for problem in problems]
    start = threading.Barrier(len(problems))

    def work(number):
        start.wait()
        for _ in range(20):
            assert_same_bits(call(problems[number], ops[problems[number].spec]), expected[number])

    fusedrnn.set_num_threads(2)
    with ThreadPoolExecutor(len(problems)) as pool:
        for future in [pool.submit(work, number) for number in range(len(problems))]:
            future.result()


@FORKS
@FORK_WARNING
def test_fork_after_use():
    """A child has no pool, and makes its own; the parent keeps the one it has."""
    problem = make_problem("lstm", SHAPE)
    op = RNNOp(problem.spec)
    fusedrnn.set_num_threads(2)
    expected = call(problem, op)[0].tobytes()
    for _ in range(3):
        assert in_child(lambda: call(problem, op)[0].tobytes()) == expected
        assert in_child(lambda: call(problem)[0].tobytes()) == expected
        assert call(problem, op)[0].tobytes() == expected


@FORKS
@FORK_WARNING
def test_fork_during_calls():
    """A child forked while other threads are inside the op finds no lock held by a thread it does not have."""
    problem = make_problem("gru", SHAPE)
    op = RNNOp(problem.spec)
    fusedrnn.set_num_threads(2)
    expected = call(problem, op)[0].tobytes()
    with busy_threads(lambda: call(problem, op)):
        for _ in range(10):
            assert in_child(lambda: call(problem, op)[0].tobytes()) == expected


def call_in_process(problem):
    return call(problem)[0]


@FORK_WARNING
@pytest.mark.parametrize("method", [pytest.param("fork", marks=FORKS), "spawn"])
def test_calls_in_other_processes(method):
    problem = make_problem("rnn_tanh", SHAPE)
    fusedrnn.set_num_threads(2)
    expected = call(problem)[0]
    with multiprocessing.get_context(method).Pool(2) as pool:
        for result in pool.map(call_in_process, [problem] * 3):
            np.testing.assert_array_equal(result, expected)


USE_THE_POOL = """
import numpy as np, fusedrnn
fusedrnn.set_num_threads(3)
spec = fusedrnn.RNNSpec("gru", 64, 64, bidirectional=True)
x, params = np.ones((20, 40, 64), np.float32), np.zeros(spec.layout.size, np.float32)
op = fusedrnn.RNNOp(spec)
op.forward(x, params)
import threading
assert sum(thread.name.startswith("fusedrnn-") for thread in threading.enumerate()) == 2
"""
ENDS = {
    "plainly": "",
    "in a thread's time": "threading.Thread(target=op.forward, args=(x, params)).start()",
    "with calls in daemons": (
        "def work():\n"
        "    while True: op.forward(x, params)\n"
        "for _ in range(2): threading.Thread(target=work, daemon=True).start()"
    ),
    "by sys.exit": "import sys; sys.exit(0)",
    "after a fork": "import os; child = os.fork(); op.forward(x, params); child and os.waitpid(child, 0)",
}


@pytest.mark.parametrize("end", ENDS)
def test_interpreter_ends(end):
    """With an idle pool, or one at work, a process ends by itself, with no word and no error."""
    if "fork" in end and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    # Python 3.12 and newer warn of a fork beside threads.
    program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", USE_THE_POOL + ENDS[end]]
    for _ in range(3):
        result = subprocess.run(program, capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_idle_threads_sleep():
    """A pool without work uses no processor: in a second far less than the one its threads would spin away."""
    fusedrnn.set_num_threads(3)
    problem = make_problem("lstm", SHAPE)
    call(problem)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.2


def test_failed_call_leaves_the_pool_free():
    """A call that fails before its job does not keep the pool."""
    problem = make_problem("lstm", SHAPE)
    op = RNNOp(problem.spec)
    fusedrnn.set_num_threads(2)
    expected = call(problem, op)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_args.KernelArgs, "bind", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(problem, op)
    assert thread_pool.ensure_pool(2)
    assert_same_bits(call(problem, op), expected)


def test_incomplete_pool_leaves_no_thread(monkeypatch):
    """A pool that cannot be complete leaves no thread behind: its threads would wait on memory that is freed."""
    problem = make_problem("lstm", SHAPE)
    expected = call(problem)
    plain, started = threading.Thread.start, []

    def start(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        plain(thread)

    with fusedrnn.thread_limits(7):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.warns(RuntimeWarning, match="7 threads cannot be started .*can't start new thread"):
                assert_same_bits(call(problem), expected)
        for thread in started:
            thread.join(10)
        assert [thread.is_alive() for thread in started] == [False, False]
        assert_same_bits(call(problem), expected)


def interrupt_at(monkeypatch, owner, name):
    """The next call of that method is interrupted, as by Ctrl-C, once it has been made."""
    plain = getattr(owner, name)

    def interrupted(self, *args):
        monkeypatch.setattr(owner, name, plain)
        plain(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("name", ["join", "start"])
def test_interrupt_during_a_change_of_the_pool(monkeypatch, name):
    """Later calls, with any number of threads, neither hang nor meet threads of the pool that was interrupted."""
    problem = make_problem("lstm", SHAPE)
    op = RNNOp(problem.spec)
    expected = call(problem, op)
    with fusedrnn.thread_limits(2):
        call(problem, op)
    interrupt_at(monkeypatch, threading.Thread, name)
    with fusedrnn.thread_limits(3), pytest.raises(KeyboardInterrupt):
        call(problem, op)
    for count in (2, 3, 4, 2):
        with fusedrnn.thread_limits(count):
            assert_same_bits(call(problem, op), expected)


@pytest.mark.parametrize("owner, name", [(thread_pool.ThreadTeam, "run"), (threading.Thread, "start")])
def test_nested_call(monkeypatch, owner, name):
    """What a signal's handler may do before the job of the call that it interrupts, and while that makes the pool."""
    problem = make_problem("gru", SHAPE)
    op, inner = RNNOp(problem.spec), RNNOp(problem.spec)
    expected = call(problem, op)
    plain, nested = getattr(owner, name), []

    def interrupted(self, *args):
        if not nested:
            nested.append(True)
            with fusedrnn.thread_limits(3):
                assert_same_bits(call(problem, inner), expected)
        return plain(self, *args)

    with fusedrnn.thread_limits(4):
        call(problem, op)
    monkeypatch.setattr(owner, name, interrupted)
    with fusedrnn.thread_limits(2):
        for _ in range(3):
            assert_same_bits(call(problem, op), expected)
    assert nested


def test_busy_pool_is_not_replaced():
    """A call with another number of threads does not wait for the job of another thread."""
    control = CONTROL.index["busy"]
    assert thread_pool.ensure_pool(2)
    pool = thread_pool._pool
    pool._control[control] = 1
    try:
        assert not thread_pool.ensure_pool(3)
        assert thread_pool._pool is pool
    finally:
        pool._control[control] = 0
    assert thread_pool.ensure_pool(3)
    assert thread_pool._pool is not pool


@FORKS
@FORK_WARNING
def test_fork_during_compilation_and_changes_of_the_pool():
    """No fork while a thread is inside the compiler's library, whose lock the child could not open."""
    problem = make_problem("gru", SHAPE)
    fusedrnn.set_num_threads(2)
    expected = call(problem)[0].tobytes()
    stop = threading.Event()

    def make():
        while not stop.is_set():
            call(problem)

    def change():
        for count in (2, 3) * 1000:
            fusedrnn.set_num_threads(count)
            call(problem)
            if stop.is_set():
                return

    others = [threading.Thread(target=work) for work in (make, change)]
    for thread in others:
        thread.start()
    try:
        for _ in range(20):
            assert in_child(lambda: call(problem)[0].tobytes()) == expected
    finally:
        stop.set()
        for thread in others:
            thread.join()


def test_when_threads_count_as_spinning():
    """For a while after work of theirs; or where calls come so soon after one another that waking them will pay."""
    now = 10.0
    team = thread_pool.ThreadTeam(2)
    assert not team.note_call_start(now)
    team.note_call_end(2, now)
    now += thread_pool.SPINNING / 2
    assert team.note_call_start(now)
    now += thread_pool.SPINNING
    assert not team.note_call_start(now)
    team.note_call_end(1, now)
    for number in range(1, 6):
        now += thread_pool.CLOSE / 2
        assert team.note_call_start(now) == (number >= thread_pool.MANY_CLOSE)
        team.note_call_end(1, now)
    now += 2 * thread_pool.CLOSE
    assert not team.note_call_start(now)
