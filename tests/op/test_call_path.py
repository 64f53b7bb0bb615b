"""A call enters few files before its first multiply-add, so that a reader can follow it."""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec
from fusedrnn.engines.cpu.executor import PlannedCall
from fusedrnn.op import rnn_op

PACKAGE = f"{Path(fusedrnn.__file__).parent}/"
MAX_FILES = 15
MAX_PLANNING_FILES = 11
NOT_COUNTED = f"{PACKAGE}lazy.py"  # a decorator, as functools has them
SPEC = RNNSpec("lstm", 8, 16, num_layers=2)


def entered_files(call):
    """The package's files, with the functions, that a call enters before machine code runs its job.

    Planning a new size is a step of its own: the further files that it enters come second.
    """
    in_call, in_planning = defaultdict(set), defaultdict(set)
    files, job_runs = in_call, []

    def profile(frame, event, argument):
        nonlocal files
        code = frame.f_code
        if code is run_job.__code__ or (event == "c_call" and argument.__name__ == "call_if_guards_hold"):
            job_runs.append(True)
        elif event == "return" and code is PlannedCall._plan.__code__:
            files = in_call
        elif event == "call" and not job_runs and _is_counted(code.co_filename):
            files[code.co_filename.removeprefix(PACKAGE)].add(code.co_name)
            if code is PlannedCall._plan.__code__:
                files = in_planning

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert job_runs
    return in_call, {name: functions for name, functions in in_planning.items() if name not in in_call}


def _is_counted(filename):
    return filename.startswith(PACKAGE) and filename != NOT_COUNTED


def run_job(job, *arguments):
    """Marks the moment when the executor runs a job."""
    return job(*arguments)


@pytest.fixture(scope="module", autouse=True)
def warm_process():
    """What is loaded and cached once in a process, whatever the network, has been."""
    op = RNNOp(SPEC)
    x, params = np.ones((2, 2, 8), np.float32), np.ones(SPEC.layout.size, np.float32)
    y, _, reserve = op.forward(x, params, training=True)
    op.backward(y, None, reserve)
    op.forward(x, params)


@pytest.fixture(params=["inference", "training", "backward"])
def kind(request):
    return request.param


@pytest.fixture(params=[1, 20], ids=["unpacked", "packed"])
def call(request, kind):
    """An op that has been compiled, the name of its job, and a call of that kind."""
    op = RNNOp(SPEC).compile(training=True)
    x, params = np.ones((request.param, 2, 8), np.float32), np.ones(SPEC.layout.size, np.float32)
    if kind != "backward":
        training = kind == "training"
        return op, kind, lambda: op.forward(x, params, training=training)
    y, _, reserve = op.forward(x, params, training=True)
    return op, kind, lambda: op.backward(y, None, reserve)


def check(run):
    in_call, in_planning = entered_files(run)
    for files, max_files in ((in_call, MAX_FILES), (in_planning, MAX_PLANNING_FILES)):
        listing = "\n".join(f"{name}: {', '.join(sorted(functions))}" for name, functions in files.items())
        assert len(files) <= max_files, f"{len(files)} files\n{listing}"
    return in_planning


def test_first_call(call, monkeypatch):
    """A call of a new size: checked, planned, run."""
    op, name, run = call
    executor = op.by_address()
    job = executor.job(name, executor.target)
    monkeypatch.setitem(executor._jobs, (name, True), lambda *arguments: run_job(job, *arguments))
    with fusedrnn.thread_limits(1):
        assert check(run)


def test_repeated_checked_call(call, monkeypatch):
    """A call of a size that has been planned, and that no cached call accepts."""
    op, name, run = call
    executor = op.by_address()
    with fusedrnn.thread_limits(1):
        run()
        planned, job = executor._planned[name], executor.job(name, executor.target)
        monkeypatch.setattr(planned, "job", lambda *arguments: run_job(job, *arguments))
        monkeypatch.setattr(type(op._call_cache), "_is_repeated", lambda *_: False)
        assert not check(run)


def test_cached_call(call):
    """A call that repeats two others."""
    *_, run = call
    with fusedrnn.thread_limits(1):
        run()
        run()
        assert not check(run)


def test_the_default_of_reserve_is_compared_by_identity():
    """The signature shows the literal, and the call path compares with a constant: Python must have one of them."""
    assert RNNOp.forward.__kwdefaults__["reserve"] is rnn_op._GATES
