"""What the operating system allows a process: open files, and processors."""

from __future__ import annotations

import os

_OTHER_FILES = 32
"""The number of files that a process has open in addition to its connections."""


def allow_connections(count: int) -> None:
    """Raise the process's limit on open files, as far as the process may, so that it can have ``count`` connections.

    Raises:
        ValueError: If the system allows fewer.
    """
    try:
        import resource
    except ModuleNotFoundError:  # on Windows, which has no such limit
        return
    needed = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ValueError(
                f"{count} connections need {needed} open files, and this system allows {hard} (`ulimit -Hn`): "
                "ask for fewer streams"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def processors() -> list[int]:
    """The processors on which this process may run; empty if the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def run_on(processor: int) -> None:
    """Run this process, with all threads that it starts, on one processor.

    Raises:
        ValueError: If the process may not run there, or the system does not support this.
    """
    if processor not in processors():
        allowed = ", ".join(map(str, processors())) or "that this system lets a process choose"
        raise ValueError(f"--processor must be one of {allowed}; got {processor}")
    os.sched_setaffinity(0, {processor})
