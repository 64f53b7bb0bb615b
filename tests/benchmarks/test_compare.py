"""Comparisons: peers are checked before timing, fail without the others failing, and have a table."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fusedrnn
from benchmarks.compare.__main__ import app, choose_peers
from benchmarks.compare.runner import ComparedRow, Comparison, comparison_report, run
from benchmarks.compare.table import compared_table, summary
from benchmarks.peers import revision
from benchmarks.peers.environments import PEERS
from benchmarks.records import load
from fake_workers import SMALL
from fusedrnn.bench import contenders, peaks
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.data import FUSED
from fusedrnn.bench.lines import failure_lines
from fusedrnn.bench.rows import BenchConfig
from fusedrnn.bench.tables import duration
from fusedrnn.bench.timing import Timing
from fusedrnn.runtime.peak import PeakSample


def row_beside(*peers: str, phase: str = "inference", mode: str = "rnn_tanh") -> ComparedRow:
    config = BenchConfig([SMALL], [mode], [PHASES[phase]], budget=0.0)
    (row,) = run(Comparison(config, peers))
    return row


def test_a_right_peer_is_timed(workers):
    row = row_beside("right")
    assert set(row.timings) == {FUSED, "right"} and not row.failures and not row.wrong
    assert row.best_peer == "right" and row.over_best_peer() == row.ratio("right")
    assert row.versions == {"right": {"fake": "1.0"}} and row.peak == 100.0


def test_a_wrong_peer_does_not_stop_the_others(workers):
    row = row_beside("wrong", "right", "failing", "absent")
    assert set(row.timings) == {FUSED, "right"} and not row.wrong
    assert row.failures["wrong"].startswith("wrong: y[")
    assert "no such" in row.failures["failing"]
    assert row.failures["absent"] == "peer absent is not built: run `make peers`"


def test_a_peer_that_fails_while_it_is_timed_is_left_out(workers):
    row = row_beside("mortal", "right")
    assert set(row.timings) == {FUSED, "right"}
    assert "worn out" in row.failures["mortal"]


def test_the_non_fused_network_decides_if_no_peer_agrees(workers, monkeypatch):
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
    (row,) = run(Comparison(BenchConfig([SMALL], ["rnn_tanh"], [inference], budget=0.0), ("right",)))
    assert row.wrong and row.wrong.startswith(f"{FUSED}: y[4, 0, 0]") and not row.timings


def test_a_peer_says_why_it_cannot_train(workers):
    row = row_beside("right", phase="training")
    assert set(row.timings) == {FUSED} and row.failures == {"right": "inference only"}


def test_a_report_has_peers_and_their_failures(workers):
    config = Comparison(BenchConfig([SMALL], ["rnn_tanh"], [PHASES["inference"]], budget=0.0), ("right", "wrong"))
    rows = list(run(config))
    figures = comparison_report(config, rows)
    (row,) = figures["rows"]
    assert figures["plan"]["peers"] == ["right", "wrong"]
    assert row["best_peer"] == "right" and row["fused_over_best_peer"] == rows[0].ratio("right")
    assert row["failures"].keys() == {"wrong"} and row["versions"]["right"] == {"fake": "1.0"}
    assert 0 < row["seconds"][FUSED]["p50"] <= row["seconds"][FUSED]["p99"]


def measured(**seconds: float) -> ComparedRow:
    case, names = SMALL, tuple(name for name in seconds if name != FUSED)
    timings = {who: Timing((value,)) for who, value in seconds.items()}
    return ComparedRow(case, "lstm", "inference", "float32", 2, 10**9, 200.0, timings, peers=names)


def cells(rows) -> dict[str, list[str]]:
    table = compared_table(rows)
    return {str(column.header).replace("\n", ""): list(column.cells) for column in table.columns}


def test_the_table_shows_every_contender_and_the_ratio_to_the_best():
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


def test_a_failure_is_one_line_with_its_rows():
    lstm, gru = measured(fused=1.0), replace(measured(fused=1.0), mode="gru")
    rows = [replace(lstm, failures={"jax": "no", "keras": "late"}), replace(gru, failures={"jax": "no"})]
    assert failure_lines(rows) == ["jax: no (every row)", "keras: late (small-test lstm inference)"]


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
def test_another_revision_is_timed(repository, monkeypatch, phase):
    monkeypatch.setattr(peaks, "measure_peak", lambda dtype, threads: 100.0)
    monkeypatch.setattr(peaks, "sample_peak", lambda dtype, threads: PeakSample(100.0, True))
    other = revision.find("HEAD~1", repository)
    config = Comparison(BenchConfig([SMALL], ["lstm"], [PHASES[phase]], budget=0.0), revisions=(other,))
    (row,) = run(config)
    assert config.contenders() == (FUSED, other.name)
    assert set(row.timings) == {FUSED, other.name} and not row.failures and not row.wrong
    assert row.best_peer is None
    package = Path(row.versions[other.name]["fusedrnn"])
    assert package.name == "__init__.py" and "fusedrnn-revision-" in str(package) and not package.exists()


@pytest.mark.parametrize(("name", "message"), [("no-such", "no such revision"), ("HEAD", "has no src/fusedrnn")])
def test_a_revision_that_cannot_run_is_rejected(repository, name, message):
    with pytest.raises(ValueError, match=f"--against {name}: .*{message}"):
        revision.find(name, repository)


def test_a_folder_outside_of_git_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="git repository"):
        revision.find("HEAD", tmp_path)


def test_all_takes_every_built_peer(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PEERS", str(tmp_path))
    with pytest.raises(ValueError, match="not built: run `make peers`"):
        choose_peers("all")
    jax = PEERS["jax"].environment
    jax.python.parent.mkdir(parents=True)
    jax.python.touch()
    (jax.folder / "requirements.txt").write_text(jax.marker_text)
    assert choose_peers("all") == tuple(PEERS)
    assert choose_peers("jax") == ("jax",)
    with pytest.raises(ValueError, match="keras is not built"):
        choose_peers("jax,keras")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "caffe"], "unknown peer 'caffe'"),
        (["--peers", "all,jax"], "--peers takes all, or names, not both"),
        (["--against", "no-such-revision"], "--against no-such-revision: no such revision"),
        (["--peers", "", "--cases", "huge"], "unknown case 'huge'"),
        ([], "nothing to compare with"),
    ],
)
def test_invalid_options(options, message):
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2 and f"error: {message}" in result.output


def test_the_command_prints_a_table_and_writes_its_file(workers, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.compare.__main__.PEERS", workers)
    monkeypatch.setattr("benchmarks.compare.__main__.measure_bandwidth", lambda threads: {"memory": 10.0})
    path = tmp_path / "rows.json"
    options = "--peers right,wrong --cases tiny --modes rnn_tanh --phases inference --seconds 0 --threads 1 --json"
    result = CliRunner().invoke(app, [*options.split(), str(path)])
    assert result.exit_code == 0, result.output
    assert "tiny vRNN(Tanh)-Inference" in result.output and "wrong: wrong: y[" in result.output
    benchmark = load(path)
    [record] = benchmark.records
    assert set(record.seconds) == {FUSED, "right"} and record.best_other == "right"
