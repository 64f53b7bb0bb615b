"""benchmarks.streams: it prints and writes its figures."""

import json

from typer.testing import CliRunner

from benchmarks import streams
from benchmarks.streams import app


def test_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "ROUND_SECONDS", 1e-4)
    sizes = ["--features", "5", "--hidden", "7", "--layers", "1", "--capacity", "70", "--rounds", "3"]
    path = tmp_path / "streams.json"
    result = CliRunner().invoke(app, [*sizes, "--period", "10", "--seconds", "0.1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    for words in ("streams in a step", "ratio", "70 streams, a frame of each every 10 ms", "p99", "of one processor"):
        assert words in result.output
    figures = json.loads(path.read_text())
    assert [row["batch"] for row in figures["comparisons"]] == [1, 8, 64]
    assert figures["schedule"]["latency_ms"]["count"] == 700
    assert CliRunner().invoke(app, ["--cell", "transformer"]).exit_code != 0
