"""Every environment variable that fusedrnn reads, in one place.

``FUSEDRNN_TARGET``
    Instruction set to generate for: ``avx512``, ``avx512-half``, ``avx2``, ``generic``; each also as
    ``NAME-emulated``.
    Default: the widest that the processor has.
``FUSEDRNN_CACHE_DIR``
    Folder for compiled kernels; empty keeps none on disk. Default: ``fusedrnn`` in the user's cache folder, which
    ``XDG_CACHE_HOME`` names where that is the custom. A folder that another user owns or can write to is not used.
``FUSEDRNN_DEBUG``
    0 nothing (default), 1 the plan of each new problem, 2 also the time of each phase, 3 also LLVM IR as it is
    compiled, 4 also assembly. These are messages of the logger ``fusedrnn``, which the variable has written to stderr.
``FUSEDRNN_NUM_THREADS``, ``OMP_NUM_THREADS``
    Threads to use until :func:`fusedrnn.set_num_threads` says otherwise; the first takes precedence.
    Default: one for each processor this process may run on. Looked at once, when first needed.
``FUSEDRNN_PEERS``
    Folder of the virtual environments that ``make peers`` builds. Default: ``.peers`` beside ``src``.
``FUSEDRNN_ONEDNN``
    Path of oneDNN's ``libdnnl.so.3``, for ``backend="onednn"``. Default: that of the package that is installed.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TextIO

MAX_THREADS = 1024

_PYTHON_PATHS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def target() -> str:
    """``FUSEDRNN_TARGET``, or an empty string."""
    return os.environ.get("FUSEDRNN_TARGET", "").strip().lower()


def cache_directory() -> Path | None:
    """Where compiled kernels are kept, or None to keep none. A path that cannot be used is warned about, once."""
    given = os.environ.get("FUSEDRNN_CACHE_DIR")
    if given is not None:
        if not given.strip():
            return None
        path = _expanded(given)
        if path is None:
            warn_once(
                given,
                f"fusedrnn keeps compiled kernels in memory: FUSEDRNN_CACHE_DIR is {given!r}, and that user has no "
                "home folder. Set it to the path of a folder of your own, or to an empty string.",
            )
        return path
    if sys.platform == "win32":
        base = _absolute("LOCALAPPDATA") or _expanded("~/AppData/Local")
    elif sys.platform == "darwin":
        base = _expanded("~/Library/Caches")
    else:
        base = _absolute("XDG_CACHE_HOME") or _expanded("~/.cache")
    # Without a home folder, as in some containers, or with one that depends on where the process runs, there is none.
    return base / "fusedrnn" if base and base.is_absolute() else None


def _absolute(name: str) -> Path | None:
    """A variable's path; None if it is relative, which the XDG Base Directory Specification says to ignore."""
    path = Path(os.environ.get(name, ""))
    return path if path.is_absolute() else None


def _expanded(given: str) -> Path | None:
    """The path with ``~`` and ``~user`` replaced; None where that user has no home folder."""
    try:
        return Path(given).expanduser()
    except RuntimeError:
        return None


def peers_directory() -> Path:
    """Where the environments of the libraries that benchmarks compare with are, or are to be built.

    Raises:
        ValueError: If the variable begins with the home folder of a user who has none.
    """
    given = os.environ.get("FUSEDRNN_PEERS", "").strip()
    if not given:
        return Path(__file__).resolve().parents[2] / ".peers"
    path = _expanded(given)
    if path is None:
        raise ValueError(f"FUSEDRNN_PEERS must be a folder's path; got {given!r}, and that user has no home folder")
    return path.absolute()


def onednn() -> Path | None:
    """``FUSEDRNN_ONEDNN`` as an absolute path, or None: a bare name is a file here, not a library to be looked up."""
    given = os.environ.get("FUSEDRNN_ONEDNN", "").strip()
    return (_expanded(given) or Path(given)).absolute() if given else None


@contextmanager
def opencl_drivers(path: Path) -> Iterator[None]:
    """While it lasts, OpenCL's loader finds this driver, unless the environment names drivers already."""
    named = "OCL_ICD_FILENAMES", "OCL_ICD_VENDORS"
    if any(name in os.environ for name in named) or not path.is_file():
        yield
        return
    os.environ[named[0]] = str(path)
    try:
        yield
    finally:
        del os.environ[named[0]]


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that runs a Python of its own: this one's, without what would lead it to ours."""
    inherited = {name: value for name, value in os.environ.items() if name not in _PYTHON_PATHS}
    return {**inherited, **changes}


def debug() -> int:
    """``FUSEDRNN_DEBUG`` as a level from 0 to 4."""
    given = os.environ.get("FUSEDRNN_DEBUG", "").strip()
    if not given:
        return 0
    if given not in ("0", "1", "2", "3", "4"):
        raise ValueError(f"FUSEDRNN_DEBUG must be 0, 1, 2, 3 or 4; got {given!r}")
    if given != "0":
        _log_to_stderr()
    return int(given)


def processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """How many threads to start with."""
    own = os.environ.get("FUSEDRNN_NUM_THREADS", "").strip()
    if own:
        if not own.isdecimal() or not 1 <= int(own) <= MAX_THREADS:
            raise ValueError(f"FUSEDRNN_NUM_THREADS must be an integer from 1 to {MAX_THREADS}; got {own!r}")
        return int(own)
    # OpenMP's variable may hold a list, one number for each nesting level: the first is ours.
    shared = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(shared), MAX_THREADS) if shared.isdecimal() and int(shared) > 0 else processors()


def warn_once(cause: str, message: str) -> None:
    """Warn of something that costs time and does no other harm; once in a process for each cause."""
    if cause not in _warned:
        _warned.add(cause)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


_warned: set[str] = set()


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is when a message is logged."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter("fusedrnn: %(message)s"))

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Where messages go."""
        return sys.stderr


@lru_cache(maxsize=1)
def _log_to_stderr() -> None:
    """Have the messages of the logger ``fusedrnn`` written to stderr."""
    logger = logging.getLogger("fusedrnn")
    logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO)
