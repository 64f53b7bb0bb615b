"""benchmarks.published_cells: its tables, the process of its figures, and the recurrences; not the packages."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from benchmarks.peers.figures import printed_figures
from benchmarks.published_cells import __main__ as published_cells
from benchmarks.published_cells import recurrences
from fusedrnn import RNNSpec, cells
from fusedrnn.cell.cells import Cell

SLSTM = {"cell": "slstm", "steps": 9, "batch": 8, "features": 7, "hidden": 6, "phase": "training"}
FIGURES = [
    {**SLSTM, "package": 3e-3, "fused": 2e-3},
    {"cell": "qrnn_f", "bytes": 300_000, "copied_bytes": 200_000, "copy": 1e-3, "fused": 2e-3},
]


def this_python(**changes):
    """An environment that stands for the running Python."""
    environment = {"name": "own", "packages": (), "python": Path(sys.executable)}
    return SimpleNamespace(**{**environment, "is_built": lambda: True, **changes})


def test_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(published_cells, "printed_figures", lambda *arguments: iter(FIGURES))
    path = tmp_path / "figures.json"
    result = CliRunner().invoke(published_cells.app, ["--json", str(path)])
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "slstm (flashrnn) 9, 8, 7, 6 training 3.00 ms 2.00 ms 1.50" in lines
    assert "qrnn_f 2.00 ms 0.1 75%" in lines  # 0.15 GB/s of 0.2
    assert json.loads(path.read_text())["rows"] == FIGURES


def test_unknown_part():
    result = CliRunner().invoke(published_cells.app, ["--parts", "transformer"])
    assert result.exit_code != 0
    assert "part" in result.output


def test_figures_of_a_process():
    module = "json.tool"  # reads the file that its argument names
    with pytest.raises(RuntimeError, match="the process in own ended with code"):
        list(printed_figures(this_python(), module, {}))


def test_environment_is_built_at_the_first_use(capsys):
    def build():
        raise RuntimeError("no network")

    environment = this_python(is_built=lambda: False, build=build, packages=("numpy", "sru"))
    with pytest.raises(RuntimeError, match="no network"):
        next(printed_figures(environment, "json.tool", {}))
    assert "own: installing numpy, sru" in capsys.readouterr().out


def test_recurrences(monkeypatch, peak):
    for name, size in {"STEPS": 4, "BATCH": 3, "HIDDEN": 5}.items():
        monkeypatch.setattr(recurrences, name, size)
    figures = list(recurrences.figures(0.0, peak))
    assert [figure["cell"] for figure in figures] == list(recurrences.CELLS)
    for figure in figures:
        mode: Cell = getattr(cells, figure["cell"])
        spec = RNNSpec(mode, 1, 5)
        assert figure["bytes"] == (spec.num_gates + 1) * 4 * 3 * 5 * 4
        assert figure["copied_bytes"] == 2 * 4 * 3 * 5 * 4
        assert min(figure["copy"], figure["fused"]) > 0
