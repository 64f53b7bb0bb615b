"""char_lm: the text, the training of both models, and the samples. Speed is not tested."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.char_lm import training
from examples.char_lm.model import CONTENDERS, FUSED, TORCH, CharacterModel, build
from examples.char_lm.results import Results, Run, Step
from examples.char_lm.settings import CELLS, Settings
from examples.char_lm.text import Corpus, load, streams, windows

SMALL = Settings(hidden=32, steps=12, batch=4, length=10, threads=1, sample=40)


def trained(contender, corpus, settings, dtype=torch.float32):
    model, losses = build(contender, len(corpus.alphabet), settings).to(dtype), Run(contender)
    training.train(model, corpus, settings, losses)
    return model, losses


def bits(losses):
    return np.array([step.bits for step in losses.steps])


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
