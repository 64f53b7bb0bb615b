"""``python -m benchmarks.jax``: results are compared before they are timed; rows have a table and a report."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from benchmarks import jax as benchmark
from fusedrnn.testing.cases import Case

CASE = Case("toy", 4, 2, 3, 5)


def test_a_row(monkeypatch):
    pytest.importorskip("flax", reason="flax needs Python 3.11")
    monkeypatch.setattr(benchmark, "_PAUSE", 0.0)
    row = benchmark.run_row(CASE, "gru", "training", 0.0)
    contenders = {benchmark.NUMPY, benchmark.RNN, benchmark.SCAN, benchmark.FLAX, benchmark.ACCELERATED}
    assert set(row.timings) == contenders
    assert row.ratio(benchmark.FLAX, benchmark.FLAX) == 1.0
    assert json.loads(json.dumps(benchmark.row_report(row)))["median"].keys() == contenders
    console = Console(width=150, file=io.StringIO())
    console.print(benchmark.table([row]))
    assert "toy, gru, training" in console.file.getvalue()


def test_wrong_results_are_not_timed():
    right, wrong = (np.ones((4, 2, 5), np.float32), np.ones(3)), (np.ones((4, 2, 5), np.float32), np.zeros(3))
    benchmark.check(CASE.spec("lstm"), CASE, right, right)
    with pytest.raises(RuntimeError, match="toy, lstm: results differ"):
        benchmark.check(CASE.spec("lstm"), CASE, right, wrong)
