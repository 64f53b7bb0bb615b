"""Makes mxnet.npz and mxnet.json: what MXNet 1.9.1 computes, and where it is wrong.

    FUSEDRNN_PEERS=where-peers-are python tests/goldens/make_mxnet.py

Run by hand, in the project's environment for tests, after ``make peers``: MXNet runs in its own, one process for each
call, so that one that crashes takes nothing along. It takes some minutes. ``golden_files.py`` says what the files hold.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers.environments import PEERS
from fusedrnn import RNNSpec
from fusedrnn.spec import MODES
from golden_files import ARGUMENTS, FOLDER, PATHS, Case, blanked, exact_results, joined, wrong_results
from oracles import training_problem
from problems import Shape, problem_of
from variants import variant_results

ENVIRONMENT = PEERS["mxnet-fused"].environment
DEEP = Shape(4, 2, 3, 4, layers=3, bidirectional=True)
# Ways to ask for gradients; who is not mentioned is not wanted.
REQUESTS = {
    "add": {"data": "add", "parameters": "add", "state": "add", "state_cell": "add"},
    "add-parameters": {"data": "write", "parameters": "add", "state": "write", "state_cell": "write"},
    "parameters-only": {"parameters": "write"},
    "data-only": {"data": "write"},
}
HISTORIES = ("other_batches", "updated_weights", "two_forwards", "dropout")


def run(job, arrays, path):
    """What the worker found, by name; or what became of it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MXNET_USE_MKLDNN_RNN": "1" if path == "onednn" else "0"}
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "job.npz"), Path(folder, "result.npz")
        np.savez(given, job=json.dumps(job), **arrays)
        command = [ENVIRONMENT.python, FOLDER / "mxnet_worker.py", given, found]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode < 0:
            return f"ended by signal {-done.returncode}"
        if done.returncode:
            return done.stderr.strip().splitlines()[-1].removeprefix("MXNetError: ")
        with np.load(found) as file:
            return dict(file)


def options_of(spec):
    """The operator's."""
    options = {
        "mode": spec.mode, "state_size": spec.hidden_size, "num_layers": spec.num_layers,
        "bidirectional": spec.bidirectional,
    }  # fmt: skip
    if spec.projection_size is not None:
        options["projection_size"] = spec.projection_size
    if spec.state_clip_min is not None:
        options.update({f"lstm_state_clip_{end}": getattr(spec, f"state_clip_{end}") for end in ("min", "max", "nan")})
    return options


def asked(spec, requests):
    """One request for each argument of that network."""
    arguments = ARGUMENTS[: 2 + len(spec.state_names)]
    return None if requests is None else {name: requests.get(name, "null") for name in arguments}


def job_of(case, given, *, plain=False):
    """The worker's job for a case, and its arrays; ``plain`` without what MXNet is known to ignore."""
    spec = replace(case.spec, state_clip_min=None, state_clip_max=None, state_clip_nan=False) if plain else case.spec
    options = options_of(spec)
    operands = given["x"], given["params"], *(given[f"{state}0"] for state in spec.state_names)
    arrays = dict(zip(case.arguments, operands, strict=True))
    if case.lengths is not None and not plain:
        arrays["sequence_length"] = np.array(case.lengths)
        options["use_sequence_length"] = True
    upstream = {name: one for name, one in given.items() if name in ("dy", "dh_n", "dc_n")}
    held = {}
    for name in case.requests or ():
        # What is to be overwritten must not matter.
        held[f"held_{name}"] = given.get(f"held_{name}", np.full(arrays[name].shape, 7.0, spec.dtype))
    job = {"kind": "operator", "dtype": spec.dtype, "options": options, "grad_req": case.requests}
    return job, arrays | upstream | held


def inputs_of(case, problem):
    """The arrays of a case's vector of inputs."""
    names = case.spec.state_names
    given = {"x": problem.x, "params": problem.params, "dy": problem.dy}
    given |= {f"{name}0": one for name, one in zip(names, problem.states, strict=True)}
    given |= {f"d{name}_n": one for name, one in zip(names, problem.dstates, strict=True)}
    rng = np.random.default_rng(1)
    shapes = case.input_shapes()
    for name in case.arguments:
        if f"held_{name}" in shapes:
            values = rng.standard_normal(shapes[f"held_{name}"]).astype(np.float32)
            given[f"held_{name}"] = values.astype(case.spec.dtype)
    return given


def made(case, problem, arrays):
    """Run a case: its outcome goes into the case, its vectors into ``arrays``."""
    given = inputs_of(case, problem)
    exact = exact_results(case, given, variant_results(problem))
    arrays[f"{case.name}/in"] = joined(given, case.input_shapes())
    for path in PATHS:
        found = run(*job_of(case, given), path)
        if isinstance(found, str):
            case.outcome[path] = {"error": found}
            continue
        wrong = wrong_results(case, found, exact)
        case.outcome[path] = {"wrong": wrong}
        if wrong:
            case.outcome[path]["off"] = largest_error(case, found, exact)
        if case.lengths is not None or case.spec.state_clip_min is not None:
            plain = run(*job_of(case, given, plain=True), path)
            case.outcome[path]["ignored"] = all(np.array_equal(found[name], plain[name]) for name in found)
        vector = joined(blanked(case, found, wrong), case.result_shapes())
        if not np.isnan(vector).all():
            arrays[f"{case.name}/{path}"] = vector
    return case


def largest_error(case, found, exact):
    """How far a result is off at most, as a part of the largest element that it should have, to two digits."""
    parts = {name: float(np.abs(found[name] - exact[name]).max() / np.abs(exact[name]).max()) for name in exact}
    return float(f"{max(parts.values()):.2g}")


def named(spec, shape, note=""):
    """The name of a case."""
    way = "bi" if spec.bidirectional else "uni"
    sizes = f"T{shape.T}-N{shape.N}-I{shape.I}-H{shape.H}"
    return "-".join(filter(None, (spec.mode, f"L{spec.num_layers}", way, sizes, note)))


def cases():
    """Every case with its problem."""

    def case(problem, shape, requests, note=""):
        spec = problem.spec
        lengths = None if problem.lengths is None else tuple(problem.lengths.tolist())
        return Case(named(spec, shape, note), spec, shape.T, shape.N, lengths, asked(spec, requests), {}), problem

    everything = dict.fromkeys(ARGUMENTS, "write")
    for mode in MODES:
        shapes = [Shape(4, 2, 3, 4, layers, both) for layers in (1, 2, 3, 4) for both in (False, True)]
        shapes += [Shape(4, 2, 6, 3, layers, both) for layers in (2, 3) for both in (False, True)]
        shapes += [Shape(3, 2, 4, 4, 3, True), Shape(1, 1, 2, 3, 2, True)]
        for shape in shapes:
            yield case(training_problem(mode, shape), shape, everything)
        yield case(training_problem(mode, DEEP, "float64"), DEEP, everything, "float64")
        for note, requests in REQUESTS.items():
            yield case(training_problem(mode, DEEP), DEEP, requests, note)
        padded = replace(DEEP, N=3, lengths="edges")
        yield case(training_problem(mode, padded), padded, everything, "lengths")
    yield from (case(*one) for one in _lstm_variants(everything))


def _lstm_variants(everything):
    """Projection, which MXNet has in inference alone, and clipping."""
    for layers in (1, 2, 3):
        for both in (False, True):
            shape = Shape(4, 2, 3, 4, layers, both)
            yield problem_of(RNNSpec("lstm", 3, 4, layers, both, projection_size=2), shape), shape, None, "projection"
    one = replace(DEEP, layers=1, bidirectional=False)
    yield problem_of(RNNSpec("lstm", 3, 4, projection_size=2), one), one, everything, "projection-training"
    for nan in (False, True):
        clip = {"state_clip_min": -0.1, "state_clip_max": 0.1, "state_clip_nan": nan}
        note = "clip-nan" if nan else "clip"
        yield problem_of(RNNSpec("lstm", 3, 4, 3, True, **clip), DEEP), DEEP, everything, note
    clip["projection_size"] = 2
    yield problem_of(RNNSpec("lstm", 3, 4, 3, True, **clip), DEEP), DEEP, None, "projection-clip"


LAYERS = {
    "lstm": ("LSTM", {"hidden_size": 4, "num_layers": 2, "bidirectional": True, "layout": "NTC"}),
    "gru": ("GRU", {"hidden_size": 4, "num_layers": 2}),
    "rnn": ("RNN", {"hidden_size": 4, "num_layers": 2, "activation": "tanh", "bidirectional": True}),
    "projection": ("LSTM", {"hidden_size": 4, "num_layers": 2, "projection_size": 2}),
}


def made_layer(name, arrays):
    """Run a layer of gluon: its arrays, by name, go into ``arrays``."""
    kind, options = LAYERS[name]
    mode = f"rnn_{options['activation']}" if kind == "RNN" else kind.lower()
    both, projection = options.get("bidirectional", False), options.get("projection_size")
    spec = RNNSpec(mode, 3, options["hidden_size"], options["num_layers"], both, projection_size=projection)
    problem = problem_of(spec, Shape(4, 2, 3, 4, 2, both))
    turned = (lambda one: one.swapaxes(0, 1)) if options.get("layout") == "NTC" else (lambda one: one)
    given = {f"net_{name}": one for name, one in spec.layout.unpack(problem.params).items()}
    given |= {"x": turned(problem.x), "dy": turned(problem.dy)}
    given |= {f"{one}0": state for one, state in zip(spec.state_names, problem.states, strict=True)}
    given |= {f"d{one}_n": state for one, state in zip(spec.state_names, problem.dstates, strict=True)}
    trains = projection is None
    job = {"kind": "layer", "class": kind, "options": {**options, "input_size": 3}, "trains": trains}
    arrays.update({f"layer-{name}/in/{key}": value for key, value in given.items()})
    exact = variant_results(problem)
    case = Case("", spec, 4, 2, None, asked(spec, dict.fromkeys(ARGUMENTS, "write") if trains else None), {})
    for path in PATHS:
        found = run(job, given, path)
        # States' gradients are not asked for: exact ones stand in.
        results = exact_results(case, {}, exact)
        plain = {**results, **{one: found[one] for one in ("h_n", "c_n") if one in found}, "y": turned(found["y"])}
        if trains:
            plain["ddata"] = turned(found["dx"])
            grads = {one.removeprefix("grad:net_"): value for one, value in found.items() if one.startswith("grad:")}
            plain["dparameters"] = spec.layout.pack(grads)
        assert not wrong_results(case, plain, results), (name, path)
        arrays.update({f"layer-{name}/{path}/{key}": value for key, value in found.items()})
    return {"class": kind, "options": options, "trains": trains}


def histories():
    """What several calls in a row show, for each path and mode."""
    found = {}
    for name in HISTORIES:
        for mode in MODES:
            for path in PATHS:
                result = run({"kind": "history", "name": name, "mode": mode}, {}, path)
                value = result if isinstance(result, str) else json.loads(str(result["facts"]))["difference"]
                found.setdefault(name, {}).setdefault(mode, {})[path] = value
    return found


def described(case):
    """A case as it is written."""
    usual = RNNSpec("lstm", 1, 1)
    spec = {name: value for name, value in asdict(case.spec).items() if value != getattr(usual, name) or name == "mode"}
    return {"spec": spec, "T": case.T, "N": case.N, "lengths": case.lengths, "requests": case.requests,
            "outcome": case.outcome}  # fmt: skip


def main():
    if not ENVIRONMENT.is_built():
        sys.exit(f"MXNet's environment is not built: {ENVIRONMENT.folder}; run make peers")
    arrays, contents = {}, {"made_with": list(ENVIRONMENT.requirements), "operator": {}}
    for case, problem in cases():
        contents["operator"][case.name] = described(made(case, problem, arrays))
        print(case.name, json.dumps(case.outcome), flush=True)
    contents["layers"] = {f"layer-{name}": made_layer(name, arrays) for name in LAYERS}
    contents["histories"] = histories()
    print(json.dumps(contents["histories"], indent=1))
    np.savez_compressed(FOLDER / "mxnet.npz", **arrays)
    (FOLDER / "mxnet.json").write_text(written(contents))


def written(contents):
    """As JSON, a case a line."""
    parts = []
    for name, one in contents.items():
        items = one.items() if isinstance(one, dict) else ()
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in items]
        parts.append(f" {json.dumps(name)}: " + ("{\n" + ",\n".join(lines) + "\n }" if lines else json.dumps(one)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
