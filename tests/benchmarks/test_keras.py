"""benchmarks.keras: models of every kind of case are checked and timed, and the figures have a table and a file."""

import json
import re
import weakref
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import keras_backends  # noqa: F401 -- selects Keras's backend, before anything imports Keras
from benchmarks.keras import __main__ as command
from benchmarks.keras import models
from fusedrnn.testing.cases import CASES

TINY = {name: replace(CASES[name].at(4, 2, 3), H=5) for name in ("ds2", "ds2-5bi")}
CALLS = ["model(x)", "predict", "fit"]


@pytest.fixture
def tiny(monkeypatch):
    """Cases with the layers and directions of real ones, in sizes of a test."""
    pytest.importorskip("keras")
    monkeypatch.setattr(models, "CASES", TINY)
    monkeypatch.setattr(models, "limit_threads", lambda count: None)
    monkeypatch.setattr(models, "BATCHES", 2)


def options(cases=tuple(TINY), layers=("LSTM",)):
    return {"cases": list(cases), "layers": list(layers), "threads": 1, "seconds": 0.0}


# Keras's variables, with NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
@pytest.mark.parametrize("name", TINY)
def test_figures(name, tiny):
    figures = list(models.figures(options([name], ["GRU"])))
    assert [(figure["case"], figure["layer"], figure["call"]) for figure in figures] == [
        (name, "GRU", call) for call in CALLS
    ]
    assert all(min(figure["keras"], figure["fused"]) > 0 for figure in figures)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_a_row_frees_its_models(tiny, monkeypatch):
    """Before the next row makes its own: the models of the largest case and their gradients take gigabytes."""
    make_models, alive, rows = models.make_models, weakref.WeakSet(), []

    def counted(case, layer):
        rows.append(len(alive))
        pair = make_models(case, layer)
        alive.update(pair.values())
        return pair

    monkeypatch.setattr(models, "make_models", counted)
    for _ in models.figures(options(layers=("SimpleRNN", "GRU"))):
        pass
    assert rows == [0] * 4


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_models_that_disagree(tiny, monkeypatch):
    make_models = models.make_models

    def disagreeing(case, layer):
        pair = make_models(case, layer)
        fused = pair[models.FUSED]
        fused.set_weights([np.ones_like(weight) for weight in fused.get_weights()])
        return pair

    monkeypatch.setattr(models, "make_models", disagreeing)
    with pytest.raises(ValueError, match="the models of ds2-5bi with LSTM disagree"):
        list(models.figures(options(["ds2-5bi"])))


def test_the_command(tmp_path, monkeypatch):
    """By default it runs all cases, on both backends."""
    requests, path = [], tmp_path / "figures.json"

    def printed(environment, module, chosen, variables):
        requests.append((chosen["cases"], variables["KERAS_BACKEND"]))
        for call in CALLS:
            yield {"case": "ds2-5bi", "layer": "LSTM", "call": call, "keras": 3.0, "fused": 2.0}

    monkeypatch.setattr(command, "printed_figures", printed)
    result = CliRunner().invoke(command.app, ["--json", str(path)])
    assert result.exit_code == 0, result.output
    assert requests == [(list(CASES), "torch"), (list(CASES), "jax")]
    assert re.search(r"jax +│ ds2-5bi +│ LSTM +│ 1.50", result.output), result.output
    assert len(json.loads(path.read_text())["rows"]) == 6
    result = CliRunner().invoke(command.app, ["--cases", "ds2-5bi"])
    assert requests[2:] == [(["ds2-5bi"], "torch"), (["ds2-5bi"], "jax")]
    assert CliRunner().invoke(command.app, ["--cases", "ds3"]).exit_code == 2
