"""The threads that torch's own operations run on: its OpenMP runtime's.

They wait for work, awake, for some milliseconds after each operation. A gang of our own beside them would have to share
the processors with them, and take turns.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch

from fusedrnn.codegen.member import TEAM
from fusedrnn.engine import machine
from fusedrnn.engine.threads import Team, own_team

_LIBRARIES = "libtorch_cpu.so", "libtorch_cpu.dylib"
_PROCESS = os.getpid()


class OpenMPTeam(Team):
    """The caller's thread and those of its OpenMP team."""

    def __init__(self, threads: int, parallel: ctypes._FuncPointer, addresses: tuple[int, int]) -> None:
        super().__init__(threads)
        self._parallel, self._addresses = parallel, addresses
        self._member = machine.member()

    def run(self, job: machine.Job, call: int, members: int) -> bool:
        """Run a job on them; False if the runtime grants fewer."""
        team = (ctypes.c_int64 * len(TEAM.names))(machine.address(job), call, members, *self._addresses, 0)
        self._parallel(self._member, ctypes.addressof(team), members, 0)
        return not team[TEAM.index["failed"]]


@lru_cache(maxsize=1)
def _runtime() -> tuple[ctypes._FuncPointer, tuple[int, int]] | None:
    """GNU's entry to a parallel region, which other runtimes have too; and who tells of its threads."""
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            parallel, *told = (getattr(library, f) for f in ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num"))
        except (OSError, AttributeError):
            continue
        parallel.restype = None
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        one, other = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in told)
        return parallel, (one, other)
    return None


@lru_cache(maxsize=64)
def _team(threads: int) -> Team:
    runtime = _runtime() if threads > 1 and os.getpid() == _PROCESS else None
    return own_team(threads) if runtime is None else OpenMPTeam(threads, *runtime)


def team() -> Team:
    """As many threads as torch is set to use: its own, if its runtime can be found and this process was not forked."""
    return _team(torch.get_num_threads())


# The runtime's threads do not exist in a forked child, and it does not know: there a gang of our own must do.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_team.cache_clear)
