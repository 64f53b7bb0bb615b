"""The character model in every format of operands: what training in bfloat16 and inference in int8 lose."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector
from typer.testing import CliRunner

from benchmarks import accuracy
from benchmarks.accuracy import PERTURBED, TRAINED, Losses, build_as, measure, rows
from examples.char_lm import training
from examples.char_lm.model import TORCH, build
from examples.char_lm.results import Run
from examples.char_lm.settings import CELLS, Settings
from fusedrnn.spec import COMPUTE

SMALL = Settings(hidden=32, layers=1, steps=50, batch=16, length=20, lr=1e-2, threads=1)
TINY = Settings(hidden=8, layers=1, steps=6, batch=4, length=10, threads=1)
UNTRAINED = 5.5  # bits per character: below that the model has learned


@pytest.fixture(scope="module")
def short(english):
    return replace(english, held_out=english.held_out[:4000])


@pytest.mark.parametrize("cell", CELLS)
def test_accuracy(short, cell):
    losses = measure(short, replace(SMALL, cell=cell))
    base = losses.trained["float32"]
    assert base < UNTRAINED
    assert tuple(losses.trained) == TRAINED
    assert tuple(losses.inferred) == COMPUTE
    assert abs(losses.trained["bfloat16"] - base) < 0.01
    for loss in losses.inferred.values():
        assert 0 < abs(loss - base) < 0.005  # it is not float32


@pytest.mark.parametrize("cell", CELLS)
def test_layers_train_as_torch_does(short, cell):
    """The same losses in float32, from windows that start with a state and from the one that does not."""
    settings = replace(TINY, cell=cell, layers=2)
    curves = []
    for model in (build(TORCH, len(short.alphabet), settings), build_as("float32", short, settings)):
        run = Run("losses")
        training.train(model, short, settings, run)
        curves.append([step.bits for step in run.steps] + [training.validate(model, short, settings)])
    np.testing.assert_allclose(*curves, rtol=1e-5)


def test_perturbed_parameters():
    model, other = (build_as(name, english_of_ten(), TINY) for name in ("float32", PERTURBED))
    params, perturbed = (parameters_to_vector(built.rnn.parameters()) for built in (model, other))
    difference = perturbed - params
    assert (difference > 0).all()
    assert (difference <= 2.0**-23 * params.abs() + 1e-40).all()


def english_of_ten():
    return accuracy.Corpus.of("characters " * 40, "ten")


def test_rows():
    """Differences to float32, and their mean for each cell."""
    losses = [
        Losses(
            cell, seed, {"float32": 2.0, PERTURBED: 2.001, "bfloat16": 2.0 + seed / 100}, dict.fromkeys(COMPUTE, 1.5)
        )
        for cell in CELLS
        for seed in (1, 2)
    ]
    lines = list(rows(losses))
    inferred = ["-0.5000"] * len(COMPUTE)
    assert [line[:2] for line in lines] == [[cell, name] for cell in CELLS for name in ("1", "2", "mean")]
    assert lines[1] == ["gru", "2", "2.0000", "+0.0010", "+0.0200", *inferred]
    assert lines[2] == ["gru", "mean", "", "+0.0010", "+0.0150", *inferred]


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "load", lambda path: english_of_ten())
    path = tmp_path / "losses.json"
    defaults = accuracy.Settings
    monkeypatch.setattr(accuracy, "Settings", lambda **options: defaults(batch=2, length=5, layers=1, **options))
    threads = torch.get_num_threads()
    arguments = ["--hidden", "4", "--steps", "3", "--seeds", "2", "--json", str(path)]
    result = CliRunner().invoke(accuracy.app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("mean") == len(CELLS)
    entries = json.loads(path.read_text())
    assert [(entry["cell"], entry["seed"]) for entry in entries] == [(cell, seed) for cell in CELLS for seed in (0, 1)]
    assert torch.get_num_threads() == threads


def test_command_rejects_a_file_that_cannot_be_written(tmp_path):
    result = CliRunner().invoke(accuracy.app, ["--json", str(tmp_path / "absent" / "losses.json")])
    assert result.exit_code == 2
    assert "there is no folder" in result.output
