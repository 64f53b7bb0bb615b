"""``fusedrnn bench --backends``: engine for engine, each checked before a figure, one that declines with its reason."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from bench_rows import SMALL
from fusedrnn.bench import runner
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.lines import failure_lines, summary
from fusedrnn.bench.report import report
from fusedrnn.bench.rows import BenchConfig
from fusedrnn.bench.tables import engines_table
from fusedrnn.cli import bench
from fusedrnn.cli.app import app
from fusedrnn.cli.bench import contender_fields, make_config
from fusedrnn.engines.onednn import library
from fusedrnn.engines.reference.engine import ReferenceEngine


@pytest.fixture(autouse=True)
def known_speeds(known_peak, monkeypatch):
    monkeypatch.setattr(bench, "measure_bandwidth", lambda threads: {"memory": 10.0 * threads})


@pytest.fixture
def without_onednn(monkeypatch):
    def load():
        raise ImportError("no such library")

    monkeypatch.setattr("fusedrnn.engines.onednn.engine.load", load)


def rows(*backends, modes=("lstm",), **options):
    config = BenchConfig(
        [SMALL], modes, list(PHASES.values()), budget=0.0, pause=0.0, contenders=backends, engines=True, **options
    )
    return list(runner.run(config))


def table_lines(table):
    return [[str(cell) for cell in cells] for cells in zip(*(column.cells for column in table.columns), strict=True)]


def test_each_engine_has_its_figures():
    measured_rows = rows("cpu", "reference", modes=("lstm", "gru"))
    assert [row.phase for row in measured_rows] == ["inference", "training"] * 2
    for row in measured_rows:
        assert row.wrong is None and not row.failures
        assert list(row.timings) == ["cpu", "reference"]
        assert row.ours == "cpu"
        assert row.share("reference") == pytest.approx(row.gflops("reference") / 100)
    table = table_lines(engines_table(measured_rows))
    assert [line[1] for line in table] == ["cpu", "reference"] * 4
    assert all(cell for line in table for cell in line[2:5])
    assert [bool(line[5]) for line in table] == [False, True] * 4
    assert float(table[1][5]) == pytest.approx(measured_rows[0].ratio("cpu", "reference"), abs=1e-3)
    assert table[0][0] == "small-test LSTM-Inference" and table[1][0] == "  6,3,5,7 layers 2 both ways"


def test_engines_are_compared_with_the_first_one():
    [row, _] = rows("reference", "cpu")
    assert row.ours == "reference"
    assert [line[1] for line in table_lines(engines_table([row]))] == ["reference", "cpu"]


def test_table_and_report_show_why_an_engine_declines(without_onednn):
    measured_rows = rows("cpu", "onednn")
    for row in measured_rows:
        assert list(row.timings) == ["cpu"]
        assert row.failures == {"onednn": "no such library (engine 'onednn')"}
    table = table_lines(engines_table(measured_rows))
    assert [line[1:3] for line in table[1::2]] == [["onednn", "declines"]] * 2
    assert failure_lines(measured_rows) == ["onednn: no such library (engine 'onednn') (every row)"]
    figures = report(BenchConfig([SMALL], ("lstm",), [], contenders=("cpu", "onednn"), engines=True), measured_rows)
    assert figures["plan"]["backends"] == ["cpu", "onednn"]
    assert figures["rows"][0]["failures"] == measured_rows[0].failures


def test_an_unsupported_dtype_is_the_reason_to_decline(without_onednn):
    [row, _] = rows("onednn", "cpu", dtype="float64")
    assert row.failures == {"onednn": "dtype 'float64' is not supported by engine 'onednn'"}
    assert row.ours == "cpu"


def test_every_engine_may_decline(without_onednn):
    measured_rows = rows("onednn")
    assert [list(row.timings) for row in measured_rows] == [[], []]
    assert table_lines(engines_table(measured_rows))[0][:3] == ["small-test LSTM-Inference", "onednn", "declines"]
    assert summary(measured_rows[0]) == "small-test lstm inference: every engine declines"
    assert report(BenchConfig([SMALL], ("lstm",), []), measured_rows)["rows"][0]["share_of_peak"] is None


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_wrong_engine_has_no_times(monkeypatch, name):
    """Whichever engine is wrong: the first steps are compared with float64, all of them with the first engine."""
    plain = ReferenceEngine.forward

    def wrong(self, operands):
        final = plain(self, operands)
        operands.y[-1, -1, -1] += 0.01
        return final

    monkeypatch.setattr(ReferenceEngine, "forward", wrong)
    backends = ("cpu", "reference") if name == "cpu" else ("reference", "cpu")
    [row, _] = rows(*backends)
    assert row.wrong is not None and row.wrong.startswith("reference: y")
    assert not row.timings
    assert [line[2] for line in table_lines(engines_table([row]))] == ["[bold red]wrong[/]"] * 2


def test_the_timed_results_are_compared(monkeypatch):
    """Steps beyond those that float64 could check in its second."""
    plain = ReferenceEngine.forward

    def wrong(self, operands):
        final = plain(self, operands)
        if len(operands.x) == SMALL.T:
            operands.y[-1, -1, -1] += 0.01
        return final

    monkeypatch.setattr(ReferenceEngine, "forward", wrong)
    monkeypatch.setattr("fusedrnn.bench.checks.CHECKED_FLOPS", 1)
    [row, _] = rows("cpu", "reference")
    assert row.wrong is not None and row.wrong.startswith("reference: y") and "cpu reference" in row.wrong


def options(**fields):
    return make_config("tiny", "lstm", "inference", "float32", 1, **contender_fields(**fields))


def test_backends_option():
    config = options(backends="cpu,reference")
    assert config.contenders == ("cpu", "reference") and config.engines
    assert not options().engines
    with pytest.raises(ValueError, match="unknown engine 'gpu'"):
        options(backends="cpu,gpu")
    with pytest.raises(ValueError, match="--backends cannot be used with --torch"):
        options(backends="cpu", torch=True)


def test_the_command(tmp_path, without_onednn):
    arguments = ("bench", "--cases", "tiny", "--modes", "gru", "--phases", "training", "--seconds", 0, "--threads", 1)
    options = ("--backends", "cpu,onednn,reference", "--json", tmp_path / "rows.json")
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *options)])
    assert result.exit_code == 0, result.output
    assert "tiny GRU-Training" in result.output and "declines" in result.output
    assert "onednn: no such library" in result.output
    [row] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert set(row["gflops"]) == set(row["shares_of_peak"]) == {"cpu", "reference"}


def test_nothing_to_time_is_an_error(without_onednn):
    arguments = "bench --backends onednn --cases tiny --modes gru --phases training --seconds 0 --threads 1"
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 2
    assert "error: there is nothing to time: onednn: no such library (engine 'onednn')" in result.output


def test_info_says_why_an_engine_declines(monkeypatch):
    def find():
        raise ImportError("no such library")

    monkeypatch.setattr(library, "find", find)
    library._load.cache_clear()
    monkeypatch.setattr("fusedrnn.cli.info.measure_peak", lambda *arguments: 100.0)
    output = " ".join(CliRunner().invoke(app, ["info"]).output.split())
    library._load.cache_clear()
    assert "declines here: no such library (engine 'onednn')" in output


def test_engines_compute_the_same_results():
    """The same inputs, parameters and gradients, whatever the engine."""
    from fusedrnn.bench.data import workload

    work = workload(SMALL, "gru", "float32")
    phase, batch = PHASES["training"], work.batch(SMALL.T)
    cpu, reference = (phase.on_engine(name)(work)(batch)() for name in ("cpu", "reference"))
    assert cpu.keys() == reference.keys()
    for name in cpu:
        np.testing.assert_allclose(cpu[name], reference[name], atol=1e-4)
