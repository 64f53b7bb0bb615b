"""What a process inherits from the one that started it, made the same however the tests are started.

A background job of a script ignores SIGINT, and its children ignore it too. Other runners ignore or block other
signals, or set a umask and variables that libraries read. Tests see none of it. ``FUSEDRNN_ONEDNN`` stays: it says
what to test. ``FUSEDRNN_TEST_CACHE_DIR`` stays: it says where compiled kernels are kept from one run to the next. So
does what chooses OpenBLAS's kernels: without it some of its builds compute wrong results on some processors.
"""

import os
import signal

# Python itself ignores the first two; nohup ignores the third, so that tests outlive a terminal.
_LEFT_IGNORED = {getattr(signal, name, None) for name in ("SIGPIPE", "SIGXFSZ", "SIGHUP")}
# By how their names begin: how many threads there are and what they do, what this package is told to do.
_PREFIXES = "FUSEDRNN_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_NUM_THREADS"
# What a terminal is like, as rich and click want to know.
_TERMINAL = (
    "COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
)  # fmt: skip
# What a child that is a Python of its own makes of warnings and assertions.
_PYTHON = "PYTHONWARNINGS", "PYTHONOPTIMIZE"
_KEPT = "FUSEDRNN_ONEDNN", "FUSEDRNN_TEST_CACHE_DIR"
_UMASK = 0o022


def reset() -> None:
    """Give this process and its children the state that a shell gives; before torch, which reads it, is loaded."""
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
