"""The command line: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import fusedrnn
from fusedrnn import cli
from fusedrnn.bench import contenders, parts, peaks, timing
from fusedrnn.bench.contenders import FUSED, PHASES
from fusedrnn.cli import bench, info, planning
from fusedrnn.cli.app import app
from fusedrnn.cli.console import Pace
from fusedrnn.engines.cpu.plan import partition
from fusedrnn.runtime.peak import PeakSample
from fusedrnn.testing.cases import CASES

QUICK = [
    *("bench", "--cases", "tiny", "--modes", "lstm", "--phases", "inference"),
    *("--seconds", "0", "--threads", "1"),
]


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    for module in (peaks, info, bench):
        monkeypatch.setattr(module, "measure_peak", lambda dtype, threads: 100.0 * threads)
    monkeypatch.setattr(peaks, "sample_peak", lambda dtype, threads: PeakSample(100.0 * threads, True))
    monkeypatch.setattr(bench, "measure_bandwidth", lambda threads: {"memory": 10.0 * threads})


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_bench_prints_a_table_and_writes_its_files(tmp_path):
    files = ("--json", tmp_path / "rows.json", "--plot", tmp_path / "rows.png", "--html", tmp_path / "rows.html")
    result = run(*QUICK, *files)
    assert result.exit_code == 0, result.output
    assert "tiny LSTM-Inference" in result.output and "wrong" not in result.output
    assert "tiny lstm inference: samples/sec" in result.output
    figures = json.loads((tmp_path / "rows.json").read_text())
    [row] = figures["rows"]
    assert row["mode"] == "lstm" and row["threads"] == 1 and row["peak"] == 100.0
    assert figures["bandwidth"] == {"memory": 10.0}
    assert (tmp_path / "rows.png").stat().st_size > 0
    assert "tiny LSTM inference" in (tmp_path / "rows.html").read_text(encoding="utf-8")


def test_bench_leaves_the_number_of_threads_as_it_was():
    before = fusedrnn.get_num_threads()
    assert run(*QUICK[:-1], before + 1).exit_code == 0
    assert fusedrnn.get_num_threads() == before


def test_the_time_left_follows_the_steps_that_are_done():
    now = 100.0
    pace = Pace([10.0, 20.0, 30.0], clock=lambda: now)
    assert pace.left() == 60.0 and pace.share == 0.0
    now += 4.0
    assert pace.left() == 56.0
    now += 16.0  # the first step took twice as long as expected
    pace.finish()
    assert pace.left() == 100.0 and pace.share == pytest.approx(1 / 6)
    now += 70.0  # the second is overdue
    assert str(pace) == "1/3, about 1:00 left"
    pace.finish(), pace.finish()
    assert str(pace) == "3/3, about 0:00 left"


def test_help_says_how_samples_are_taken():
    told = " ".join(run("bench", "--help").output.split())
    assert "ten seconds" in told and "inference,training" in told
    assert (timing.VERY_LONG, parts.SLOW) == (10.0, 3.0) and 1.0 <= parts.PART <= 2.0
    assert "more than three seconds" in told and "one or two seconds" in told and "--full" in told


def test_bench_may_run_all_steps(tmp_path):
    for options, full in ((), False), (("--full",), True):
        assert run(*QUICK, *options, "--json", tmp_path / "rows.json").exit_code == 0
        assert json.loads((tmp_path / "rows.json").read_text())["plan"]["full"] is full


def test_shares_are_of_the_best_peak_of_the_run_and_refused_above_it(monkeypatch, tmp_path):
    rates = iter([1e-6, 1e-6, 1e-6, 50.0])
    monkeypatch.setattr(peaks, "measure_peak", lambda dtype, threads: next(rates, 50.0))
    monkeypatch.setattr(peaks, "sample_peak", lambda dtype, threads: PeakSample(1e-6, True))
    result = run(*QUICK, "--modes", "gru,lstm", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    assert [row["peak"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [50.0, 50.0]
    assert "no share" not in result.output
    monkeypatch.setattr(peaks, "measure_peak", lambda dtype, threads: 1e-6)
    result = run(*QUICK)
    assert result.exit_code == 0 and "tiny lstm inference, fused: no share of the FMA peak" in result.output


def test_a_wrong_result_is_said_and_fails(monkeypatch, tmp_path):
    def make(work):
        right = contenders.non_fused(work)
        return lambda batch: lambda: {name: array + 0.01 for name, array in right(batch)().items()}

    monkeypatch.setitem(PHASES["inference"].makers, FUSED, make)
    result = run(*QUICK, "--json", tmp_path / "rows.json", "--plot", tmp_path / "rows.png")
    assert result.exit_code == 1
    assert "wrong tiny lstm inference: fused: y[" in result.output
    [row] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["wrong"] and not row["seconds"]


def test_without_options_the_published_tables_are_planned(monkeypatch):
    plans = []
    monkeypatch.setattr("fusedrnn.cli.bench.run", lambda plan, *files: plans.append(plan) or True)
    assert run("bench").exit_code == 0
    [plan] = plans
    assert [case.name for case in plan.cases] == ["ds2", "ds2-5bi"]
    assert list(plan.modes) == ["lstm", "gru", "rnn_relu", "rnn_tanh"]
    assert [phase.name for phase in plan.phases] == ["inference", "training"]
    assert (plan.dtype, plan.threads, plan.torch, plan.data) == ("float32", fusedrnn.get_num_threads(), False, None)


def test_bench_runs_the_users_data(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 2, 3)))
    result = run(*QUICK, "--data", tmp_path / "x.npy", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "rows.json").read_text())
    case = written["rows"][0]["case"]
    assert (case["T"], case["N"], case["I"], case["H"]) == (4, 2, 3, CASES["tiny"].H)
    assert written["plan"]["input"] == "user"


def test_bench_runs_other_sizes(tmp_path):
    result = run(*QUICK, "--steps", "3, 5", "--batch", "1,4", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    cases = [row["case"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert [(case["T"], case["N"]) for case in cases] == [(3, 1), (3, 4), (5, 1), (5, 4)]
    assert {case["I"] for case in cases} == {CASES["tiny"].I}


@pytest.mark.parametrize(
    ("options", "contenders"),
    [
        (["--torch"], ["non-fused", "fused", "torch.nn", "fused in torch"]),
        (["--only-torch"], ["torch.nn", "fused in torch"]),
        (["--packed"], ["torch.nn", "fused in torch", "fused in torch, unpacked"]),
    ],
)
def test_bench_compares_modules_of_torch(tmp_path, options, contenders):
    result = run(*QUICK, *options, "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    assert "Modules of PyTorch" in result.output and ("of unpacked GFLOP/s" in result.output) == ("--packed" in options)
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["plan"]["contenders"] == list(written["rows"][0]["seconds"]) == contenders


@pytest.mark.parametrize(
    ("option", "given", "said"),
    [
        ("--cases", "tiny,huge", ["'huge'", *CASES]),
        ("--cases", ",", ["no case", *CASES]),
        ("--modes", "elman", ["'elman'", "lstm", "gru", "rnn_relu", "rnn_tanh"]),
        ("--phases", "dreaming", ["'dreaming'", "inference", "training"]),
        ("--dtype", "float16", ["'float16'", "float32", "float64"]),
        ("--data", "nowhere.npy", ["nowhere.npy", "(T, N, I)"]),
        ("--steps", "10,none", ["--steps", "'none'"]),
        ("--batch", "0", ["--batch", "'0'"]),
        ("--json", "no/such/folder.json", ["--json", "no/such"]),
        ("--plot", "rows.doc", ["--plot", "png"]),
        ("--html", "no/such/page.html", ["--html", "no/such"]),
    ],
)
def test_what_bench_refuses(option, given, said):
    result = run(*QUICK, option, given)
    assert result.exit_code == 2
    assert result.output.startswith("error: ") and "Traceback" not in result.output
    for words in said:
        assert words in result.output


def test_info_shows_the_machine():
    result = run("info")
    assert result.exit_code == 0, result.output
    for words in ("processor", "target", "vector width", "bits", "threads", "caches", "FMA peak float32", "GFLOP/s"):
        assert words in result.output
    assert f"numpy {np.__version__}" in result.output


@pytest.fixture
def quick_plans(monkeypatch):
    monkeypatch.setattr(planning, "measure_peak", lambda dtype, threads: 100.0 * threads)
    monkeypatch.setattr(planning, "measure_bandwidth", lambda threads: {"L2": 90.0, "memory": 10.0})
    monkeypatch.setattr(planning, "_SECONDS", 0.0)


@pytest.mark.parametrize("options", [(), ("--all",)], ids=str)
def test_info_shows_how_a_workload_is_shared_out(quick_plans, options):
    result = run("info", "--plan", "tiny,small", "--modes", "gru", "--threads", 2, *options)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) < 100
    for case in ("tiny", "small"):
        for way in ("inference", "training, forward", "training, backward"):
            assert f"{case} GRU, {way}" in result.output
    for ways in ("one thread", "2 row groups", "2 unit groups"):
        assert sum(ways in line for line in lines if " ms" in line) == 6
    chosen = [line for line in lines if line.startswith(">")]
    assert len(chosen) == 6 and all(line.count(" ms") == 3 for line in chosen)
    others = [line for line in lines if " ms" in line and line not in chosen]
    assert all(line.count(" ms") == (3 if options else 2) for line in others)
    assert "recurrent GEMM" in result.output and "chunk" in result.output and "tile" in result.output


def test_info_measures_a_grid_that_is_forced(monkeypatch):
    seen, plain = [], partition.choose_grid
    monkeypatch.setattr(planning, "_SECONDS", 0.0)
    monkeypatch.setattr(partition, "choose_grid", lambda *args: seen.append(plain(*args)) or seen[-1])
    case = CASES["tiny"]
    for way in ("inference", "training", "backward"):
        assert planning.measure(case.spec("gru"), case, way, (1, 1, 2)) > 0
    assert seen and set(seen) == {(1, 1, 2)}


def test_info_says_what_it_does_not_know():
    wrong = ("--plan", "nonsense", "ds2"), ("--modes", "peephole", "lstm"), ("--dtype", "int8", "float64")
    for option, value, valid in wrong:
        result = run("info", "--plan", "tiny", option, value)
        assert result.exit_code == 2
        assert repr(value) in result.output and valid in result.output


def test_warmup_compiles_what_it_is_told():
    result = run("warmup", "--modes", "lstm", "--dtypes", "float32")
    assert result.exit_code == 0, result.output
    assert "lstm float32" in result.output and "gru" not in result.output
    result = run("warmup", "--modes", "lstm", "--dtypes", "int8")
    assert result.exit_code == 2
    assert "'int8'" in result.output and "float64" in result.output


@pytest.mark.parametrize("package", ["typer", "rich", "threadpoolctl", "matplotlib"])
def test_a_missing_extra_is_named(package):
    code = f"import sys; sys.modules[{package!r}] = None; from fusedrnn.cli import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.strip() == f"error: the command line needs {package}: pip install 'fusedrnn[bench]'"


def test_another_missing_module_is_not_blamed_on_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fusedrnn.cli.app", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main()


@pytest.mark.parametrize(
    ("name", "value"), [("FUSEDRNN_TARGET", "mmx"), ("FUSEDRNN_DEBUG", "loud"), ("FUSEDRNN_NUM_THREADS", "none")]
)
def test_a_bad_environment_is_said_in_a_line(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 2
    assert f"error: {name} must be" in result.output


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_file_that_cannot_be_written_is_refused_before_measuring(option, tmp_path):
    result = run("bench", "--cases", "tiny", option, str(tmp_path))
    assert result.exit_code == 2
    assert "it is a folder; expected the path of a file" in result.output
    result = run("bench", "--cases", "tiny", option, str(tmp_path / ("n" * 300)))
    assert result.exit_code == 2 and "it cannot be written" in result.output
    assert not list(tmp_path.iterdir())
