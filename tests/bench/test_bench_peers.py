"""Rivals run in processes of their own, are checked before they are timed, and fail without failing the others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fusedrnn
from fusedrnn import env
from fusedrnn.bench import contenders, peaks, runner
from fusedrnn.bench.computed import FUSED
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.data import workload
from fusedrnn.bench.estimate import expected_seconds
from fusedrnn.bench.peers import __main__ as command
from fusedrnn.bench.peers import environments, process, revision, team
from fusedrnn.bench.peers.environments import PEERS, Environment, Peer
from fusedrnn.bench.peers.problems import read_results, write_problem
from fusedrnn.bench.peers.process import PeerError, PeerProcess
from fusedrnn.bench.peers.table import failures, rivals_table
from fusedrnn.bench.report import report
from fusedrnn.bench.rows import Plan, Row
from fusedrnn.bench.tables import duration, summary
from fusedrnn.bench.timing import LATENCY, VERY_LONG, LostError, Timing, alternate
from fusedrnn.cli.bench import make_plan
from fusedrnn.runtime.peak import PeakSample
from fusedrnn.testing.cases import Case

ROOT = Path(__file__).resolve().parents[2]
SMALL = Case("small-test", 5, 3, 4, 6)

# A worker as one for a library would be: one layer of rnn_tanh in one direction, forward alone.
RIGHT = """
import numpy as np

def facts():
    return {"fake": "1.0"}

def prepare(problem):
    if problem.training:
        problem.refuse("inference only")
    print("what a library prints")
    w_x, w_h, b_x, b_h = problem.weights(0, "l")

    def run():
        h, y = problem.states[0][0], []
        for x in problem.x:
            h = np.tanh(x @ w_x.T + b_x + h @ w_h.T + b_h)
            y.append(h)
        return np.array(y), [h[None]]

    return run, lambda made: problem.outputs(*made)
"""
WRONG = RIGHT.replace("h @ w_h.T + b_h", "h @ w_h.T")
DEAD = RIGHT.replace(
    'print("what a library prints")', 'import os, sys\n    print("no more", file=sys.stderr, flush=True); os._exit(3)'
)
SLOW = RIGHT.replace('print("what a library prints")', "import time; time.sleep(60)")
FAILING = RIGHT.replace('print("what a library prints")', 'raise KeyError("no such\\nlayer")')
# The first two calls, which load makes, are right.
MORTAL = RIGHT.replace("h, y =", "made.append(0); assert len(made) < 3, 'worn out'; h, y =").replace(
    "    def run", "    made = []\n    def run"
)


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """A folder of such workers in the place of the real ones, each a peer that is built."""
    folder = tmp_path / "workers"
    folder.mkdir()
    shutil.copy(process.WORKERS / "protocol.py", folder)
    sources = {"right": RIGHT, "wrong": WRONG, "dead": DEAD, "slow": SLOW, "failing": FAILING, "mortal": MORTAL}
    built = SimpleNamespace(python=Path(sys.executable), is_built=lambda: True)
    for name, source in sources.items():
        (folder / f"with_{name}.py").write_text(source)
    peers = {name: Peer(name, built, f"with_{name}") for name in sources}
    peers["absent"] = Peer("absent", Environment("absent", ("absent==1",)), "with_absent")
    monkeypatch.setattr(process, "WORKERS", folder)
    monkeypatch.setattr(team, "PEERS", peers)
    monkeypatch.setattr(peaks, "measure_peak", lambda dtype, threads: 100.0)
    monkeypatch.setattr(peaks, "sample_peak", lambda dtype, threads: PeakSample(100.0, True))
    monkeypatch.setenv("FUSEDRNN_PEERS", str(tmp_path / "peers"))
    return peers


@pytest.fixture
def worker(workers):
    with PeerProcess(Path(sys.executable), "with_right", {}) as one:
        yield one


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def problem(folder: Path, phase: str = "inference"):
    work = workload(SMALL, "rnn_tanh", "float32")
    given = write_problem(work, work.batch(SMALL.T), folder, training=phase == "training", threads=1)
    return work, given


def row_beside(*peers: str, phase: str = "inference", mode: str = "rnn_tanh") -> Row:
    (row,) = runner.run(Plan([SMALL], [mode], [PHASES[phase]], peers=peers, budget=0.0))
    return row


# Processes


def test_a_worker_computes_and_times(worker, tmp_path):
    work, given = problem(tmp_path)
    answer = worker.load(given, 60)
    assert answer["facts"] == {"fake": "1.0"} and answer["warm" if "warm" in answer else "seconds"] > 0
    ours = contenders.fused(work)(work.batch(SMALL.T))()
    theirs = read_results(work, tmp_path)
    assert theirs.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(theirs[name], array, rtol=1e-5, atol=1e-6)
    seconds = worker.time(4, 60)
    assert len(seconds) == 4 and min(seconds) > 0


def test_a_worker_that_has_nothing_loaded_says_so(worker):
    with pytest.raises(PeerError, match="nothing is loaded"):
        worker.time(1, 60)


def test_an_error_is_told_in_a_line_and_the_worker_lives_on(workers, tmp_path):
    with PeerProcess(Path(sys.executable), "with_failing", {}) as one:
        for _ in range(2):
            with pytest.raises(PeerError, match=re.escape(r"KeyError: 'no such\nlayer'")):
                one.load(problem(tmp_path)[1], 60)
        assert one.pid and alive(one.pid)


def test_a_refusal_is_told_as_it_is(worker, tmp_path):
    with pytest.raises(PeerError, match=r"^inference only$"):
        worker.load(problem(tmp_path, "training")[1], 60)


def test_a_dead_worker_is_told_by_its_last_line_and_started_again(workers, tmp_path):
    with PeerProcess(Path(sys.executable), "with_dead", {}) as one:
        for _ in range(2):
            with pytest.raises(PeerError, match="ended with code 3: no more"):
                one.load(problem(tmp_path)[1], 60)
        assert one.pid is None


def test_a_slow_worker_is_given_up(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "CLOSING", 0.1)
    with PeerProcess(Path(sys.executable), "with_slow", {}) as one:
        one.unload()  # starts nothing
        assert one.pid is None
        with pytest.raises(PeerError, match="given up after 1 s"):
            one.load(problem(tmp_path)[1], 1.0)
        assert one.pid is None


def test_no_worker_outlives_its_context(workers, tmp_path):
    with pytest.raises(KeyboardInterrupt), PeerProcess(Path(sys.executable), "with_right", {}) as one:
        one.load(problem(tmp_path)[1], 60)
        pid = one.pid
        assert pid and alive(pid)
        raise KeyboardInterrupt
    assert not alive(pid)


def test_workers_need_nothing_of_ours():
    """Their Pythons have no fusedrnn; only the one for revisions looks for it, by name."""
    for path in sorted(process.WORKERS.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^(from|import) fused", text, re.MULTILINE), path.name


# Rows


def test_a_right_peer_is_timed_beside_ours(workers):
    row = row_beside("right")
    assert set(row.timings) == {FUSED, "right"} and not row.failures and not row.wrong
    assert row.best_peer == "right" and row.over_best_peer() == row.ratio("right")
    assert row.versions == {"right": {"fake": "1.0"}} and row.peak == 100.0


def test_a_wrong_peer_is_named_and_the_others_are_timed(workers):
    row = row_beside("wrong", "right", "failing", "absent")
    assert set(row.timings) == {FUSED, "right"} and not row.wrong
    assert row.failures["wrong"].startswith("wrong: y[")
    assert "no such" in row.failures["failing"]
    assert row.failures["absent"] == "peer absent is not built: run `make peers`"


def test_a_peer_that_fails_while_it_is_timed_is_left_out(workers):
    row = row_beside("mortal", "right")
    assert set(row.timings) == {FUSED, "right"}
    assert "worn out" in row.failures["mortal"]


def test_without_a_peer_that_agrees_the_non_fused_network_decides(workers, monkeypatch):
    row = row_beside("wrong")
    assert set(row.timings) == {FUSED} and not row.wrong and row.best_peer is None and row.over_best_peer() is None
    make = contenders.fused

    def late(work):
        """Wrong at the last step only of what is longer than the check in float64."""
        op = make(work)

        def call(batch):
            results = op(batch)()
            if len(batch.x) == SMALL.T:
                results["y"][-1, 0, 0] += 1.0
            return lambda: results

        return call

    inference = replace(PHASES["inference"], makers={**PHASES["inference"].makers, FUSED: late})
    monkeypatch.setattr("fusedrnn.bench.checks.CHECKED_FLOPS", 0)
    (row,) = runner.run(Plan([SMALL], ["rnn_tanh"], [inference], peers=("right",), budget=0.0))
    assert row.wrong and row.wrong.startswith(f"{FUSED}: y[4, 0, 0]") and not row.timings


def test_training_is_refused_in_words(workers):
    row = row_beside("right", phase="training")
    assert set(row.timings) == {FUSED} and row.failures == {"right": "inference only"}


def test_a_report_has_rivals_and_their_failures(workers):
    plan = Plan([SMALL], ["rnn_tanh"], [PHASES["inference"]], peers=("right", "wrong"), budget=0.0)
    rows = list(runner.run(plan))
    figures = report(plan, rows)
    (row,) = figures["rows"]
    assert figures["plan"]["peers"] == ["right", "wrong"]
    assert row["best_peer"] == "right" and row["fused_over_best_peer"] == rows[0].ratio("right")
    assert row["failures"].keys() == {"wrong"} and row["versions"]["right"] == {"fake": "1.0"}
    assert 0 < row["seconds"][FUSED]["p50"] <= row["seconds"][FUSED]["p99"]


# Tables


def measured(**seconds: float) -> Row:
    case, names = SMALL, tuple(name for name in seconds if name != FUSED)
    timings = {who: Timing((value,)) for who, value in seconds.items()}
    return Row(case, "lstm", "inference", "float32", 2, 10**9, 200.0, timings, peers=names)


def cells(rows) -> dict[str, list[str]]:
    table = rivals_table(rows)
    return {str(column.header).replace("\n", ""): list(column.cells) for column in table.columns}


def test_the_table_shows_everybody_and_the_ratio_to_the_best():
    row = measured(fused=2e-3, jax=5e-3, keras=3e-3)
    row = replace(row, peers=(*row.peers, "openvino", "pytorch"), failures={"openvino": "wrong: y", "pytorch": "no"})
    shown = cells([row])
    assert shown["Fused-RNN"] == ["2.00 ms"] and shown["JAX"] == ["5.00 ms"] and shown["Keras"] == ["[bold]3.00 ms[/]"]
    assert shown["Open-VINO"] == ["wrong"] and shown["PyTorch"] == ["-"]
    assert shown["timesthebest"] == ["1.50"] and "p50µs" not in shown
    assert "1.50 times as fast as keras" in summary(row)


def test_the_table_shows_latency_and_revisions():
    row = replace(measured(fused=2e-6), timings={FUSED: Timing((2e-6,), 1.9e-6, 7e-6), "abc1234": Timing((3e-6,))})
    shown = cells([replace(row, revisions=("abc1234",)), measured(fused=1.0)])
    assert shown["p50µs"] == ["1.9", ""] and shown["p99µs"] == ["7.0", ""]
    assert shown["timesabc1234"] == ["1.500", ""] and "timesthebest" not in shown


def test_failures_are_told_once_with_their_rows():
    one, other = measured(fused=1.0), replace(measured(fused=1.0), mode="gru")
    rows = [replace(one, failures={"jax": "no", "keras": "late"}), replace(other, failures={"jax": "no"})]
    assert failures(rows) == ["jax: no (every row)", "keras: late (small-test lstm inference)"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (12.34e-6, "12.3 µs"),
        (999e-6, "999 µs"),
        (1.5e-3, "1.50 ms"),
        (0.25, "250 ms"),
        (1.0, "1.00 s"),
        (72.0, "72.0 s"),
    ],
)
def test_durations_have_three_digits(seconds, shown):
    assert duration(seconds) == shown


def test_rivals_are_expected_to_take_time():
    plan = Plan([SMALL], ["lstm"], [PHASES["inference"]], budget=5.0)
    alone, beside = expected_seconds(plan, 100.0), expected_seconds(replace(plan, peers=("jax", "keras")), 100.0)
    assert beside[0] > alone[0] + 2


# Timing


class Far:
    """A call that claims to take as long as it is told."""

    def __init__(self, warm: float, *seconds: float) -> None:
        self.warm, self._seconds, self.asked = warm, list(seconds), []

    def time(self, calls):
        self.asked.append(calls)
        if not self._seconds:
            raise LostError("gone")
        return [self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0]] * calls


def test_a_call_elsewhere_reports_its_own_seconds():
    far = Far(0.5, 0.25)
    timings, results = alternate({"here": lambda: 7, "far": far}, 0.0, pause=0.0)
    assert timings["far"].seconds == (0.25, 0.25) and far.asked == [1, 1]
    assert results == {"here": 7, "far": None}


def test_a_long_call_elsewhere_counts_from_its_load():
    far = Far(VERY_LONG, 1.0)
    timings, _ = alternate({"far": far}, 0.0, once=["far"], pause=0.0)
    assert timings["far"].seconds == (VERY_LONG,) and not far.asked


def test_a_lost_call_does_not_end_the_others():
    said = {}
    calls = {"far": Far(0.5), "here": lambda: 7}
    timings, _ = alternate(calls, 0.0, pause=0.0, lost=lambda who, error: said.update({who: str(error)}))
    assert timings.keys() == {"here"} and said == {"far": "gone"}
    with pytest.raises(LostError):
        alternate({"far": Far(0.5)}, 0.0, pause=0.0)


def test_short_calls_have_percentiles_and_long_ones_do_not():
    timings, _ = alternate({"short": Far(1e-5, 1e-5), "long": Far(0.5, LATENCY)}, 0.0, pause=0.0)
    assert timings["short"].p50 == timings["short"].p99 == pytest.approx(1e-5)
    assert timings["long"].p50 is None and timings["long"].p99 is None


# Environments


def test_the_peers_are_pinned_and_have_workers():
    constraint = (ROOT / "constraints.txt").read_text().split()[-1]
    assert constraint in PEERS["pytorch"].environment.requirements
    assert PEERS["mxnet-fused"].environment is PEERS["mxnet-cells"].environment
    assert PEERS["mxnet-fused"].environment.requirements == ("mxnet==1.9.1", "numpy==1.23.5")
    for peer in PEERS.values():
        assert (process.WORKERS / f"{peer.worker}.py").is_file()


def test_environments_are_built_once_and_a_failure_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSEDRNN_PEERS", str(tmp_path))
    bad, empty = Environment("bad", ("this is no requirement",)), Environment("empty", ())
    monkeypatch.setattr(environments, "PEERS", {"one": Peer("one", bad, ""), "two": Peer("two", empty, "")})
    monkeypatch.setattr(command, "PEERS", environments.PEERS)
    assert command.main([]) == 1
    said = capsys.readouterr()
    assert "bad: failed: " in said.out and "not built: bad" in said.err
    assert empty.is_built() and empty.python.exists() and not bad.is_built()
    assert command.main(["two"]) == 0
    assert capsys.readouterr().out == "empty: already built\n"
    assert not Environment("empty", ("other==1",)).is_built()
    assert command.main(["three"]) == 2
    assert "'three'" in capsys.readouterr().err


def test_a_folder_that_is_no_environment_stays(tmp_path, monkeypatch):
    """FUSEDRNN_PEERS may name a folder that holds a user's own, under a library's name."""
    monkeypatch.setenv("FUSEDRNN_PEERS", str(tmp_path))
    own = tmp_path / "mine" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(RuntimeError, match="mine is no virtual environment; move it, or set FUSEDRNN_PEERS"):
        Environment("mine", ()).build()
    assert own.read_text() == "mine"


def test_a_workers_python_is_not_led_to_ours(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    assert "PYTHONPATH" not in env.child_environment({})
    assert env.child_environment({"PYTHONPATH": "elsewhere"})["PYTHONPATH"] == "elsewhere"


# Revisions


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository whose first commit has the package, the second not any more."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    folder = tmp_path_factory.mktemp("repository")
    package = Path(fusedrnn.__file__).parent
    shutil.copytree(package, folder / "src" / "fusedrnn", ignore=shutil.ignore_patterns("__pycache__"))

    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    git("rm", "-r", "-q", "src")
    git("commit", "-q", "-m", "two", "--allow-empty")
    return folder


@pytest.mark.parametrize("phase", PHASES)
def test_another_revision_runs_beside_this_one(repository, monkeypatch, phase):
    monkeypatch.setattr(peaks, "measure_peak", lambda dtype, threads: 100.0)
    monkeypatch.setattr(peaks, "sample_peak", lambda dtype, threads: PeakSample(100.0, True))
    other = revision.find("HEAD~1", repository)
    plan = Plan([SMALL], ["lstm"], [PHASES[phase]], revisions=(other,), budget=0.0)
    (row,) = runner.run(plan)
    assert plan.contenders() == (FUSED, other.name)
    assert set(row.timings) == {FUSED, other.name} and not row.failures and not row.wrong
    assert row.best_peer is None
    found = Path(row.versions[other.name]["fusedrnn"])
    assert found.name == "__init__.py" and "fusedrnn-revision-" in str(found) and not found.exists()


@pytest.mark.parametrize(("given", "said"), [("no-such", "no such revision"), ("HEAD", "has no src/fusedrnn")])
def test_a_revision_that_cannot_run_is_refused(repository, given, said):
    with pytest.raises(ValueError, match=f"--against {given}: .*{said}"):
        revision.find(given, repository)


def test_a_folder_outside_of_git_is_refused(tmp_path):
    with pytest.raises(ValueError, match="git repository"):
        revision.find("HEAD", tmp_path)


# Options


def options(**given):
    return make_plan("tiny", "lstm", "inference", "float32", 1, None, given.pop("torch", False), 0.0, **given)


def test_all_takes_what_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PEERS", str(tmp_path))
    with pytest.raises(ValueError, match="not built: run `make peers`"):
        options(peers="all")
    jax = PEERS["jax"].environment
    jax.python.parent.mkdir(parents=True)
    jax.python.touch()
    (jax.folder / "requirements.txt").write_text(jax.wanted)
    assert options(peers="all").contenders() == (FUSED, *PEERS)
    assert options(peers="jax").contenders() == (FUSED, "jax")
    with pytest.raises(ValueError, match="keras is not built"):
        options(peers="jax,keras")


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="unknown peer 'caffe'"):
        options(peers="caffe")
    with pytest.raises(ValueError, match="--packed cannot go with --peers"):
        options(peers="all", packed=True)
    with pytest.raises(ValueError, match="--against"):
        options(against="no-such-revision")
