"""``python -m benchmarks.compiled_loops``: the loops are the cells of those names; rows have a table and a report."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import compiled_loops
from fusedrnn.testing.cases import Case

CASE = Case("toy", 4, 2, 3, 5)


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)


@pytest.mark.parametrize("phase", ["inference", "training"])
@pytest.mark.parametrize("cell", compiled_loops.CELLS)
def test_a_row(cell, phase, peak):
    row = compiled_loops.run_row(CASE, cell, phase, peak, 0.0)
    assert row.ratio(compiled_loops.LAYER, compiled_loops.LAYER) == 1.0
    report = json.loads(json.dumps(compiled_loops.row_report(row)))
    assert set(report["median"]) == {"loop", "compiled loop", "fused"}
    console = Console(width=150, file=io.StringIO())
    console.print(compiled_loops.table([row]))
    assert f"toy, {cell}, {phase}" in console.file.getvalue()


def test_wrong_results_are_not_timed():
    work = compiled_loops.workload(CASE, "gru", "float32")
    right = {"y": np.ones((4, 2, 5), np.float32), "dx": np.ones((4, 2, 3), np.float32)}
    compiled_loops.check(work, "loop", right, right)
    for name in right:
        with pytest.raises(RuntimeError, match=f"toy, gru, loop: {name} differs"):
            compiled_loops.check(work, "loop", right, {**right, name: 0 * right[name]})
