"""A call enters few files before its first multiply-add, so that a reader can follow it."""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec

PACKAGE = f"{Path(fusedrnn.__file__).parent}/"
MOST_FILES = 15
SPEC = RNNSpec("lstm", 8, 16, num_layers=2)


def entered_files(call):
    """The package's files, with the functions, that a call enters before machine code runs its job."""
    files, job_runs = defaultdict(set), []

    def profile(frame, event, argument):
        code = frame.f_code
        if code is run_job.__code__ or (event == "c_call" and argument.__name__ == "call_if_guards_hold"):
            job_runs.append(True)
        elif event == "call" and not job_runs and code.co_filename.startswith(PACKAGE):
            files[code.co_filename.removeprefix(PACKAGE)].add(code.co_name)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert job_runs
    return files


def run_job(job, *arguments):
    """Marks the moment when the executor runs a job."""
    return job(*arguments)


@pytest.fixture(params=["inference", "training", "backward"])
def kind(request):
    return request.param


@pytest.fixture(params=[1, 20], ids=["unpacked", "packed"])
def call(request, kind):
    """An op that has been compiled, the name of its job, and a call of that kind."""
    op = RNNOp(SPEC).compile(training=True)
    op.compile()
    x, params = np.ones((request.param, 2, 8), np.float32), np.ones(SPEC.layout.size, np.float32)
    if kind != "backward":
        training = kind == "training"
        return op, "training" if training else "forward", lambda: op.forward(x, params, training=training)
    y, _, reserve = op.forward(x, params, training=True)
    return op, kind, lambda: op.backward(y, None, reserve)


def check(files):
    assert "op/rnn_op.py" in files
    listing = "\n".join(f"{name}: {', '.join(sorted(functions))}" for name, functions in files.items())
    assert len(files) <= MOST_FILES, f"{len(files)} files\n{listing}"


def test_first_call(call, monkeypatch):
    """A call of a new size: checked, planned, run."""
    op, name, run = call
    executor = op.by_address()
    job = executor.job(name)
    monkeypatch.setitem(executor._jobs, name, lambda *arguments: run_job(job, *arguments))
    with fusedrnn.thread_limits(1):
        check(entered_files(run))


def test_repeated_checked_call(call, monkeypatch):
    """A call of a size that has been planned, which is checked because its arguments differ from a cached call's."""
    op, name, run = call
    executor = op.by_address()
    with fusedrnn.thread_limits(1):
        run()
        job = executor.job(name)
        monkeypatch.setitem(executor._jobs, name, lambda *arguments: run_job(job, *arguments))
        monkeypatch.setattr(type(op._call_cache), "_is_repeated", lambda *_: False)
        check(entered_files(run))


def test_cached_call(call):
    """A call that repeats two others."""
    *_, run = call
    with fusedrnn.thread_limits(1):
        run()
        run()
        check(entered_files(run))
