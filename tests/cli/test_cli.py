"""The command line: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fusedrnn
from fusedrnn import cells, cli
from fusedrnn.bench import contenders, extrapolate, peaks, timing
from fusedrnn.bench.contenders import FUSED, NON_FUSED, PHASES
from fusedrnn.cli import bench, console, info, warmup
from fusedrnn.cli import plan as plan_command
from fusedrnn.cli.app import app
from fusedrnn.cli.cells import load_cells
from fusedrnn.cli.console import check_writable
from fusedrnn.engines.cpu import tuning
from fusedrnn.engines.cpu.plan import partition
from fusedrnn.number_formats import INT8_MAX_PRODUCTS
from fusedrnn.runtime.machine_rates import MachineRates
from fusedrnn.runtime.peak import PeakSample
from fusedrnn.testing.cases import CASES

QUICK = [
    *("bench", "--cases", "tiny", "--modes", "lstm", "--phases", "inference"),
    *("--seconds", "0", "--threads", "1"),
]


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    for module in (peaks, info):
        monkeypatch.setattr(module, "measure_peak", lambda number_format, threads, sample=None: 100.0 * threads)
    monkeypatch.setattr(peaks, "sample_peak", lambda dtype, threads: PeakSample(100.0 * threads, True))
    monkeypatch.setattr(bench, "measure_bandwidth", lambda threads: {"memory": 10.0 * threads})
    rates = MachineRates(100.0, 90.0, 0.0, 10.0)
    for module in (info, warmup):
        monkeypatch.setattr(module, "measured_rates", lambda *, anew=False: rates)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_bench_prints_a_table_and_writes_its_files(tmp_path):
    result = run(*QUICK, "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    assert "tiny LSTM-Inference" in result.output and "wrong" not in result.output
    assert "tiny lstm inference: samples/sec" in result.output
    figures = json.loads((tmp_path / "rows.json").read_text())
    [row] = figures["rows"]
    assert row["mode"] == "lstm" and row["threads"] == 1 and row["peak"] == 100.0
    assert figures["bandwidth"] == {"memory": 10.0}


def test_bench_leaves_the_number_of_threads_as_it_was():
    before = fusedrnn.get_num_threads()
    assert run(*QUICK[:-1], before + 1).exit_code == 0
    assert fusedrnn.get_num_threads() == before


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_lines_or_a_bar_with_the_remaining_time(monkeypatch, capsys, terminal):
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    with console.steps(2) as progress:
        for name in ("first", "second"):
            progress.say(f"running {name}")
            progress.done(f"{name}: [done]")
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    if terminal:
        assert "first: [done]" in printed and "2/2" in printed and re.search(r"\d:\d\d:\d\d", printed)
    else:
        assert printed.splitlines() == ["first: [done] (1/2)", "second: [done] (2/2)"]


def test_help_says_how_samples_are_taken():
    text = " ".join(run("bench", "--help").output.split())
    assert "ten seconds" in text and "inference,training" in text
    assert (timing.ONE_SAMPLE_SECONDS, extrapolate.SLOW) == (10.0, 3.0) and 1.0 <= extrapolate.TARGET_SECONDS <= 2.0
    assert "more than three seconds" in text and "one or two seconds" in text and "--full" in text


def test_bench_full_runs_all_steps(tmp_path):
    for options, full in ((), False), (("--full",), True):
        assert run(*QUICK, *options, "--json", tmp_path / "rows.json").exit_code == 0
        assert json.loads((tmp_path / "rows.json").read_text())["plan"]["full"] is full


def test_shares_relate_to_the_best_peak_of_the_run(monkeypatch, tmp_path):
    rates = iter([1e-6, 1e-6, 1e-6, 500.0])
    monkeypatch.setattr(peaks, "measure_peak", lambda dtype, threads: next(rates, 500.0))
    monkeypatch.setattr(peaks, "sample_peak", lambda dtype, threads: PeakSample(1e-6, True))
    result = run(*QUICK, "--modes", "gru,lstm", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    assert [row["peak"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [500.0, 500.0]
    assert "no share" not in result.output
    monkeypatch.setattr(peaks, "measure_peak", lambda dtype, threads: 1e-6)
    result = run(*QUICK)
    assert result.exit_code == 0 and "tiny lstm inference, fused: no share of the FMA peak" in result.output


def test_a_wrong_result_is_printed_and_the_exit_code_is_one(monkeypatch, tmp_path):
    def make(work):
        right = contenders.non_fused(work)
        return lambda batch: lambda: {name: array + 0.01 for name, array in right(batch)().items()}

    monkeypatch.setitem(PHASES["inference"].makers, FUSED, make)
    result = run(*QUICK, "--json", tmp_path / "rows.json")
    assert result.exit_code == 1
    assert "wrong tiny lstm inference: fused: y[" in result.output
    [row] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["wrong"] and not row["seconds"]


def test_without_options_the_published_tables_are_planned(monkeypatch):
    configs = []
    monkeypatch.setattr("fusedrnn.cli.bench.run", lambda config, *files: configs.append(config) or True)
    assert run("bench").exit_code == 0
    [config] = configs
    assert [case.name for case in config.cases] == ["ds2", "ds2-5bi"]
    assert list(config.modes) == ["lstm", "gru", "rnn_relu", "rnn_tanh"]
    assert [phase.name for phase in config.phases] == ["inference", "training"]
    assert (config.dtype, config.contenders, config.data) == ("float32", (NON_FUSED, FUSED), None)
    assert config.threads == fusedrnn.get_num_threads()


def test_bench_runs_the_users_data(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 2, 3)))
    result = run(*QUICK, "--data", tmp_path / "x.npy", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "rows.json").read_text())
    case = written["rows"][0]["case"]
    assert (case["T"], case["N"], case["I"], case["H"]) == (4, 2, 3, CASES["tiny"].H)
    assert written["plan"]["input"] == "user"


def test_bench_runs_other_sizes(tmp_path):
    result = run(*QUICK, "--steps", "3, 5,3", "--batch", "1,4,01", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    cases = [row["case"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert [(case["T"], case["N"]) for case in cases] == [(3, 1), (3, 4), (5, 1), (5, 4)]
    assert {case["I"] for case in cases} == {CASES["tiny"].I}


def test_bench_runs_other_numbers_of_units(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 2, 3)))
    result = run(*QUICK, "--data", tmp_path / "x.npy", "--hidden", "7,5", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    cases = [row["case"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert [[case[size] for size in "TNIH"] for case in cases] == [[4, 2, 3, 7], [4, 2, 3, 5]]


def test_bench_runs_the_users_cells(tmp_path):
    (tmp_path / "cells.py").write_text("from fusedrnn.cells import ran\nfrom fusedrnn.cells import slstm as mine\n")
    sizes = ("--cases", "tiny", "--steps", 3, "--phases", "training", "--seconds", 0, "--threads", 1)
    result = run("bench", "--cell", tmp_path / "cells.py:mine", *sizes, "--torch", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    assert "tiny slstm-Training" in result.output and "torch loop" in result.output
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["plan"]["modes"] == ["slstm"]
    [row] = written["rows"]
    assert row["wrong"] is None
    assert set(row["seconds"]) == {"non-fused", "fused", "torch.nn", "fused in torch"}
    references = f"{tmp_path / 'cells.py'}:ran, fusedrnn.cells:slstm,,fusedrnn.cells:slstm"
    assert load_cells(references) == [cells.ran, cells.slstm]


@pytest.mark.parametrize("option", ["--torch", "--only-torch", "--packed"])
def test_cells_with_masks_are_not_compared_with_torch_in_training(monkeypatch, option):
    """Each would draw masks of its own, and so right results would differ."""
    monkeypatch.setattr(bench, "run", lambda *arguments: True)
    options = "bench", "--cell", "fusedrnn.cells:dropout_lstm", "--cases", "tiny"
    result = run(*options, option)
    assert result.exit_code == 2 and "cannot be used with the cell dropout_lstm in training" in result.output
    assert run(*options).exit_code == run(*options, option, "--phases", "inference").exit_code == 0


def test_formats_that_do_not_have_a_network(tmp_path):
    (tmp_path / "heads.py").write_text("from fusedrnn.cells import flash_gru\nheads = flash_gru.with_heads(2)\n")
    np.save(tmp_path / "wide.npy", np.ones((1, 1, INT8_MAX_PRODUCTS + 1), np.float32))
    for options in (("--cell", tmp_path / "heads.py:heads"), ("--data", tmp_path / "wide.npy")):
        result = run("bench", "--cases", "tiny", "--compute", "int8", *options)
        assert result.exit_code == 2
        assert result.output.startswith("error: ") and "compute='int8'" in result.output


def test_a_cell_file_that_exits(tmp_path):
    (tmp_path / "exits.py").write_text("import sys; sys.exit(3)")
    result = run("bench", "--cell", f"{tmp_path / 'exits.py'}:ran")
    assert result.exit_code == 2 and "SystemExit: 3" in result.output.replace("\n", " ")
    assert "cells_in_exits" not in sys.modules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cell", "ran"), "--cell must be path.py:name or module:name; got 'ran'"),
        (("--cell", ","), "--cell must be path.py:name or module:name; got ','"),
        (("--cell", "nowhere.py:ran"), "--cell nowhere.py:ran: FileNotFoundError"),
        (("--cell", "fusedrnn.cell:cell"), "fusedrnn.cell has no cell 'cell'; its cells: none"),
        (("--cell", "fusedrnn.cells:ran", "--variants"), "--variants cannot be used with --cell"),
        (("--cell", "fusedrnn.cells:ran", "--modes", "lstm"), "--modes cannot be used with --cell"),
    ],
)
def test_cells_that_do_not_exist(options, message):
    result = run("bench", *options)
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")


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
    "options",
    [("--only-torch",), ("--packed",), ("--backends", "reference"), ("--variants",), ("--compute", "bfloat16")],
    ids=lambda options: options[0],
)
def test_full_needs_the_network_cell_by_cell(monkeypatch, options):
    monkeypatch.setattr(bench, "run", lambda *arguments: True)
    result = run(*QUICK, *options, "--full")
    assert result.exit_code == 2 and result.output.startswith("error: --full cannot be used with")
    assert run(*QUICK, *options).exit_code == run(*QUICK, "--torch", "--full").exit_code == 0


@pytest.mark.parametrize(
    ("option", "value", "messages"),
    [
        ("--cases", "tiny,huge", ["'huge'", *CASES]),
        ("--cases", ",", ["no case", *CASES]),
        ("--modes", "elman", ["'elman'", "lstm", "gru", "rnn_relu", "rnn_tanh"]),
        ("--phases", "dreaming", ["'dreaming'", "inference", "training"]),
        ("--dtype", "float16", ["'float16'", "float32", "float64"]),
        ("--data", "nowhere.npy", ["nowhere.npy", "(T, N, I)"]),
        ("--steps", "10,none", ["--steps", "'none'"]),
        ("--batch", "0", ["--batch", "'0'"]),
        ("--steps", "1000000000000", ["tiny with T = 1000000000000, N = 16 and H = 32", "GiB of memory"]),
        ("--batch", "3,281474976710656", ["tiny with T = 20, N = 281474976710656 and H = 32", "GiB of memory"]),
        ("--batch", "281474976710657", ["--batch", "'281474976710657'"]),
        ("--steps", "9" * 5000, ["--steps", "'999"]),
        ("--hidden", "8,-1", ["--hidden", "'-1'"]),
        ("--hidden", "1000000", ["tiny with T = 20, N = 16 and H = 1000000", "GiB of memory"]),
        ("--json", "no/such/folder.json", ["--json", "no/such"]),
    ],
)
def test_bench_rejects_invalid_options(option, value, messages):
    result = run(*QUICK, option, value)
    assert result.exit_code == 2
    assert result.output.startswith("error: ") and "Traceback" not in result.output
    for words in messages:
        assert words in result.output


def test_seconds_are_finite(monkeypatch):
    monkeypatch.setattr(bench, "run", lambda *arguments: pytest.fail("it was accepted"))
    result = run(*QUICK, "--seconds", "inf")
    assert result.exit_code == 2 and "inf is not a finite number" in result.output


def test_a_row_that_cannot_be_allocated_is_one_line(monkeypatch):
    """What contenders allocate beyond the arguments is known only when they run."""

    def run_out(work):
        raise MemoryError("Unable to allocate 7.00 TiB")

    monkeypatch.setitem(PHASES["inference"].makers, FUSED, run_out)
    result = run(*QUICK)
    assert result.exit_code == 2
    assert result.output == "error: tiny lstm inference does not fit the memory: Unable to allocate 7.00 TiB\n"


def test_info_says_that_the_folder_of_kernels_cannot_be_used(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    [line] = [value for name, value in info._lines(2) if name == "kernels kept in"]
    assert line.startswith(f"memory only: {tmp_path / 'file' / 'kernels'} is not usable: ")
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(tmp_path / "kernels"))
    [line] = [value for name, value in info._lines(2) if name == "kernels kept in"]
    assert line == str(tmp_path / "kernels")


def test_info_shows_the_machine():
    result = run("info", "--threads", 3)
    assert result.exit_code == 0, result.output
    assert re.search(r"threads +3 *\n", result.output) and re.search(r", \d+\.\d on 3 *\n", result.output)
    for words in ("processor", "target", "vector width", "bits", "threads", "caches", "FMA peak float32", "GFLOP/s"):
        assert words in result.output
    assert "100.0 GFLOP/s, reading L2 90, memory 10 GB/s on 1 thread, as measured once" in " ".join(
        result.output.split()
    )
    assert f"numpy {np.__version__}" in result.output


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("permitted", [True, False])
def test_info_shows_the_peak_of_each_format(monkeypatch, has_amx, permitted):
    monkeypatch.setenv("FUSEDRNN_TARGET", "generic")
    known = {name: has_amx and name.startswith("AMX") for name in info.dot_product_sets()}
    monkeypatch.setattr(info, "dot_product_sets", lambda: known)
    monkeypatch.setattr(info, "request_permission", lambda: permitted)
    lines = dict(info._lines(2))
    assert lines["BF16 peak"] == "that of FMA: widened to float32"
    assert lines["INT8 peak"] == "100.0 Gop/s on 1 thread, 200.0 on 2, by products of int16 by pairs"
    amx = "no" if not has_amx else "yes" if permitted else "yes, but not permitted"
    expected = f"AVX-512 BF16 no, AVX-512 VNNI no, AVX-VNNI no, AMX-BF16 {amx}, AMX-INT8 {amx}"
    assert lines["dot products"] == expected


@pytest.mark.parametrize("everything", [False, True])
def test_info_shows_how_a_workload_is_divided(monkeypatch, capsys, everything):
    monkeypatch.setattr(tuning, "kept_rates", lambda target: MachineRates(100.0, 90.0, 0.0, 12.0))
    cases = [CASES["tiny"], CASES["small"]]
    plan_command.print_plans(plan_command.PlanConfig(cases, ["gru"], "float32", 2, everything, seconds=0.0))
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert max(map(len, lines)) < 100
    for case in ("tiny", "small"):
        for phase in ("inference", "training, forward", "training, backward"):
            assert f"{case} GRU, {phase}" in output
    for partition_name in ("one thread", "2 row groups", "2 unit groups"):
        assert sum(partition_name in line for line in lines if " ms" in line) == 6
    chosen = [line for line in lines if line.startswith(">")]
    assert len(chosen) == 6 and all(line.count(" ms") == 3 for line in chosen)
    others = [line for line in lines if " ms" in line and line not in chosen]
    assert all(line.count(" ms") == (3 if everything else 2) for line in others)
    [memory] = [line.split() for line in lines if line.startswith("memory read")]
    assert memory[-2:] == ["10.0", "12.0"]
    assert "recurrent GEMM" in output and "chunk" in output and "tile" in output


def test_info_passes_its_options_to_the_plan(monkeypatch):
    configs, measured = [], []
    monkeypatch.setattr(info, "print_plans", configs.append)
    monkeypatch.setattr(info, "measured_rates", lambda *, anew=False: measured.append(anew))
    for options in ((), ("--all", "--measure")):
        result = run("info", "--plan", "tiny,small", "--modes", "gru", "--threads", 2, *options)
        assert result.exit_code == 0, result.output
    cases = [CASES["tiny"], CASES["small"]]
    expected = plan_command.PlanConfig(cases, ["gru"], "float32", 2, everything=False)
    assert configs == [expected, replace(expected, everything=True)] and measured == [False, True]


def test_info_measures_a_grid_that_is_forced(monkeypatch):
    chosen, plain = [], partition.choose_share
    monkeypatch.setattr(partition, "choose_share", lambda *args: chosen.append(plain(*args)) or chosen[-1])
    case = CASES["tiny"]
    for phase in ("inference", "training", "backward"):
        assert plan_command.measure(case.spec("gru"), case, phase, (1, 1, 2), duration=0.0) > 0
    assert chosen and {share.grid for share, _ in chosen} == {(1, 1, 2)}


def test_info_rejects_invalid_options():
    wrong = ("--plan", "nonsense", "ds2"), ("--modes", "peephole", "lstm"), ("--dtype", "int8", "float64")
    for option, value, valid in wrong:
        result = run("info", "--plan", "tiny", option, value)
        assert result.exit_code == 2
        assert repr(value) in result.output and valid in result.output


@pytest.mark.parametrize("options", [("--modes", "lstm"), ("--dtype", "float64"), ("--all",)])
def test_options_of_plans_need_a_plan(options):
    result = run("info", *options)
    assert result.exit_code == 2 and f"{options[0]} cannot be used without --plan" in result.output


def test_warmup_needs_a_folder(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", "")
    result = run("warmup", "--modes", "lstm", "--dtypes", "float32")
    assert result.exit_code == 2 and "error: no kernels can be kept: FUSEDRNN_CACHE_DIR is empty" in result.output


def test_warmup_compiles_the_given_cells():
    result = run("warmup", "--modes", "lstm", "--dtypes", "float32")
    assert result.exit_code == 0, result.output
    assert "lstm float32" in result.output and "gru" not in result.output
    result = run("warmup", "--modes", "lstm", "--dtypes", "int8")
    assert result.exit_code == 2
    assert "'int8'" in result.output and "float64" in result.output


def test_warmup_of_formats_and_cells(monkeypatch):
    """Of cells of one's own, also with heads and with the input itself in the equations; int8 has no training."""
    compiled = []
    monkeypatch.setattr(fusedrnn.RNNOp, "compile", lambda op, training: compiled.append((op.spec, training)))
    names = "fusedrnn.cells:sru,fusedrnn.cells:dreamer_gru"
    result = run("warmup", "--cell", names, "--dtypes", "float32", "--compute", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "sru float32" in result.output and "dreamer_gru bfloat16" in result.output
    expected = {(mode, compute) for mode in (cells.sru, cells.dreamer_gru) for compute in (None, "bfloat16")}
    assert {(spec.mode, spec.compute) for spec, _ in compiled} == expected
    assert {spec.hidden_size // spec.heads for spec, _ in compiled} == {1, 64}
    assert all(training for _, training in compiled)
    compiled.clear()
    run("warmup", "--modes", "gru", "--dtypes", "float32", "--compute", "int8,int8_weights")
    assert {(spec.compute, training) for spec, training in compiled} == {
        (None, True), ("int8", False), ("int8_weights", False)
    }  # fmt: skip


@pytest.mark.parametrize(
    "options, error",
    [
        (("--compute", "int4"), "unknown format 'int4'"),
        (("--cell", "fusedrnn.cells:nothing"), "has no cell 'nothing'"),
        (("--cell", "fusedrnn.cells:ran", "--modes", "lstm"), "--modes cannot be used with --cell"),
    ],
)
def test_warmup_refuses(options, error):
    result = run("warmup", *options)
    assert result.exit_code == 2 and error in result.output, result.output


def test_version():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"fusedrnn {fusedrnn.__version__}\n")


@pytest.mark.parametrize("package", ["typer", "rich", "threadpoolctl"])
def test_a_missing_extra_is_named(package):
    code = f"import sys; sys.modules[{package!r}] = None; from fusedrnn.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: the command line needs {package}: install fusedrnn with its extra 'bench'"


def test_a_missing_module_of_ours_is_not_blamed_on_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fusedrnn.cli.app", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main()


@pytest.mark.parametrize(
    ("name", "value"), [("FUSEDRNN_TARGET", "mmx"), ("FUSEDRNN_DEBUG", "loud"), ("FUSEDRNN_NUM_THREADS", "none")]
)
def test_an_invalid_environment_variable_is_one_line(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 2
    assert f"error: {name} must be" in result.output


@pytest.mark.parametrize("option", ["--json"])
def test_an_unwritable_file_is_rejected_before_measuring(option, tmp_path):
    result = run("bench", "--cases", "tiny", option, str(tmp_path))
    assert result.exit_code == 2
    assert "it is a folder; expected the path of a file" in result.output
    result = run("bench", "--cases", "tiny", option, str(tmp_path / ("n" * 300)))
    assert result.exit_code == 2 and "it cannot be written" in result.output
    assert not list(tmp_path.iterdir())


def test_a_link_to_a_new_file_stays(tmp_path):
    link, target = tmp_path / "latest.json", tmp_path / "run.json"
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("links need a privilege here")
    check_writable("--json", link)
    assert link.is_symlink() and not target.exists()


@pytest.mark.parametrize("package", ["torch", "matplotlib"])
def test_the_command_line_does_not_import(package):
    code = f"import sys, fusedrnn.cli.app; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fusedrnn", "info", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage: python -m fusedrnn info" in done.stdout, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_in_one_line():
    result = run(*QUICK, "--json", "/dev/full")
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert "error: --json /dev/full: it cannot be written: No space left on device" in result.output


# ---- standard output


def command(*arguments: str, streams: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a process of its own; ``streams`` redirects its output, in the shell's words."""
    line = f"exec {shlex.join([sys.executable, '-m', 'fusedrnn', *arguments])} {streams}"
    return subprocess.run(["sh", "-c", line], env=os.environ | variables, capture_output=True, timeout=300)


@pytest.mark.parametrize("encoding", ["ascii", "cp932", "latin-1"])
@pytest.mark.parametrize("arguments", [QUICK, ["bench", "--help"]], ids=["bench", "help"])
def test_characters_that_an_encoding_lacks_are_replaced(arguments, encoding):
    done = command(*arguments, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode(encoding)
    assert "Usage:" in text or "tiny LSTM-Inference" in text


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes streams")
@pytest.mark.parametrize("streams", [">&-", ">&- 2>&-"])
def test_closed_streams(streams):
    done = command(*QUICK, streams=streams)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [QUICK, ["--help"]], ids=["bench", "help"])
def test_output_that_cannot_be_written_is_an_error_in_one_line(arguments):
    done = command(*arguments, streams="> /dev/full")
    assert done.returncode == 2
    last = done.stderr.decode().splitlines()[-1]
    assert last == "error: standard output cannot be written: No space left on device"
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_other_errors_of_the_system_are_not_blamed_on_the_output(monkeypatch):
    def fail():
        raise OSError(5, "other")

    monkeypatch.setattr("fusedrnn.cli.app.app", fail)
    with pytest.raises(OSError, match="other"):
        cli.main()
