"""``python -m benchmarks.pytorch_cells``: rows of both contenders, sizes and their errors, and the report."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import pytorch_cells


def test_report(tmp_path, peak):
    path = tmp_path / "figures.json"
    arguments = ["--sizes", "3x2", "--seconds", "0", "--json", str(path)]
    result = CliRunner().invoke(pytorch_cells.app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert [(row["cell"], row["phase"]) for row in rows] == [
        (cell, phase) for cell in pytorch_cells.CELLS for phase in ("inference", "training")
    ]
    for row in rows:
        assert set(row["median"]) == {"torch.nn", "fused"}
        assert f"3x2, {row['cell']}, {row['phase']}" in result.output


def test_wrong_results_are_not_timed(monkeypatch, peak):
    (case,) = pytorch_cells.parse_sizes("3x2")
    step = pytorch_cells.inference_step

    def wrong(cell, *args):
        call = step(cell, *args)
        return (lambda: [2 * state for state in call()]) if "fusedrnn" in type(cell).__module__ else call

    monkeypatch.setattr(pytorch_cells, "inference_step", wrong)
    with pytest.raises(AssertionError):
        pytorch_cells.run_row(case, "GRUCell", "inference", peak, 0.0)


@pytest.mark.parametrize("sizes", ["", "3", "3x", "x2", "0x1", "3x0", "-3x1", "3x2,ax1"])
def test_wrong_sizes(sizes):
    result = CliRunner().invoke(pytorch_cells.app, ["--sizes", sizes])
    assert result.exit_code == 2
    assert "--sizes must be units x sequences" in result.output
