"""The threads of torch's own operations. The operator uses them, by torch's setting, to avoid oversubscription."""

from __future__ import annotations

import ctypes
import logging
import os
import time
from functools import lru_cache
from pathlib import Path

import torch

from fusedrnn.runtime.openmp import OpenMP, OpenMPTeam
from fusedrnn.runtime.thread_pool import ThreadTeam, pool_team

_LIBRARIES = "libtorch_cpu.so", "libtorch_cpu.dylib"
# Seconds by which the clocks may differ: two ticks of /proc.
_CLOCK_TOLERANCE = 0.02


def _is_forked() -> bool:
    """Whether this process was forked from a Python process that had loaded torch. On systems other than Linux, False.

    A fork before our import cannot be observed. But torch imports logging, which records the time of its import; in a
    forked child, that time is before the start of the process.
    """
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        start = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - start
    except (OSError, ValueError, IndexError, AttributeError):
        return False
    return logging.makeLogRecord({}).relativeCreated / 1000 > age + _CLOCK_TOLERANCE


# The process that may use OpenMP's threads; None in a fork of a process that may have started some.
_PROCESS = None if _is_forked() else os.getpid()


@lru_cache(maxsize=1)
def _runtime() -> OpenMP | None:
    """The OpenMP library that torch is linked with; None if not found."""
    for name in _LIBRARIES:
        try:
            return OpenMP(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)))
        except (OSError, AttributeError):
            continue
    return None


@lru_cache(maxsize=64)
def _team(threads: int, process: int) -> ThreadTeam:
    # A forked child lacks the threads of the OpenMP runtime, and the runtime does not notice; there we use our own
    # threads.
    runtime = _runtime() if threads > 1 and process == _PROCESS else None
    return pool_team(threads) if runtime is None else OpenMPTeam(threads, runtime)


def team() -> ThreadTeam:
    """A team of as many threads as torch is set to use; torch's own threads if possible."""
    return _team(torch.get_num_threads(), os.getpid())
