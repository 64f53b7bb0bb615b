"""The threads that torch's own operations run on, so that its setting is ours and nobody waits for a processor."""

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
_TICKS = 0.02


def _is_forked() -> bool:
    """Whether this process was forked off a Python that had loaded torch; Linux only, elsewhere False.

    No hook of ours saw a fork before our import, but the module logging, which torch loads, knows when it was loaded
    itself: in a forked child that was before the process began.
    """
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return False
    return logging.makeLogRecord({}).relativeCreated / 1000 > age + _TICKS


# The process whose OpenMP threads are its own; none in a child forked off one that may have started some.
_PROCESS = None if _is_forked() else os.getpid()


@lru_cache(maxsize=1)
def _runtime() -> OpenMP | None:
    """What torch was linked with; None if it is not to be found."""
    for name in _LIBRARIES:
        try:
            return OpenMP(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)))
        except (OSError, AttributeError):
            continue
    return None


@lru_cache(maxsize=64)
def _team(threads: int, process: int) -> ThreadTeam:
    # The runtime's threads do not exist in a forked child, and it does not know: there threads of our own must do.
    runtime = _runtime() if threads > 1 and process == _PROCESS else None
    return pool_team(threads) if runtime is None else OpenMPTeam(threads, runtime)


def team() -> ThreadTeam:
    """As many threads as torch is set to use, its own if that can be."""
    return _team(torch.get_num_threads(), os.getpid())
