"""char_lm: the command, its output, its files and its errors."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fusedrnn
from examples.char_lm import run as command
from examples.char_lm import training
from examples.char_lm.__main__ import app
from examples.char_lm.model import CONTENDERS, FUSED, TORCH
from examples.char_lm.results import Results
from examples.char_lm.settings import Settings
from fusedrnn.bench import data

ROOT = Path(__file__).resolve().parents[2]


SMALL = Settings(hidden=32, steps=12, batch=4, length=10, threads=1, sample=40)


QUICK = ["--hidden", "24", "--steps", "6", "--batch", "4", "--length", "10", "--threads", "1", "--sample", "30"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_example_prints_and_writes_its_files(tmp_path):
    written = []
    for name in ("first", "second"):
        result = run(*QUICK, "--json", tmp_path / name, "--plot", tmp_path / "loss.png")
        assert result.exit_code == 0, result.output
        written.append(json.loads((tmp_path / name).read_text()))
    for words in ("fused / torch.nn", "tokens/s", "end to end", "held-out", "loss curves", "fused: step 6/6"):
        assert words in result.output
    assert written[0]["sample"] in result.output
    assert (tmp_path / "loss.png").stat().st_size > 0
    for figures in written:
        assert not figures["interrupted"] and len(figures["sample"]) == 30
        assert set(figures["fused_over_torch"]) == {"median_step", "end_to_end"}
        assert figures["largest_difference"] < 1e-3
        for kind in ("bits", "seconds", "at"):
            assert [len(figures["runs"][name][kind]) for name in CONTENDERS] == [6, 6]
    assert written[0]["sample"] == written[1]["sample"]
    assert written[0]["runs"][FUSED]["bits"] == written[1]["runs"][FUSED]["bits"]


def test_the_example_learns_from_the_users_text(tmp_path):
    (tmp_path / "own.txt").write_text("abc[red]\n" * 200, encoding="utf-8")
    result = run(*QUICK, "--text", tmp_path / "own.txt", "--cell", "lstm", "--json", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["text"]["name"] == "own.txt" and figures["text"]["alphabet"] == "\n[]abcder"
    assert figures["settings"]["cell"] == "lstm"
    assert figures["sample"] in result.output


def test_a_terminal_gets_a_bar_for_each_run(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run(*QUICK)
    assert result.exit_code == 0, result.output
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", result.output)
    for name in CONTENDERS:
        assert re.search(rf"{re.escape(name)} +━+ +6/6", plain)
    assert "step 6/6" not in plain


def test_threads_are_as_they_were():
    before = torch.get_num_threads(), fusedrnn.get_num_threads()
    used = []
    with pytest.MonkeyPatch.context() as patch:
        threads = lambda *_: used.append((torch.get_num_threads(), fusedrnn.get_num_threads())) or 1.0  # noqa: E731
        patch.setattr(training, "validate", threads)
        assert run(*QUICK, "--threads", before[0] + 1).exit_code == 0
    assert used == [(before[0] + 1,) * 2] * 2
    assert (torch.get_num_threads(), fusedrnn.get_num_threads()) == before


def test_without_options_the_defaults_are_run(monkeypatch):
    calls = []
    monkeypatch.setattr(command, "run", lambda *arguments: calls.append(arguments) or Results(arguments[0]))
    assert run().exit_code == 0
    [(settings, corpus, json_path, plot_path)] = calls
    assert settings == Settings(threads=fusedrnn.get_num_threads())
    assert corpus.name == "Python's help" and json_path is plot_path is None


@pytest.mark.parametrize(("name", "steps"), [(TORCH, 0), (TORCH, 2), (FUSED, 0), (FUSED, 2)])
def test_an_interrupt_ends_it_with_what_was_measured(monkeypatch, tmp_path, name, steps):
    def stop(run):
        if run.name == name and len(run.steps) == steps + 1:
            run.steps.pop()  # as if it had come in the middle of this step
            raise KeyboardInterrupt

    plain = training.train
    monkeypatch.setattr(training, "train", lambda *arguments: plain(*arguments[:4], stop))
    result = run(*QUICK, "--json", tmp_path / "figures.json", "--plot", tmp_path / "loss.png")
    assert result.exit_code == 130, result.output
    assert "interrupted" in result.output and "Traceback" not in result.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    expected = ({TORCH: 6} if name == FUSED else {}) | ({name: steps} if steps else {})
    assert {who: len(one["bits"]) for who, one in figures["runs"].items()} == expected
    assert figures["interrupted"] and figures["sample"] is None
    assert (tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_a_real_interrupt(tmp_path):
    path = tmp_path / "figures.json"
    code = "from examples.char_lm.__main__ import app; app()"
    options = [*QUICK, "--steps", "3000", "--json", str(path)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, *options], text=True, cwd=ROOT, **pipes) as process:
        assert process.stderr.readline().startswith("torch.nn: step 300/3000")
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in stderr
    assert json.loads(path.read_text())["interrupted"]


@pytest.mark.parametrize(
    ("option", "value", "messages"),
    [
        ("--cell", "elman", ["'elman'", "gru, lstm"]),
        ("--lr", "0", ["--lr", "above 0"]),
        ("--lr", "nan", ["--lr", "nan"]),
        ("--dropout", "1", ["--dropout", "below 1"]),
        ("--temperature", "-1", ["--temperature", "0 or more"]),
        ("--temperature", "inf", ["--temperature", "finite"]),
        ("--text", "nowhere.txt", ["--text nowhere.txt", "No such file"]),
        ("--batch", "100000", ["Python's help is too short", "--batch 100000"]),
        ("--json", "no/such/folder.json", ["--json", "no/such"]),
        ("--plot", "loss.doc", ["--plot", "png"]),
    ],
)
def test_invalid_options(option, value, messages):
    result = run(*QUICK, option, value)
    assert result.exit_code == 2
    [message] = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.output
    for words in messages:
        assert words in message


@pytest.mark.parametrize("option", ["--hidden", "--layers", "--steps", "--batch", "--length", "--threads"])
def test_sizes_begin_at_one(option):
    result = run(*QUICK, option, "0")
    assert result.exit_code == 2 and option in result.output
    with pytest.raises(ValueError, match=f"{option} must be 1 or more; got 0"):
        replace(SMALL, **{option[2:]: 0})


def test_a_loss_without_bounds_is_said(monkeypatch):
    plain = training._loss
    monkeypatch.setattr(training, "_loss", lambda *arguments: plain(*arguments) * math.inf)
    result = run(*QUICK)
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == "error: torch.nn: the loss is inf at step 1; try a lower --lr than 0.004"


def test_settings_that_do_not_fit_each_other():
    with pytest.raises(ValueError, match="--layers is 1"):
        replace(SMALL, layers=1, dropout=0.5)
    with pytest.raises(ValueError, match="--seed must be 0 or more"):
        replace(SMALL, seed=-1)


@pytest.mark.parametrize("content", [b"", b"a", b"short", b"\xff\xfe\x00"])
def test_a_file_that_will_not_do(tmp_path, content):
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    result = run(*QUICK, "--text", path)
    assert result.exit_code == 2
    assert "not UTF-8" in result.output if content[:1] == b"\xff" else "too short" in result.output


def test_a_python_without_its_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    data.text.cache_clear()
    result = run(*QUICK)
    assert result.exit_code == 2
    assert result.output.startswith("error: this Python was installed without pydoc_data; give your own with --text")


def test_a_missing_torch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run(*QUICK)
    assert result.exit_code == 2
    expected = "error: examples.char_lm needs PyTorch: install fusedrnn with its extra 'torch'"
    assert result.output.strip() == expected
