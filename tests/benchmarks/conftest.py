"""Fixtures of the tests of comparisons."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import timed_rows
from benchmarks.peers import process, processes
from benchmarks.peers.environments import Environment, Peer
from fake_workers import DEAD, FAILING, MORTAL, RIGHT, ROUNDING, SLOW, WRONG
from fusedrnn.bench import peaks
from fusedrnn.runtime.peak import PeakSample


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """Replaces the real workers by these, each a peer that is built, and one peer that is not."""
    folder = tmp_path / "workers"
    folder.mkdir()
    shutil.copy(process.WORKERS / "protocol.py", folder)
    sources = {"right": RIGHT, "wrong": WRONG, "dead": DEAD, "slow": SLOW, "failing": FAILING, "mortal": MORTAL}
    built = SimpleNamespace(python=Path(sys.executable), is_built=lambda: True)
    for name, source in sources.items():
        (folder / f"with_{name}.py").write_text(source)
    peers = {name: Peer(name, built, f"with_{name}") for name in sources}
    (folder / "with_rounding.py").write_text(ROUNDING)
    peers["rounding"] = Peer("rounding", built, "with_rounding", ("float32", "bfloat16"), "has no int8")
    peers["absent"] = Peer("absent", Environment("absent", ("absent==1",)), "with_absent")
    monkeypatch.setattr(process, "WORKERS", folder)
    monkeypatch.setattr(processes, "PEERS", peers)
    monkeypatch.setattr(peaks, "instruction_of", lambda number_format, target: number_format)
    _know_peak(monkeypatch)
    monkeypatch.setenv("FUSEDRNN_PEERS", str(tmp_path / "peers"))
    return peers


@pytest.fixture
def peak(monkeypatch):
    """The peak of a machine that is never disturbed; turns are as short as possible."""
    _know_peak(monkeypatch)
    for name in ("SPIN_PAUSE", "LONG_SAMPLE_SECONDS"):
        monkeypatch.setattr(timed_rows, name, 0.0)
    return peaks.RunPeak("float32", 1)


def _know_peak(monkeypatch):
    monkeypatch.setattr(peaks, "measure_peak", lambda dtype, threads: 100.0)
    monkeypatch.setattr(peaks, "sample_peak", lambda dtype, threads: PeakSample(100.0, True))
