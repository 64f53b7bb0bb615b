"""Peers: processes that answer or fail in words, and the environments that they run in."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers import environments, process
from benchmarks.peers.environments import PEERS, Environment, Peer, child_environment, peers_directory
from benchmarks.peers.exchange import read_results, write_workload
from benchmarks.peers.process import PeerError, PeerProcess
from fake_workers import SMALL
from fusedrnn.bench import contenders
from fusedrnn.bench.data import workload

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def worker(workers):
    with PeerProcess(Path(sys.executable), "with_right", {}) as peer:
        yield peer


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def load_command(folder: Path, phase: str = "inference"):
    work = workload(SMALL, "rnn_tanh", "float32")
    fields = write_workload(work, work.batch(SMALL.T), folder, training=phase == "training", threads=1)
    return work, fields


def test_a_worker_computes_and_times(worker, tmp_path):
    work, fields = load_command(tmp_path)
    answer = worker.load(fields, 60)
    assert answer["facts"] == {"fake": "1.0"} and answer["warm" if "warm" in answer else "seconds"] > 0
    ours = contenders.fused(work)(work.batch(SMALL.T))()
    results = read_results(work, tmp_path)
    assert results.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(results[name], array, rtol=1e-5, atol=1e-6)
    seconds = worker.time(4, 60)
    assert len(seconds) == 4 and min(seconds) > 0


def test_timing_without_a_loaded_workload_is_an_error(worker):
    with pytest.raises(PeerError, match="nothing is loaded"):
        worker.time(1, 60)


def test_an_error_is_one_line_and_the_worker_continues(workers, tmp_path):
    with PeerProcess(Path(sys.executable), "with_failing", {}) as peer:
        for _ in range(2):
            with pytest.raises(PeerError, match=re.escape(r"KeyError: 'no such\nlayer'")):
                peer.load(load_command(tmp_path)[1], 60)
        assert peer.pid and alive(peer.pid)


def test_a_refusal_is_passed_on_unchanged(worker, tmp_path):
    with pytest.raises(PeerError, match=r"^inference only$"):
        worker.load(load_command(tmp_path, "training")[1], 60)


def test_a_dead_worker_is_reported_and_started_again(workers, tmp_path):
    with PeerProcess(Path(sys.executable), "with_dead", {}) as peer:
        for _ in range(2):
            with pytest.raises(PeerError, match="ended with code 3: no more"):
                peer.load(load_command(tmp_path)[1], 60)
        assert peer.pid is None


def test_a_slow_worker_is_stopped(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "CLOSE_SECONDS", 0.1)
    with PeerProcess(Path(sys.executable), "with_slow", {}) as peer:
        peer.unload()  # starts nothing
        assert peer.pid is None
        with pytest.raises(PeerError, match="no answer within 1 s"):
            peer.load(load_command(tmp_path)[1], 1.0)
        assert peer.pid is None


def test_no_worker_outlives_its_context(workers, tmp_path):
    with pytest.raises(KeyboardInterrupt), PeerProcess(Path(sys.executable), "with_right", {}) as peer:
        peer.load(load_command(tmp_path)[1], 60)
        pid = peer.pid
        assert pid and alive(pid)
        raise KeyboardInterrupt
    assert not alive(pid)


def test_workers_do_not_import_fusedrnn():
    """Their environments do not contain fusedrnn; only the worker for revisions imports it, by name."""
    for path in sorted(process.WORKERS.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^(from|import) fused", text, re.MULTILINE), path.name


def test_the_peers_are_pinned_and_have_workers():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraint = next(line for line in lines if line.startswith("torch=="))
    assert constraint in PEERS["pytorch"].environment.requirements
    assert PEERS["mxnet-fused"].environment is PEERS["mxnet-cells"].environment
    assert PEERS["mxnet-fused"].environment.requirements == ("mxnet==1.9.1", "numpy==1.23.5")
    for peer in PEERS.values():
        assert (process.WORKERS / f"{peer.worker}.py").is_file()


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_peer(option, capsys):
    assert command.main([option]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m benchmarks.peers [NAME ...]\n")
    assert set(PEERS) <= set(shown.replace(",", "").split())


def test_environments_are_built_once_and_independently(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSEDRNN_PEERS", str(tmp_path))
    bad, empty = Environment("bad", ("this is no requirement",)), Environment("empty", ())
    monkeypatch.setattr(environments, "PEERS", {"one": Peer("one", bad, ""), "two": Peer("two", empty, "")})
    monkeypatch.setattr(command, "PEERS", environments.PEERS)
    plain = environments._run
    # To install pip takes most of the time; without it, it fails on any requirement.
    monkeypatch.setattr(environments, "_run", lambda *line: plain(*line, *["--without-pip"] * ("venv" in line)))
    assert command.main([]) == 1
    printed = capsys.readouterr()
    assert "bad: failed: " in printed.out and "not built: bad" in printed.err
    assert empty.is_built() and empty.python.exists() and not bad.is_built()
    assert command.main(["two"]) == 0
    assert capsys.readouterr().out == "empty: already built\n"
    assert not Environment("empty", ("other==1",)).is_built()
    assert command.main(["three"]) == 2
    assert "'three'" in capsys.readouterr().err


def test_a_folder_that_is_no_environment_is_not_removed(tmp_path, monkeypatch):
    """FUSEDRNN_PEERS may name a folder that holds a user's own, under a library's name."""
    monkeypatch.setenv("FUSEDRNN_PEERS", str(tmp_path))
    own = tmp_path / "mine" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(RuntimeError, match="mine is not a virtual environment; move it, or set FUSEDRNN_PEERS"):
        Environment("mine", ()).build()
    assert own.read_text() == "mine"


def test_a_worker_does_not_inherit_python_paths(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    assert "PYTHONPATH" not in child_environment({})
    assert child_environment({"PYTHONPATH": "elsewhere"})["PYTHONPATH"] == "elsewhere"


def test_an_unknown_home_folder_is_an_error(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PEERS", "~no-such-user-at-all/peers")
    with pytest.raises(ValueError, match=r"FUSEDRNN_PEERS must be .*'~no-such-user-at-all/peers'"):
        peers_directory()
