"""Times models of Keras's recurrent layers, plain and accelerated, in turns. Runs in an environment with Keras.

``python -m benchmarks.keras.models OPTIONS`` takes one argument, the options as JSON, and prints a line of JSON for
each figure.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from benchmarks.timed_rows import take_turns
from fusedrnn.bench.peaks import RunPeak
from fusedrnn.testing.cases import CASES, Case

KERAS, FUSED = "keras", "fused"
"""The contenders."""
BATCHES, _FLOPS = 64, 5e10
"""How many batches ``predict`` and ``fit`` run, and the most operations of these batches."""
_MODES = {"LSTM": "lstm", "GRU": "gru", "SimpleRNN": "rnn_tanh"}
Call = Callable[[Any], object]


def limit_threads(count: int) -> None:
    """Use ``count`` processors. XLA starts a thread for each on which the process may run; PyTorch has a setting."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    if os.environ["KERAS_BACKEND"] == "torch":
        import torch

        torch.set_num_threads(count)
    import fusedrnn

    fusedrnn.set_num_threads(count)


def make_models(case: Case, layer: str) -> dict[str, Any]:
    """Keras's model of a case, and the same model accelerated, by the names of the contenders."""
    import keras

    accelerate = importlib.import_module("fusedrnn.keras").accelerate
    models = {}
    for name in (KERAS, FUSED):
        layers: list[Any] = [keras.Input((case.T, case.I))]
        for _ in range(case.layers):
            own = getattr(keras.layers, layer)(case.H, return_sequences=True)
            layers.append(keras.layers.Bidirectional(own) if case.bidirectional else own)
        model = keras.Sequential(layers)
        if name == FUSED:
            accelerate(model)
        model.compile("sgd", "mse")
        models[name] = model
    models[FUSED].set_weights(models[KERAS].get_weights())
    return models


def make_calls(case: Case, mode: str) -> dict[str, Call]:
    """The functions of a model that are timed, by name."""
    import keras

    spec = case.spec(mode)
    count = max(1, min(BATCHES, int(_FLOPS // spec.flops(case.T, case.N))))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count * case.N, case.T, case.I)).astype(np.float32)
    y = np.zeros((count * case.N, case.T, spec.output_size), np.float32)
    first = keras.ops.convert_to_tensor(x[: case.N])
    options: dict[str, Any] = {"batch_size": case.N, "verbose": 0}
    return {
        "model(x)": lambda model: keras.ops.convert_to_numpy(model(first)),
        "predict": lambda model: model.predict(x, **options),
        "fit": lambda model: model.fit(x, y, epochs=1, shuffle=False, **options),
    }


def figures(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A figure for each case, layer and call.

    Raises:
        ValueError: If the models of a case disagree.
    """
    limit_threads(options["threads"])
    peak = RunPeak("float32", options["threads"])
    for name in options["cases"]:
        for layer in options["layers"]:
            yield from _row_figures(name, layer, options["seconds"], peak)
            gc.collect()  # models have cycles, and two pairs of large ones may not fit the memory


def _row_figures(name: str, layer: str, seconds: float, peak: RunPeak) -> Iterator[dict[str, Any]]:
    """The figures of a case and a layer."""
    case, models = CASES[name], make_models(CASES[name], layer)
    calls = make_calls(case, _MODES[layer])
    theirs, ours = (calls["model(x)"](models[name]) for name in (KERAS, FUSED))
    if not np.allclose(theirs, ours, rtol=1e-3, atol=1e-3):  # type: ignore[arg-type]
        raise ValueError(f"the models of {name} with {layer} disagree")
    for what, call in calls.items():
        timings = take_turns({key: partial(call, model) for key, model in models.items()}, seconds, peak)
        yield {"case": name, "layer": layer, "call": what, **{key: timings[key].median for key in models}}


if __name__ == "__main__":
    for figure in figures(json.loads(sys.argv[1])):
        print(json.dumps(figure), flush=True)
