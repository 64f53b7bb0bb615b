"""The limits of control groups, of both versions, in a container and outside of one."""

import os

import pytest

from fusedrnn import cpu_quota, env

TREES = {
    "version 2, in a container": ("0::/", {"cpu.max": "250000 100000"}, 2.5),
    "version 2, a path of the host": ("0::/kubepods/pod1", {"cpu.max": "150000 100000"}, 1.5),
    "version 2, the group's and its parent's": (
        "0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "400000 100000"}, 1.0,
    ),
    "version 2, no limit": ("0::/a", {"a/cpu.max": "max 100000"}, None),
    "version 1": (
        "4:memory:/x\n3:cpu,cpuacct:/docker/1\n0::/",
        {"cpu,cpuacct/docker/1/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n"}, 0.5,
    ),
    "version 1, no limit": ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "damaged": ("0::/", {"cpu.max": "many\n"}, None),
    "none": ("", {}, None),
}  # fmt: skip


@pytest.mark.parametrize("membership, files, expected", TREES.values(), ids=TREES)
def test_quota(membership, files, expected, tmp_path, monkeypatch):
    for name, content in files.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (tmp_path / "membership").write_text(membership)
    monkeypatch.setattr(cpu_quota, "_MOUNT", tmp_path / "mount")
    monkeypatch.setattr(cpu_quota, "_MEMBERSHIP", tmp_path / "membership")
    assert cpu_quota.cpu_quota() == expected


@pytest.mark.parametrize("quota, expected", [(None, 8), (3.9, 3), (0.5, 1), (100.0, 8)])
def test_processors(quota, expected, monkeypatch):
    """A fraction of a processor is no thread: all wait at each barrier for the one that has no time left."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(env, "cpu_quota", lambda: quota)
    assert env.processors() == expected


def test_no_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_quota, "_MEMBERSHIP", tmp_path / "absent")
    assert cpu_quota.cpu_quota() is None
