"""benchmarks.streams: it prints and writes its figures."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import streams
from benchmarks.streams import app

NETWORKS = {
    "plain": ["--hidden", "7", "--layers", "1"],
    "network": ["--hidden", "7,7,6", "--residual", "projection"],
    "cell": ["--cell", "fusedrnn.cells:slstm", "--hidden", "7,6"],
}


@pytest.mark.parametrize("network", NETWORKS)
def test_figures(network, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "ROUND_SECONDS", 1e-4)
    sizes = ["--features", "5", *NETWORKS[network], "--capacity", "70", "--rounds", "3"]
    path = tmp_path / "streams.json"
    result = CliRunner().invoke(app, [*sizes, "--period", "10", "--seconds", "0.1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    for words in ("streams in a step", "ratio", "70 streams, a frame of each every 10 ms", "p99", "of one processor"):
        assert words in result.output
    assert "a loop that only reads the clock" in result.output
    assert f"the network: --cell {'fusedrnn.cells:slstm' if network == 'cell' else 'gru'} --features 5" in result.output
    figures = json.loads(path.read_text())
    assert [row["batch"] for row in figures["comparisons"]] == [1, 8, 64]
    assert figures["schedule"]["latency_ms"]["count"] == 700
    assert figures["settings"]["hidden"] == {"plain": [7], "network": [7, 7, 6], "cell": [7, 6]}[network]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cell", "transformer"], "--cell must be one of gru, lstm, rnn_tanh, rnn_relu, or path.py:name or"),
        (["--hidden", "64,32", "--residual", "identity"], "--cell gru: residual='identity' needs a layer whose"),
        (["--hidden", "4096", "--capacity", "1000000000"], "Unable to allocate"),
    ],
)
def test_errors(options, words):
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert words in result.output


def test_waits_for_a_processor_that_the_system_has_taken():
    assert streams.wait_of([], 10) == 0.0
    assert streams.wait_of([0.05], 10) == 0.0  # half a percent of all moments
    assert streams.wait_of([0.3], 10) == pytest.approx(0.2)  # at 0.1 of 10 seconds more than 0.2 is left
    assert streams.wait_of([0.1, 0.3, 0.3], 10) == pytest.approx(0.25)
    assert streams.wait_of([0.02] * 10, 10) == pytest.approx(0.01)


def test_pauses(monkeypatch):
    readings = iter([0.0, 0.00005, 0.0301, 0.03015, 2.0])
    monkeypatch.setattr(streams.time, "perf_counter", lambda: next(readings))
    assert streams.pauses(1.0) == pytest.approx([0.03005, 1.96985])
