"""Hashes of 500 random calls, of outputs and gradients, over engines, cells, formats, threads and targets.

``python tests/goldens/call_hashes.py`` checks them, ``--write`` draws the calls anew and writes the file. Each record
describes its call in full, so that the file stays valid when the lists that it was drawn from change.
"""

import hashlib
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np

from fusedrnn import Activation, RNNOp, RNNSpec, thread_limits

FILE = Path(__file__).with_suffix(".json")
CALLS = 500


def load():
    """The records of the file."""
    return json.loads(FILE.read_text())["calls"]


def group(call):
    """What a call shares its compiled kernels with: calls of one group run together."""
    spec = {key: value for key, value in call["spec"].items() if key not in _SIZES}
    return call["engine"], call["target"], json.dumps(spec, sort_keys=True)


_SIZES = ("input_size", "hidden_size", "num_layers", "bidirectional", "dropout", "projection_size", "reverse")


def machine():
    """What the bits of the NumPy engine depend on: its GEMM is a BLAS."""
    config = np.show_config(mode="dicts")
    simd = config.get("SIMD Extensions", {}).get("found", [])
    return f"{platform.machine()} numpy {np.__version__} {' '.join(simd)}"


def run(call):
    """Run one call and return the hash of everything that it gives."""
    options = dict(call["spec"])
    if options.get("activations"):
        options["activations"] = tuple(Activation(*entry) for entry in options["activations"])
    spec, steps, batch = RNNSpec(**options), call["steps"], call["batch"]
    rng = np.random.default_rng(call["data"])

    def uniform(shape, bound=1.0):
        return ((rng.random(shape) * 2 - 1) * bound).astype(np.float32).astype(spec.dtype)

    x = uniform((steps, batch, spec.input_size))
    params = uniform(spec.layout.size, spec.hidden_size**-0.5)
    states = tuple(uniform(shape) for shape in spec.state_shape(batch)) if call["states"] else None
    dy = uniform((steps, batch, spec.output_size))
    dstates = tuple(uniform(shape) for shape in spec.state_shape(batch))
    lengths = call["lengths"]
    digest = hashlib.sha256()
    with thread_limits(call["threads"]):
        op = RNNOp.get(spec, call["engine"])
        y, final, _ = op.forward(x, params, states, lengths=lengths)
        _add(digest, y, *final)
        if call["training"]:
            y, final, reserve = op.forward(
                x, params, states, training=True, lengths=lengths, reserve=call["reserve"], seed=call["seed"]
            )
            dx, dparams, dinitial = op.backward(dy, dstates, reserve)
            _add(digest, y, *final, dx, dparams, *dinitial)
    return digest.hexdigest()[:32]


def _add(digest, *arrays):
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())


def _draw():
    """Draw the calls: every cell on every target and format, every variant on two of these in turn."""
    sys.path.insert(0, str(FILE.parents[1] / "support"))
    from variants import VARIANTS, possible

    targets = ("avx2", "generic", "avx512-emulated", "avx512-half-emulated")
    kinds = [
        (mode, {}, target, dtype, "cpu")
        for mode in ("lstm", "gru", "rnn_relu", "rnn_tanh")
        for target in targets
        for dtype in ("float32", "float64")
    ]
    for number, (mode, options) in enumerate(VARIANTS.values()):
        kinds.append((mode, options, targets[number % 4], "float32", "cpu"))
        kinds.append((mode, options, targets[(number + 1) % 4], "float64", "cpu"))
        if number % 3 == 0:
            kinds.append((mode, options, "avx2", "float32", "reference"))
    kinds += [(mode, {}, "avx2", "float32", "reference") for mode in ("lstm", "gru", "rnn_relu", "rnn_tanh")]
    names = {id(options): name for name, (_, options) in VARIANTS.items()}
    rng = np.random.default_rng(2026)
    calls = []
    while len(calls) < CALLS:
        mode, options, target, dtype, engine = kinds[len(calls) % len(kinds)]
        hidden = int(rng.choice((1, 2, 3, 5, 8, 16, 17, 24, 33, 40, 63, 64, 100, 129)))
        if id(options) in names and not possible(names[id(options)], hidden):
            hidden += 1
        steps, batch = int(rng.choice((1, 2, 3, 7, 17, 30))), int(rng.choice((1, 2, 3, 5, 8, 17, 33)))
        bidirectional = bool(rng.integers(2))
        spec = {
            "mode": mode, "input_size": int(rng.choice((1, 2, 3, 17, 40, 65))), "hidden_size": hidden,
            "num_layers": int(rng.choice((1, 1, 2, 3))), "bidirectional": bidirectional, "dtype": dtype, **options,
        }  # fmt: skip
        if "projection_size" in options:
            spec["projection_size"] = max(1, int(options["projection_size"] * hidden))
        if options.get("activations"):
            spec["activations"] = [[a.name, a.alpha, a.beta] for a in options["activations"]]
        if not bidirectional and rng.integers(4) == 0:
            spec["reverse"] = True
        if rng.integers(4) == 0:
            spec["dropout"] = 0.25
        lengths = None if rng.integers(2) else [int(n) for n in rng.integers(0, steps + 1, batch)]
        calls.append({
            "spec": spec, "steps": steps, "batch": batch, "engine": engine, "target": target,
            "threads": int(rng.integers(1, 5)), "lengths": lengths, "states": bool(rng.integers(2)),
            "training": bool(rng.integers(4)), "reserve": "states" if rng.integers(3) == 0 else "gates",
            "seed": int(rng.integers(1 << 32)), "data": len(calls),
        })  # fmt: skip
    return calls


def _check(calls, write):
    """Run the calls, those that share kernels one after the other; how many differ from their records."""
    differ = 0
    for number in sorted(range(len(calls)), key=lambda number: group(calls[number])):
        os.environ["FUSEDRNN_TARGET"] = calls[number]["target"]
        result = run(calls[number])
        if run(calls[number]) != result:
            raise SystemExit(f"call {number} differs from itself")
        if write:
            calls[number]["hash"] = result
        elif result != calls[number]["hash"]:
            differ += 1
            print(f"call {number} differs: {calls[number]}")
    return differ


def _main():
    if "--write" in sys.argv:
        calls = _draw()
        _check(calls, write=True)
        lines = ",\n".join(json.dumps(call, sort_keys=True) for call in calls)
        FILE.write_text(f'{{"machine": {json.dumps(machine())}, "calls": [\n{lines}\n]}}\n')
        return 0
    calls = load()
    if json.loads(FILE.read_text())["machine"] != machine():
        calls = [call for call in calls if call["engine"] != "reference"]
        print("another machine or NumPy than the recorded one: the calls of the reference engine are left out")
    differ = _check(calls, write=False)
    print(f"{len(calls)} calls, {differ} differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(_main())
