"""``python -m benchmarks.jax``: results are compared before they are timed; rows have a table and a report."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import typer
from rich.console import Console

from benchmarks import jax as benchmark
from fusedrnn.testing.cases import CASES, Case

CASE = Case("toy", 4, 2, 3, 5)
DEEP = replace(CASES["ds2-5bi"].at(4, 2, 3), H=5)


@pytest.mark.parametrize("case", [CASE, DEEP], ids=lambda case: case.name)
def test_a_row(case, peak):
    pytest.importorskip("flax", reason="flax needs Python 3.11")
    row = benchmark.run_row(case, "gru", "training", peak, 0.0)
    contenders = {benchmark.NUMPY, benchmark.RNN, benchmark.SCAN, benchmark.FLAX, benchmark.ACCELERATED}
    assert set(row.timings) == contenders
    assert row.ratio(benchmark.FLAX, benchmark.FLAX) == 1.0
    assert json.loads(json.dumps(benchmark.row_report(row)))["median"].keys() == contenders
    console = Console(width=150, file=io.StringIO())
    console.print(benchmark.table([row]))
    assert f"{case.name}, gru, training" in console.file.getvalue()


def test_no_result_is_kept_while_others_run(monkeypatch, peak):
    """Those of the largest case take gigabytes together."""
    pytest.importorskip("flax", reason="flax needs Python 3.11")
    results = []

    def run_once(calls, seconds, peak):
        results.extend(call() for call in calls.values())
        return {}

    monkeypatch.setattr(benchmark, "take_turns", run_once)
    benchmark.run_row(CASE, "gru", "inference", peak, 0.0)
    assert results == [None] * 5


def test_all_cases_by_default():
    (option,) = (param for param in typer.main.get_command(benchmark.app).params if param.name == "cases")
    assert option.default.split(",") == list(CASES)


def test_wrong_results_are_not_timed():
    right, wrong = (np.ones((4, 2, 5), np.float32), np.ones(3)), (np.ones((4, 2, 5), np.float32), np.zeros(3))
    benchmark.check(CASE.spec("lstm"), CASE, right, right)
    with pytest.raises(RuntimeError, match="toy, lstm: results differ"):
        benchmark.check(CASE.spec("lstm"), CASE, right, wrong)
