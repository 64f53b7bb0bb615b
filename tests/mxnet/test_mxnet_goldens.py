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
    """What the oracle says of a case."""
    case = CASES[name]
    return exact_results(case, case.inputs(), variant_results(case.problem()))


def expected(name, path):
    """What MXNet computed on that path, completed by the oracle where it was wrong."""
    known = exact(name)
    found = CASES[name].results(path)
    if found is None:
        return known
    return {one: np.where(np.isnan(found[one]), known[one], found[one]) for one in known}


def called(case, backend):
    """The same call as MXNet's, by our function of its name."""
    given, spec = case.inputs(), case.spec
    operands = given["x"], given["params"], *(given[f"{state}0"] for state in spec.state_names)
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
    buffers = {name: given[f"held_{name}"].copy() for name in case.arguments if case.requests[name] == "add"}
    gradients = backward([given[f"d{name}"] for name in names], case.requests, buffers)
    return dict(zip(names, outputs, strict=True)) | {f"d{name}": one for name, one in gradients.items()}


@pytest.mark.parametrize("name", CASES)
def test_function(name, backend):
    case = CASES[name]
    RNNOp(case.spec, backend)
    found = called(case, backend)
    for path in PATHS:
        assert wrong_results(case, found, expected(name, path)) == []


@pytest.mark.parametrize("name", CASES)
def test_operator(name, backend):
    case = CASES[name]
    op, problem = RNNOp(case.spec, backend), case.problem()
    trains = case.requests is not None
    y, final, reserve = op.forward(problem.x, problem.params, problem.states, lengths=problem.lengths, training=trains)
    found = dict(zip(("y", *(f"{state}_n" for state in case.spec.state_names)), (y, *final), strict=True))
    if trains:
        dx, dparams, dinitial = op.backward(problem.dy, problem.dstates, reserve)
        held = case.inputs()
        for argument, gradient in zip(case.arguments, (dx, dparams, *dinitial), strict=True):
            if case.requests[argument] != "null":
                found[f"d{argument}"] = gradient + held.get(f"held_{argument}", np.zeros_like(gradient))
    for path in PATHS:
        assert wrong_results(case, found, expected(name, path)) == []


@pytest.mark.parametrize("name", CASES)
def test_nothing_wrong_is_in_the_files(name):
    """What the files hold is within the tolerances of the oracle; what is left out is what they say was wrong."""
    case = CASES[name]
    for path in PATHS:
        outcome, found = case.outcome[path], case.results(path)
        if found is None:
            assert "error" in outcome or set(outcome["wrong"]) >= {"y", "h_n"}
            continue
        assert wrong_results(case, expected(name, path), exact(name)) == []
        left_out = {one for one, array in found.items() if one != "dparameters" and np.isnan(array).any()}
        left_out |= {
            entry.name for entry in case.spec.layout
            if "dparameters" in found and np.isnan(found["dparameters"][entry.offset : entry.offset + entry.size]).all()
        }  # fmt: skip
        assert left_out == set(outcome["wrong"])


def wrong(path, *parts):
    """All outcomes on a path of the cases whose name has these parts."""
    return [case.outcome[path] for case in CASES.values() if all(part in f"{case.name}-" for part in parts)]


class TestWhatIsSaidOfMXNet:
    """The page on MXNet says where it is wrong; these are its claims, checked against the files."""

    def test_with_onednn_every_plain_case_is_right(self):
        for case in CASES.values():
            if not case.name.endswith(("lengths", "float64", "training", *CLIPS)):
                assert case.outcome["onednn"] == {"wrong": []}, case.name

    def test_natively_lstm_and_gru_are_right_if_all_is_written(self):
        for case in CASES.values():
            if case.spec.mode in ("lstm", "gru") and case.requests and set(case.requests.values()) == {"write"}:
                outcome = case.outcome["native"]
                assert "error" in outcome or outcome == {"wrong": []}, case.name

    def test_natively_the_input_weights_of_middle_layers_of_vanilla_networks_are_wrong(self):
        for case in CASES.values():
            spec = case.spec
            if spec.mode.startswith("rnn") and case.requests and set(case.requests.values()) == {"write"}:
                found = case.outcome["native"]
                middle = {f"{side}{layer}_i2h_weight" for side in "lr"[: spec.num_directions]
                          for layer in range(1, spec.num_layers - 1)}  # fmt: skip
                if "error" in found or spec.dtype == "float64":
                    continue
                # A ReLU that is off all the time hides it.
                assert set(found["wrong"]) <= middle if spec.mode == "rnn_relu" else set(found["wrong"]) == middle

    def test_lengths_and_clipping(self):
        for note in ("-H4-lengths-", "-H4-clip-", "-H4-clip-nan-"):
            assert all(one["ignored"] and one["wrong"] for one in wrong("onednn", note))
            assert all("cudnn" in one["error"].lower() for one in wrong("native", note))
        for path in PATHS:
            assert all("only supported for GPU" in one["error"] for one in wrong(path, "-projection-clip-"))

    def test_projection_does_not_train(self):
        for path in PATHS:
            assert all("No training support" in one["error"] for one in wrong(path, "-projection-training-"))
            assert all(one == {"wrong": []} for one in wrong(path, "-projection-") if "error" not in one
                       and "ignored" not in one)  # fmt: skip

    def test_requests_natively(self):
        found = wrong("native", "-H4-add-")
        assert sum("AddTo is not supported" in one.get("error", "") for one in found) == len(MODES)
        assert all(len(one["wrong"]) == 24 for one in wrong("native", "-add-parameters-"))
        for one in wrong("native", "-parameters-only-"):
            assert {name[1] for name in one["wrong"]} == {"0", "1"}  # layers, of three
            assert len(one["wrong"]) == 16
        for mode in MODES:
            assert wrong("native", mode, "-data-only-")[0]["wrong"] == ([] if mode == "lstm" else ["ddata"])

    def test_relu_in_float64(self):
        for path in PATHS:
            (found,) = wrong(path, "rnn_relu", "-float64-")
            assert {"y", "h_n"} <= set(found["wrong"])
            (others,) = wrong(path, "rnn_tanh", "-float64-")
            assert others["wrong"] == ["l1_i2h_weight", "r1_i2h_weight"]

    def test_figures_of_the_page(self):
        """By how much what is wrong is off, from the least to the most, row by row."""
        page = (Path(__file__).parents[2] / "docs" / "guides" / "mxnet.md").read_text()
        rows = {"middle layers": (), "\"add\"` for parameters": ("-add-parameters-",),
                "parameters alone": ("-parameters-only-",), "data alone": ("-data-only-",)}  # fmt: skip
        for words, parts in rows.items():
            (row,) = [line for line in page.splitlines() if words in line and " off by " in line]
            found = wrong("native", *parts) if parts else [
                case.outcome["native"] for case in CASES.values()
                if re.search(r"^rnn_\w+-L[34]-\w+-T\d-N2-I\d-H\d$", case.name)
            ]  # fmt: skip
            off = [one["off"] for one in found if one["wrong"]]
            assert f"off by {min(off):g} to {max(off):g} " in row

    def test_several_calls(self):
        found = golden_files.contents()["histories"]
        for name in ("other_batches", "updated_weights", "two_forwards"):
            assert all(one == 0 for paths in found[name].values() for one in paths.values()), name
        for paths in found["dropout"].values():
            assert paths["onednn"] < 1e-6
            assert paths["native"] > 0.01


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", golden_files.layers())
def test_layer(name, path, backend):
    """A layer loads what MXNet saved, computes what it computed, and saves the same again."""
    facts = golden_files.layers()[name]
    given, found = golden_files.layer_arrays(name, "in"), golden_files.layer_arrays(name, path)
    saved = {key.removeprefix("saved:"): one for key, one in found.items() if key.startswith("saved:")}
    layer = _layer(facts, backend)
    layer.load_parameters(saved)
    again = layer.save_parameters()
    assert again.keys() == saved.keys()
    for key, one in saved.items():
        np.testing.assert_array_equal(again[key], one)
    states = [given[one] for one in ("h0", "c0") if one in given]
    y, final = layer(given["x"], states)
    actual = {"y": y, **dict(zip(("h_n", "c_n"), final, strict=False))}
    if facts["trains"]:
        (y, final), backward = layer.train(given["x"], states)
        dstates = [given[one] for one in ("dh_n", "dc_n") if one in given]
        actual |= {"y": y, "dx": backward((given["dy"], dstates))["data"]}
        actual |= {f"grad:{one.name}": one.grad() for one in layer.collect_params().values()}
    assert {key for key in found if not key.startswith("saved:")} == set(actual)
    spec = layer._op.spec
    for key, one in actual.items():
        assert golden_files.near(spec, key, one, found[key]), key


def _layer(facts, backend):
    options = dict(facts["options"])
    return getattr(mx.gluon.rnn, facts["class"])(**options, input_size=3, prefix="net_", backend=backend)


@pytest.mark.parametrize("name", golden_files.layers())
def test_parameters_by_every_name(name):
    """By full name, without the prefix, and in a larger network's file."""
    facts = golden_files.layers()[name]
    given = golden_files.layer_arrays(name, "in")
    full = {key: one for key, one in given.items() if key.startswith("net_")}
    saved = {key.removeprefix("saved:"): one for key, one in golden_files.layer_arrays(name, "onednn").items()
             if key.startswith("saved:")}  # fmt: skip
    forms = (
        (full, {}),
        ({key.removeprefix("net_"): one for key, one in full.items()}, {}),
        ({f"other7_{key.removeprefix('net_')}": one for key, one in full.items()}, {"prefix": "other7_"}),
        ({f"1.{key}": one for key, one in saved.items()} | {"0.weight": full}, {"prefix": "1.", "ignore_extra": True}),
    )
    for params, options in forms:
        layer = _layer(facts, "reference")
        layer.load_parameters(params, **options)
        for key, one in layer.collect_params().items():
            np.testing.assert_array_equal(one.data(), full[key])


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in golden_files.FOLDER.iterdir() if path.is_file()) < 1_000_000
    assert tuple(ARGUMENTS) == mx.nd.train_rnn(**_tiny())[1].arguments


def _tiny():
    one = np.zeros((1, 1, 1), np.float32)
    return {"data": one, "parameters": np.zeros(16, np.float32), "state": one, "state_cell": one, "state_size": 1,
            "num_layers": 1, "mode": "lstm"}  # fmt: skip
