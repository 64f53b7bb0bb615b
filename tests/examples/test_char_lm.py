"""The example char_lm: its text, its training, its output and its errors. Speed is not tested."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fusedrnn
import torch
from examples.char_lm import run as command
from examples.char_lm import training
from examples.char_lm.__main__ import app
from examples.char_lm.model import CONTENDERS, FUSED, TORCH, CharacterModel, build
from examples.char_lm.results import Results, Run, Step
from examples.char_lm.settings import CELLS, Settings
from examples.char_lm.text import Corpus, load, streams, windows
from fusedrnn.bench import data

ROOT = Path(__file__).resolve().parents[2]
SMALL = Settings(hidden=32, steps=12, batch=4, length=10, threads=1, sample=40)
QUICK = ["--hidden", "24", "--steps", "6", "--batch", "4", "--length", "10", "--threads", "1", "--sample", "30"]


@pytest.fixture(scope="module")
def english():
    return load(None)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these gain nothing from a second, and lose where something else runs on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]), fusedrnn.thread_limits(1):
        yield
    torch.set_num_threads(before)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def trained(contender, corpus, settings, dtype=torch.float32):
    model, losses = build(contender, len(corpus.alphabet), settings).to(dtype), Run(contender)
    training.train(model, corpus, settings, losses)
    return model, losses


def bits(losses):
    return np.array([step.bits for step in losses.steps])


# Text


def test_the_text_is_english(english):
    words = english.decode(english.train).lower().split()
    commonest = {word for word, _ in Counter(words).most_common(20)}
    assert {"the", "of", "is", "to", "a"} <= commonest
    assert len(words) > 10_000


def test_a_corpus_is_its_text():
    text = "Zwölf Boxkämpfer 🥊 jagen Viktor, quer über den großen Sylter Deich. " * 3
    corpus = Corpus.of(text, "pangram")
    assert corpus.decode(np.concatenate([corpus.train, corpus.held_out])) == text
    assert corpus.alphabet == "".join(sorted(set(text)))
    assert len(corpus.held_out) == len(text) // 20
    assert corpus.train.dtype == np.int64


def test_a_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes("\ufeffdéjà\nvu\n".encode())
    assert load(path).decode(load(path).train) == "déjà\nvu\n"


@pytest.mark.parametrize(("size", "batch"), [(1, 1), (23, 1), (24, 4), (27, 4)])
def test_streams_run_on_from_top_to_bottom(size, batch):
    codes = np.arange(size)
    columns = streams(codes, batch)
    assert columns.shape == (size // batch, batch)
    assert np.array_equal(columns.T.ravel(), codes[: size // batch * batch])


@pytest.mark.parametrize(("rows", "length"), [(13, 4), (12, 4), (9, 4), (5, 4), (3, 4), (2, 1)])
def test_windows_leave_no_gap(rows, length):
    columns = np.arange(2 * rows).reshape(2, rows).T
    pairs = list(windows(columns, length))
    assert np.array_equal(np.concatenate([x for x, _ in pairs]), columns[:-1])
    assert np.array_equal(np.concatenate([target for _, target in pairs]), columns[1:])
    assert all(len(x) == len(target) == length for x, target in pairs[:-1])
    assert 1 <= len(pairs[-1][0]) <= length


def test_batches_are_of_one_size_and_start_again():
    corpus = replace(Corpus.of("x", "x"), train=np.arange(2 * 12))
    source = training.batches(corpus, replace(SMALL, batch=2, length=5))
    for _ in range(2):
        for begin in (0, 5):
            restarted, x, target = next(source)
            assert restarted == (begin == 0)
            assert x.tolist() == [[begin + t, 12 + begin + t] for t in range(5)]
            assert torch.equal(target, x + 1)


# Training


@pytest.mark.parametrize("cell", CELLS)
def test_both_begin_with_the_same_parameters(english, cell):
    settings = replace(SMALL, cell=cell)
    plain, fused = (build(name, len(english.alphabet), settings) for name in CONTENDERS)
    for (name, ours), (theirs_name, theirs) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        assert name == theirs_name and torch.equal(ours, theirs)
    again = build(TORCH, len(english.alphabet), replace(settings, seed=1))
    assert not torch.equal(again.linear.weight, plain.linear.weight)


@pytest.mark.parametrize("cell", CELLS)
def test_the_fused_model_runs_fused(english, cell):
    """Its layers would fall back to torch.nn in silence."""
    nodes = []
    for name in CONTENDERS:
        model = build(name, len(english.alphabet), replace(SMALL, cell=cell))
        model.rnn.register_forward_hook(lambda module, inputs, outputs: nodes.append(outputs[0].grad_fn.name()))
        model(torch.from_numpy(english.train[:5, None]))
    assert nodes[0] != nodes[1]


class Watched(CharacterModel):
    """Keeps what goes in and what comes out."""

    def forward(self, x, state=None):
        logits, final = super().forward(x, state)
        self.seen = [*getattr(self, "seen", []), (state, final)]
        return logits, final


@pytest.mark.parametrize("cell", CELLS)
def test_the_state_is_carried_and_cut(english, cell):
    """From window to window, without its graph, and not from the end of the text to its beginning."""
    settings = replace(SMALL, cell=cell, steps=7)
    short = replace(english, train=english.train[: settings.batch * (3 * settings.length + 1)])
    model = Watched(len(english.alphabet), settings)
    training.train(model, short, settings, Run("watched"))
    for step, (state, _) in enumerate(model.seen):
        if step % 3 == 0:
            assert state is None
            continue
        before = model.seen[step - 1][1]
        pairs = zip(state, before, strict=True) if cell == "lstm" else [(state, before)]
        for state_in, state_out in pairs:
            assert torch.equal(state_in, state_out) and state_out.requires_grad and not state_in.requires_grad


@pytest.mark.parametrize("cell", CELLS)
def test_the_losses_are_those_of_torch(english, cell):
    """Fused is as near to the same training in float64 as torch.nn in float32 is.

    Both round as often, in another order, and training lets what they round grow alike, so that the errors of all
    steps together are of one size: at most twice as large is what two runs of torch.nn could be apart as well. In
    float64 the two are as near to each other as float64 is.
    """
    settings = replace(SMALL, cell=cell, steps=40)
    exact = bits(trained(TORCH, english, settings, torch.float64)[1])
    errors = {name: np.linalg.norm(bits(trained(name, english, settings)[1]) - exact) for name in CONTENDERS}
    assert 0 < errors[FUSED] <= 2 * errors[TORCH]
    assert errors[TORCH] < 1e-4  # or the bound would say nothing
    finer = np.finfo(np.float64).eps / np.finfo(np.float32).eps
    apart = np.linalg.norm(bits(trained(FUSED, english, settings, torch.float64)[1]) - exact)
    assert apart <= 4 * finer * errors[TORCH]  # here both have errors


@pytest.mark.parametrize("contender", CONTENDERS)
def test_the_loss_falls(english, contender):
    model, losses = trained(contender, english, replace(SMALL, steps=60))
    uniform = math.log2(len(english.alphabet))
    curve = bits(losses)
    assert curve[0] == pytest.approx(uniform, abs=0.5)
    assert curve[-10:].mean() < curve[0] - 1
    assert training.validate(model, english, SMALL) < curve[0] - 1


def test_times_add_up(english):
    seen = []
    model, losses = build(TORCH, len(english.alphabet), SMALL), Run("timed")
    training.train(model, english, SMALL, losses, lambda run: seen.append(run.total))
    assert seen == [step.elapsed for step in losses.steps] and len(seen) == SMALL.steps
    assert all(step.seconds > 0 for step in losses.steps)
    assert sum(step.seconds for step in losses.steps) <= losses.total


@pytest.mark.parametrize("contender", CONTENDERS)
def test_validation_reads_the_held_out_text_as_a_whole(english, contender):
    short = replace(english, held_out=english.held_out[:203])
    model = build(contender, len(english.alphabet), SMALL).double()
    loss = training.validate(model, short, replace(SMALL, length=7))
    columns = streams(short.held_out, SMALL.batch)  # (50, 4)
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(columns[:-1]))
        shares = logits.log_softmax(-1).gather(-1, torch.from_numpy(columns[1:, :, None]))
    assert loss == pytest.approx(-shares.mean().item() / math.log(2), rel=1e-12)


def test_dropout_is_repeatable(english):
    settings = replace(SMALL, dropout=0.5)
    without = bits(trained(FUSED, english, SMALL)[1])
    first, second = (bits(trained(FUSED, english, settings)[1]) for _ in range(2))
    assert np.array_equal(first, second) and not np.array_equal(first, without)


# Sampling


def test_a_sample_is_text_and_repeatable(english):
    model = build(FUSED, len(english.alphabet), SMALL)
    text = training.sample(model, english, SMALL)
    assert len(text) == SMALL.sample and set(text) <= set(english.alphabet)
    assert text == training.sample(model, english, SMALL)
    assert text != training.sample(model, english, replace(SMALL, seed=1))
    assert training.sample(model, english, replace(SMALL, sample=0)) == ""


@pytest.mark.parametrize("cell", CELLS)
def test_a_sample_at_temperature_zero_is_the_likeliest(english, cell):
    """Each character follows from all before it."""
    settings = replace(SMALL, cell=cell, temperature=0.0, sample=8)
    model = build(FUSED, len(english.alphabet), settings).double()
    text = training.sample(model, english, settings)
    codes = [*english.train[: settings.length], *(english.alphabet.index(letter) for letter in text)]
    with torch.no_grad():
        logits, _ = model(torch.tensor(codes)[:, None])
    likeliest = logits[settings.length - 1 : -1, 0].argmax(-1)
    assert likeliest.tolist() == codes[settings.length :]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_characters_are_drawn_as_often_as_they_should(temperature):
    scores, count = np.log([0.5, 0.3, 0.0625, 0.1375]), 20_000
    shares = np.exp(scores / temperature)
    shares /= shares.sum()
    rng = np.random.default_rng(0)
    drawn = np.bincount([training._draw(scores, temperature, rng) for _ in range(count)], minlength=4)
    deviation = np.sqrt(count * shares * (1 - shares))
    assert (np.abs(drawn - count * shares) < 5 * deviation).all()


def test_hardly_any_temperature_is_none():
    class Highest:
        def random(self):
            return 1 - 2**-53

    scores = np.array([1.0, 5.0, 2.0, 4.999])
    for temperature in (0.0, 1e-310, 1e-6):
        assert training._draw(scores, temperature, np.random.default_rng(0)) == 1
    for temperature in (0.3, 0.7, 1.0, 3.0):
        assert training._draw(scores, temperature, Highest()) == 3


# Results


def test_ratios_are_of_medians_and_totals():
    slow = Run("torch.nn", [Step(3.0, 2.0, 2.0), Step(2.0, 9.0, 11.0), Step(1.5, 2.0, 13.0)])
    fast = Run("fused", [Step(3.0, 1.0, 1.0), Step(2.25, 1.0, 2.0), Step(1.625, 1.0, 6.5)])
    results = Results(replace(SMALL, steps=3), [slow, fast])
    assert results.ratios == {"median_step": 2.0, "end_to_end": 2.0}
    assert results.differences == [0.0, 0.25, 0.125]
    assert results.rate(fast) == SMALL.batch * SMALL.length
    fast.steps.pop()
    assert results.ratios == {"median_step": 2.0}, "totals of as many steps only"
    fast.steps.clear()
    assert results.ratios == {} and results.differences == [] and results.measured == [slow]


# The command


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
    assert result.output.strip() == "error: the example needs PyTorch: pip install -e '.[figures,torch]'"
