"""A team of threads that another runtime keeps: OpenMP's, in a process where others use it too.

Its threads wait for work, awake, for some milliseconds after each job. A pool of our own beside them would have to
share the processors with them, and take turns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import Job, address, function, load, load_once
from fusedrnn.runtime.openmp_kernel import TEAM, build_member
from fusedrnn.runtime.thread_pool import ThreadTeam


class OpenMP:
    """An OpenMP runtime's entry to parallel regions, under the names of GNU's, which others have too.

    Args:
        library: What has the functions, or was linked with what has.

    Raises:
        AttributeError: If it does not have them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.parallel: Any = library.GOMP_parallel
        self.parallel.restype = None
        self.parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        told = library.omp_get_num_threads, library.omp_get_thread_num
        self.told = tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in told)


class OpenMPTeam(ThreadTeam):
    """The caller's thread and those that the runtime lends it."""

    def __init__(self, threads: int, runtime: OpenMP) -> None:
        super().__init__(threads)
        self._runtime = runtime
        self._member = _load_member()

    def run(self, job: Job, call: int, members: int) -> bool:
        """Run ``job(call, member)`` for every member, wait for all; False if the runtime grants fewer threads."""
        team = (ctypes.c_int64 * len(TEAM))(address(job), call, members, *self._runtime.told, 0)
        self._runtime.parallel(self._member, ctypes.addressof(team), members, 0)
        return not team[TEAM.index["failed"]]


@load_once()
def _load_member() -> Callable[..., None]:
    """What every thread of a team calls."""
    return function(load("member", current_target(), build_member), "member", 1)
