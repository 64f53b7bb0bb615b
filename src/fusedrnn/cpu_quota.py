"""The limit that Linux control groups put on the processor time of this process, as containers have one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_MOUNT, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpu_quota() -> float | None:
    """How many processors' time the process may use per second; None without a limit."""
    quotas: list[float] = []
    for folder in _folders():
        with suppress(OSError, ValueError, ZeroDivisionError):  # no such file in this version, or no limit: "max"
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            quotas.append(int(quota) / int(period))
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
            quotas.append(int(quota) / int(period))
    return min((quota for quota in quotas if quota > 0), default=None)  # version 1 has -1 for no limit


def _folders() -> Iterator[Path]:
    """The folders of the control groups of this process, each with those that contain it.

    In a container the mount shows its own group as the root, and a path may be that of the host.
    """
    with suppress(OSError):
        for line in _MEMBERSHIP.read_text(encoding="utf-8").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, group = rest.partition(":")
            if not controllers:  # version 2
                mounts = [_MOUNT, _MOUNT / "unified"]
            elif "cpu" in controllers.split(","):
                mounts = [_MOUNT / controllers, _MOUNT / "cpu"]
            else:
                continue
            for mount in mounts:
                folder = mount / group.lstrip("/")
                yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(mount))
