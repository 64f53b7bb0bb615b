"""Every environment variable that fusedrnn reads, in one place.

``FUSEDRNN_TARGET``
    Instruction set to compile for: ``avx512``, ``avx512-half``, ``avx2`` or ``generic``. For int8 and bfloat16, the
    first two also with ``-vnni`` or ``-bf16``, ``avx2`` with ``-vnni`` and ``avx512`` with ``-amx``. With ``-emulated``
    behind the name, it need not be one of this processor. Default: the widest that the processor has, but none whose
    product of bfloat16 is slower there than that of float32.
``FUSEDRNN_CACHE_DIR``
    Folder for compiled kernels and the measured rates of the machine; an empty value keeps none on disk. Default:
    ``fusedrnn`` in the user's cache folder, which is that of ``XDG_CACHE_HOME`` on Linux. A folder that another user
    owns or can write to is not used. A folder that cannot be written gives one warning.
``FUSEDRNN_DEBUG``
    0 logs nothing (default), 1 the plan of each new problem, 2 also the time of each phase, 3 also LLVM IR as it is
    compiled, 4 also assembly. The messages go to the logger ``fusedrnn``, and with this variable set to stderr.
``FUSEDRNN_NUM_THREADS``, ``OMP_NUM_THREADS``
    Threads to use until :func:`fusedrnn.set_num_threads` is called; the first variable takes precedence. They are read
    once, when first needed. Default: one thread for each processor that this process may run on, or as many whole
    processors as its control groups (those of a container) give it the time of.
``FUSEDRNN_ONEDNN``
    Path of oneDNN's ``libdnnl.so.3``, for ``backend="onednn"``. Default: the library of the installed package.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path

from fusedrnn.cpu_quota import cpu_quota

MAX_THREADS = 1024


def target() -> str:
    """``FUSEDRNN_TARGET``, or an empty string."""
    return os.environ.get("FUSEDRNN_TARGET", "").strip().lower()


def cache_directory() -> Path | None:
    """The folder for compiled kernels, or None to keep none. A path that cannot be used gives one warning."""
    value = os.environ.get("FUSEDRNN_CACHE_DIR")
    if value is not None:
        if not value.strip():
            return None
        path = _expanded(value)
        if path is None:
            warn_once(
                value,
                f"fusedrnn keeps compiled kernels in memory: FUSEDRNN_CACHE_DIR is {value!r}, and that user has no "
                "home folder. Set it to the path of a folder of your own, or to an empty string.",
            )
        return path
    if sys.platform == "win32":
        base = _absolute("LOCALAPPDATA") or _expanded("~/AppData/Local")
    elif sys.platform == "darwin":
        base = _expanded("~/Library/Caches")
    else:
        base = _absolute("XDG_CACHE_HOME") or _expanded("~/.cache")
    # Some containers have no home folder. A relative path would depend on the current folder of the process.
    return base / "fusedrnn" if base and base.is_absolute() else None


def _absolute(name: str) -> Path | None:
    """A variable's path; None if it is relative, because the XDG Base Directory Specification ignores such paths."""
    path = Path(os.environ.get(name, ""))
    return path if path.is_absolute() else None


def _expanded(path: str) -> Path | None:
    """The path with ``~`` and ``~user`` replaced; None if that user has no home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return None


def onednn() -> Path | None:
    """``FUSEDRNN_ONEDNN`` as an absolute path, or None. A name without a folder is a file in the current folder."""
    value = os.environ.get("FUSEDRNN_ONEDNN", "").strip()
    return (_expanded(value) or Path(value)).absolute() if value else None


def debug() -> int:
    """``FUSEDRNN_DEBUG`` as a level from 0 to 4."""
    value = os.environ.get("FUSEDRNN_DEBUG", "").strip() or "0"
    if value not in ("0", "1", "2", "3", "4"):
        raise ValueError(f"FUSEDRNN_DEBUG must be 0, 1, 2, 3 or 4; got {value!r}")
    if value != "0":
        _log_to_stderr()
    return int(value)


def processors() -> int:
    """The number of processors on which this process may run, or whose time it may use, if that is less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, int(quota)))


def num_threads() -> int:
    """The number of threads to use until the process sets another."""
    own = os.environ.get("FUSEDRNN_NUM_THREADS", "").strip()
    if own:
        if not own.isdecimal() or not 1 <= int(own) <= MAX_THREADS:
            raise ValueError(f"FUSEDRNN_NUM_THREADS must be an integer from 1 to {MAX_THREADS}; got {own!r}")
        return int(own)
    # OpenMP's variable may be a list with one number for each nesting level; the first one counts.
    shared = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(shared), MAX_THREADS) if shared.isdecimal() and int(shared) > 0 else processors()


def warn_once(cause: str, message: str) -> None:
    """Warn of something that only costs time, once in a process for each cause."""
    if cause not in _warned:
        _warned.add(cause)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


_warned: set[str] = set()


class _StderrHandler(logging.Handler):
    """Writes to ``sys.stderr``, which is looked up for each message."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("fusedrnn: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        try:
            sys.stderr.write(f"{self.format(record)}\n")
        except Exception:  # as handlers of the standard library do
            self.handleError(record)


@lru_cache(maxsize=1)
def _log_to_stderr() -> None:
    """Write the messages of the logger ``fusedrnn`` to stderr."""
    logger = logging.getLogger("fusedrnn")
    logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO)
