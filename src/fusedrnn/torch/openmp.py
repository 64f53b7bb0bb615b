"""The threads that torch's own operations run on, so that its setting is ours and nobody waits for a processor."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch

from fusedrnn.engine.foreign import OpenMP, OpenMPTeam
from fusedrnn.engine.threads import Team, own_team

_LIBRARIES = "libtorch_cpu.so", "libtorch_cpu.dylib"
_PROCESS = os.getpid()


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
def _team(threads: int, process: int) -> Team:
    # The runtime's threads do not exist in a forked child, and it does not know: there a gang of our own must do.
    runtime = _runtime() if threads > 1 and process == _PROCESS else None
    return own_team(threads) if runtime is None else OpenMPTeam(threads, runtime)


def team() -> Team:
    """As many threads as torch is set to use, its own if that can be."""
    return _team(torch.get_num_threads(), os.getpid())
