"""Makes what a process inherits from its parent the same, however the tests are started.

A background job of a script ignores SIGINT, and its children ignore it too. Other runners ignore or block other
signals, or set a umask and variables that libraries read. Tests see none of this, with four exceptions:

- ``FUSEDRNN_ONEDNN`` stays: it says what to test.
- ``FUSEDRNN_TEST_CACHE_DIR`` stays: it says where compiled kernels are kept from one run to the next.
- ``FUSEDRNN_TEST_SEED`` and ``FUSEDRNN_TEST_CELLS`` stay: they say which random cells to test, and how many.
- The variable that chooses OpenBLAS's kernels stays: without it, some builds of OpenBLAS compute wrong results on some
  processors.
"""

import os
import signal

# Python itself ignores the first two; nohup ignores the third, so that tests outlive a terminal.
_LEFT_IGNORED = {getattr(signal, name, None) for name in ("SIGPIPE", "SIGXFSZ", "SIGHUP")}
# Variables by how their names begin: how many threads there are and what they do, and this package's settings.
_PREFIXES = "FUSEDRNN_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_NUM_THREADS"
# What rich and click read to know the terminal.
_TERMINAL = (
    "COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
)  # fmt: skip
# How a Python in a child process treats warnings and assertions.
_PYTHON = "PYTHONWARNINGS", "PYTHONOPTIMIZE"
_KEPT = "FUSEDRNN_ONEDNN", "FUSEDRNN_TEST_CACHE_DIR", "FUSEDRNN_TEST_SEED", "FUSEDRNN_TEST_CELLS"
_UMASK = 0o022


def reset() -> None:
    """Give this process and its children the state that a shell gives; call it before loading torch, which reads it."""
    _reset_signals()
    os.umask(_UMASK)
    for name in list(os.environ):
        if name not in _KEPT and (name.startswith(_PREFIXES) or name in _TERMINAL + _PYTHON):
            del os.environ[name]


def _reset_signals() -> None:
    for which in signal.valid_signals():
        if signal.getsignal(which) == signal.SIG_IGN and which not in _LEFT_IGNORED:
            signal.signal(which, signal.default_int_handler if which == signal.SIGINT else signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
