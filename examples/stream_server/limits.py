"""What the operating system allows a process: open files, and processors."""

from __future__ import annotations

import os

_OTHER_FILES = 32
"""Files that a process has open beside its connections."""


def allow_connections(count: int) -> None:
    """Raise the process's limit on open files, as far as it may itself, so that it can have so many connections.

    Raises:
        ValueError: If the system allows fewer.
    """
    try:
        import resource
    except ModuleNotFoundError:  # Windows, which has no such limit
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
    """The processors that this process may run on; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def run_on(processor: int) -> None:
    """Run this process, with all threads that it starts, on one processor.

    Raises:
        ValueError: If it may not run there, or the system offers no choice.
    """
    if processor not in processors():
        allowed = ", ".join(map(str, processors())) or "that this system lets a process choose"
        raise ValueError(f"--processor must be one of {allowed}; got {processor}")
    os.sched_setaffinity(0, {processor})
