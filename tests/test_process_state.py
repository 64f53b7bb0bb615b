"""The tests run alike however they are started: what a process inherits is as from a terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing of this is inherited there")

# What a runner may do before it starts the tests: a background job of a script ignores SIGINT.
START = """
import os, signal, sys
for name in ("SIGINT", "SIGTERM", "SIGCHLD", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_IGN if name in sys.argv[1] else signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGALRM})
os.umask(0o777)
os.environ.update({"OMP_NUM_THREADS": "1", "FUSEDRNN_TARGET": "generic", "COLUMNS": "10"})
os.environ.update({"FUSEDRNN_ONEDNN": "kept", "FUSEDRNN_TEST_CACHE_DIR": "kept"})
os.environ.update({"FUSEDRNN_TEST_SEED": "kept", "FUSEDRNN_TEST_CELLS": "kept"})
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[2:]])
"""
TESTS = """
import subprocess, sys
import process_state
process_state.reset()
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""
CHILD = """
import os, signal
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print(*(signal.getsignal(getattr(signal, name)).name for name in ("SIGTERM", "SIGCHLD", "SIGHUP")))
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), oct(os.umask(0)))
print(*sorted(name for name in os.environ if name in ("OMP_NUM_THREADS", "COLUMNS") or name.startswith("FUSEDRNN_")))
"""


@pytest.mark.parametrize(
    ("ignored", "hangup"), [("SIGINT SIGTERM SIGCHLD SIGHUP", "SIG_IGN"), ("SIGINT", "SIG_DFL")]
)
def test_state_that_child_processes_inherit(ignored, hangup):
    """The signals' defaults, but for that which nohup ignores; no blocked signal, the usual umask, no settings."""
    search = os.pathsep.join((str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", START, ignored, TESTS, CHILD],
        env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = "FUSEDRNN_ONEDNN FUSEDRNN_TEST_CACHE_DIR FUSEDRNN_TEST_CELLS FUSEDRNN_TEST_SEED"
    assert done.stdout.splitlines() == ["True", f"SIG_DFL SIG_DFL {hangup}", "set() 0o22", names]
