"""What MXNet 1.9.1 computed is what we compute; where it was wrong the float64 oracle stands in."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import golden_files
from fusedrnn import RNNOp
from fusedrnn import mxnet as mx
from fusedrnn.spec import MODES
from golden_files import ARGUMENTS, PATHS, exact_results, wrong_results
from variants import variant_results

CASES = {case.name: case for case in golden_files.cases()}
CLIPS = ("clip", "clip-nan", "projection-clip")


@pytest.fixture(params=["default", "reference"])
def backend(request):
    return None if request.param == "default" else request.param


@cache
def exact(name):
    """The oracle's results of a case."""
    case = CASES[name]
    return exact_results(case, case.inputs(), variant_results(case.problem()))


def expected(name, path):
    """What MXNet computed on that path, completed by the oracle where it was wrong."""
    oracle, stored = exact(name), CASES[name].results(path)
    if stored is None:
        return oracle
    return {key: np.where(np.isnan(stored[key]), oracle[key], stored[key]) for key in oracle}


def results_of(case, backend):
    """The results of a case by the functions with MXNet's names."""
    arrays, spec = case.inputs(), case.spec
    operands = arrays["x"], arrays["params"], *(arrays[f"{state}0"] for state in spec.state_names)
    options = {
        "mode": spec.mode, "state_size": spec.hidden_size, "num_layers": spec.num_layers,
        "bidirectional": spec.bidirectional, "projection_size": spec.projection_size, "state_outputs": True,
        "backend": backend,
    }  # fmt: skip
    options |= {f"lstm_state_clip_{end}": getattr(spec, f"state_clip_{end}") for end in ("min", "max", "nan")}
    if case.lengths is not None:
        options |= {"sequence_length": case.lengths, "use_sequence_length": True}
    operands = dict(zip(case.arguments, operands, strict=True))
    names = ("y", *(f"{state}_n" for state in spec.state_names))
    if case.requests is None:
        return dict(zip(names, mx.nd.RNN(**operands, **options), strict=True))
    outputs, backward = mx.nd.train_rnn(**operands, **options)
    buffers = {name: arrays[f"held_{name}"].copy() for name in case.arguments if case.requests[name] == "add"}
    gradients = backward([arrays[f"d{name}"] for name in names], case.requests, buffers)
    return dict(zip(names, outputs, strict=True)) | {f"d{name}": gradient for name, gradient in gradients.items()}


@pytest.mark.parametrize("name", CASES)
def test_function(name, backend):
    case = CASES[name]
    RNNOp(case.spec, backend)
    results = results_of(case, backend)
    for path in PATHS:
        assert wrong_results(case, results, expected(name, path)) == []


@pytest.mark.parametrize("name", CASES)
def test_operator(name, backend):
    case = CASES[name]
    op, problem = RNNOp(case.spec, backend), case.problem()
    trains = case.requests is not None
    y, final, reserve = op.forward(problem.x, problem.params, problem.states, lengths=problem.lengths, training=trains)
    results = dict(zip(("y", *(f"{state}_n" for state in case.spec.state_names)), (y, *final), strict=True))
    if trains:
        dx, dparams, dinitial = op.backward(problem.dy, problem.dstates, reserve)
        arrays = case.inputs()
        for argument, gradient in zip(case.arguments, (dx, dparams, *dinitial), strict=True):
            if case.requests[argument] != "null":
                results[f"d{argument}"] = gradient + arrays.get(f"held_{argument}", np.zeros_like(gradient))
    for path in PATHS:
        assert wrong_results(case, results, expected(name, path)) == []


@pytest.mark.parametrize("name", CASES)
def test_files_hold_only_right_results(name):
    """Stored results are within the tolerances of the oracle; missing are exactly those listed as wrong."""
    case = CASES[name]
    for path in PATHS:
        outcome, stored = case.outcome[path], case.results(path)
        if stored is None:
            assert "error" in outcome or set(outcome["wrong"]) >= {"y", "h_n"}
            continue
        assert wrong_results(case, expected(name, path), exact(name)) == []
        missing = {key for key, array in stored.items() if key != "dparameters" and np.isnan(array).any()}
        if "dparameters" in stored:
            views = case.spec.layout.unpack(stored["dparameters"])
            missing |= {name for name, view in views.items() if np.isnan(view).all()}
        assert missing == set(outcome["wrong"])


def outcomes(path, *parts):
    """The outcomes on a path of the cases whose name has these parts."""
    return [case.outcome[path] for case in CASES.values() if all(part in f"{case.name}-" for part in parts)]


class TestPageOnMXNet:
    """What the page on MXNet says about MXNet's errors, checked against the files."""

    def test_onednn_is_right_in_plain_cases(self):
        for case in CASES.values():
            if not case.name.endswith(("lengths", "float64", "training", *CLIPS)):
                assert case.outcome["onednn"] == {"wrong": []}, case.name

    def test_native_lstm_and_gru_are_right_with_write(self):
        for case in CASES.values():
            if case.spec.mode in ("lstm", "gru") and case.requests and set(case.requests.values()) == {"write"}:
                outcome = case.outcome["native"]
                assert "error" in outcome or outcome == {"wrong": []}, case.name

    def test_native_vanilla_networks_are_wrong_in_middle_layers(self):
        for case in CASES.values():
            spec = case.spec
            if spec.mode.startswith("rnn") and case.requests and set(case.requests.values()) == {"write"}:
                outcome = case.outcome["native"]
                middle = {f"{side}{layer}_i2h_weight" for side in "lr"[: spec.num_directions]
                          for layer in range(1, spec.num_layers - 1)}  # fmt: skip
                if "error" in outcome or spec.dtype == "float64":
                    continue
                # A ReLU that is always off hides the error.
                assert set(outcome["wrong"]) <= middle if spec.mode == "rnn_relu" else set(outcome["wrong"]) == middle

    def test_lengths_and_clipping(self):
        for note in ("-H4-lengths-", "-H4-clip-", "-H4-clip-nan-"):
            assert all(outcome["ignored"] and outcome["wrong"] for outcome in outcomes("onednn", note))
            assert all("cudnn" in outcome["error"].lower() for outcome in outcomes("native", note))
        for path in PATHS:
            clipped = outcomes(path, "-projection-clip-")
            assert all("only supported for GPU" in outcome["error"] for outcome in clipped)

    def test_projection_does_not_train(self):
        for path in PATHS:
            training, projected = outcomes(path, "-projection-training-"), outcomes(path, "-projection-")
            assert all("No training support" in outcome["error"] for outcome in training)
            assert all(outcome == {"wrong": []} for outcome in projected if not {"error", "ignored"} & outcome.keys())

    def test_native_requests(self):
        errors = [outcome.get("error", "") for outcome in outcomes("native", "-H4-add-")]
        assert sum("AddTo is not supported" in error for error in errors) == len(MODES)
        assert all(len(outcome["wrong"]) == 24 for outcome in outcomes("native", "-add-parameters-"))
        for outcome in outcomes("native", "-parameters-only-"):
            assert {name[1] for name in outcome["wrong"]} == {"0", "1"}  # layers, of three
            assert len(outcome["wrong"]) == 16
        for mode in MODES:
            assert outcomes("native", mode, "-data-only-")[0]["wrong"] == ([] if mode == "lstm" else ["ddata"])

    def test_relu_in_float64(self):
        for path in PATHS:
            (relu,), (tanh,) = (outcomes(path, mode, "-float64-") for mode in ("rnn_relu", "rnn_tanh"))
            assert {"y", "h_n"} <= set(relu["wrong"])
            assert tanh["wrong"] == ["l1_i2h_weight", "r1_i2h_weight"]

    def test_figures_of_the_page(self):
        """The smallest and the largest error of each row."""
        page = (Path(__file__).parents[2] / "docs" / "guides" / "mxnet.md").read_text()
        rows = {"middle layers": (), "\"add\"` for parameters": ("-add-parameters-",),
                "parameters alone": ("-parameters-only-",), "data alone": ("-data-only-",)}  # fmt: skip
        for words, parts in rows.items():
            (row,) = [line for line in page.splitlines() if words in line and " off by " in line]
            native = outcomes("native", *parts) if parts else [
                case.outcome["native"] for case in CASES.values()
                if re.search(r"^rnn_\w+-L[34]-\w+-T\d-N2-I\d-H\d$", case.name)
            ]  # fmt: skip
            errors = [outcome["off"] for outcome in native if outcome["wrong"]]
            assert f"off by {min(errors):g} to {max(errors):g} " in row

    def test_several_calls(self):
        histories = golden_files.contents()["histories"]
        for name in ("other_batches", "updated_weights", "two_forwards"):
            assert all(error == 0 for paths in histories[name].values() for error in paths.values()), name
        for paths in histories["dropout"].values():
            assert paths["onednn"] < 1e-6
            assert paths["native"] > 0.01


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", golden_files.layers())
def test_layer(name, path, backend):
    """A layer loads what MXNet saved, computes what it computed, and saves the same again."""
    facts = golden_files.layers()[name]
    inputs, stored = golden_files.layer_arrays(name, "in"), golden_files.layer_arrays(name, path)
    saved = {key.removeprefix("saved:"): array for key, array in stored.items() if key.startswith("saved:")}
    layer = _layer(facts, backend)
    layer.load_parameters(saved)
    saved_again = layer.save_parameters()
    assert saved_again.keys() == saved.keys()
    for key, array in saved.items():
        np.testing.assert_array_equal(saved_again[key], array)
    states = [inputs[key] for key in ("h0", "c0") if key in inputs]
    y, final = layer(inputs["x"], states)
    actual = {"y": y, **dict(zip(("h_n", "c_n"), final, strict=False))}
    if facts["trains"]:
        (y, final), backward = layer.train(inputs["x"], states)
        dstates = [inputs[key] for key in ("dh_n", "dc_n") if key in inputs]
        actual |= {"y": y, "dx": backward((inputs["dy"], dstates))["data"]}
        actual |= {f"grad:{parameter.name}": parameter.grad() for parameter in layer.collect_params().values()}
    assert {key for key in stored if not key.startswith("saved:")} == set(actual)
    spec = layer._op.spec
    for key, array in actual.items():
        assert golden_files.near(spec, key, array, stored[key]), key


def _layer(facts, backend):
    options = dict(facts["options"])
    return getattr(mx.gluon.rnn, facts["class"])(**options, input_size=3, prefix="net_", backend=backend)


@pytest.mark.parametrize("name", golden_files.layers())
def test_parameters_by_every_name(name):
    """By full name, without the prefix, and in a larger network's file."""
    facts = golden_files.layers()[name]
    inputs, stored = golden_files.layer_arrays(name, "in"), golden_files.layer_arrays(name, "onednn")
    full = {key: array for key, array in inputs.items() if key.startswith("net_")}
    short = {key.removeprefix("net_"): array for key, array in full.items()}
    in_network = {key.replace("saved:", "1."): array for key, array in stored.items() if key.startswith("saved:")}
    for params, options in (
        (full, {}),
        (short, {}),
        ({f"other7_{key}": array for key, array in short.items()}, {"prefix": "other7_"}),
        (in_network | {"0.weight": full}, {"prefix": "1.", "ignore_extra": True}),
    ):
        layer = _layer(facts, "reference")
        layer.load_parameters(params, **options)
        for key, parameter in layer.collect_params().items():
            np.testing.assert_array_equal(parameter.data(), full[key])


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in golden_files.FOLDER.iterdir() if path.is_file()) < 1_000_000
    assert tuple(ARGUMENTS) == mx.nd.train_rnn(**_tiny())[1].arguments


def _tiny():
    array = np.zeros((1, 1, 1), np.float32)
    return {"data": array, "parameters": np.zeros(16, np.float32), "state": array, "state_cell": array,
            "state_size": 1, "num_layers": 1, "mode": "lstm"}  # fmt: skip
