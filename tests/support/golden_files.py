"""What MXNet 1.9.1 computed: the files in goldens/, and what is in them.

``mxnet.json`` names every case with its spec, and how it ended on each of MXNet's two paths: with oneDNN, which is the
default, and native. ``mxnet.npz`` has three vectors for each case: ``in``, all inputs one behind the other, ``onednn``
and ``native``, all results. Where a result was wrong when the file was made, by the float64 oracle and the project's
tolerances, NaN is stored and not the wrong number. Where MXNet refused or crashed, there is no vector of results.
"""

import json
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

from fusedrnn import RNNSpec
from fusedrnn.testing.tolerance import difference, gradient_tolerance, longest_sum, tolerance
from problems import FEW, Problem

FOLDER = Path(__file__).parents[1] / "goldens"
PATHS = ("onednn", "native")
ARGUMENTS = ("data", "parameters", "state", "state_cell")


@dataclass(frozen=True)
class Case:
    """One call of MXNet's operator.

    ``requests`` has one of write, add and null for each of data, parameters, state and state_cell; it is None for
    inference. ``outcome`` says for each path what was wrong, or how it ended.
    """

    name: str
    spec: RNNSpec
    T: int
    N: int
    lengths: tuple | None
    requests: dict | None
    outcome: dict

    @property
    def arguments(self):
        """The arguments that have gradients."""
        return ARGUMENTS[: 2 + len(self.spec.state_names)]

    def input_shapes(self):
        """Shapes in the vector of inputs: the call's, gradients of its results, and what buffers of gradients held."""
        states = {f"{name}0": shape for name, shape in self._states()}
        shapes = {"x": (self.T, self.N, self.spec.input_size), "params": (self.spec.layout.size,), **states}
        if self.requests is not None:
            shapes["dy"] = (self.T, self.N, self.spec.output_size)
            shapes.update({f"d{name}_n": shape for name, shape in self._states()})
            for name, like in zip(self.arguments, ("x", "params", *states), strict=True):
                if self.requests[name] == "add":
                    shapes[f"held_{name}"] = shapes[like]
        return shapes

    def result_shapes(self):
        """Shapes in the vectors of results: outputs, final states, and the gradients that were asked for."""
        shapes = {"y": (self.T, self.N, self.spec.output_size)}
        shapes.update({f"{name}_n": shape for name, shape in self._states()})
        inputs = self.input_shapes()
        for name, like in zip(self.arguments, inputs, strict=False):
            if self.requests is not None and self.requests[name] != "null":
                shapes[f"d{name}"] = inputs[like]
        return shapes

    def _states(self):
        return zip(self.spec.state_names, self.spec.state_shape(self.N), strict=True)

    def inputs(self):
        """The arrays that went in, by name."""
        return cut(arrays()[f"{self.name}/in"], self.input_shapes())

    def results(self, path):
        """The arrays that came out, by name, NaN where they were wrong; None if there were none."""
        vector = arrays().get(f"{self.name}/{path}")
        return None if vector is None else cut(vector, self.result_shapes())

    def problem(self):
        """The inputs as a :class:`Problem`."""
        given, names = self.inputs(), self.spec.state_names
        lengths = None if self.lengths is None else np.array(self.lengths)
        states = tuple(given[f"{name}0"] for name in names)
        dstates = tuple(given.get(f"d{name}_n", np.zeros_like(given[f"{name}0"])) for name in names)
        dy = given.get("dy", np.zeros((self.T, self.N, self.spec.output_size), self.spec.dtype))
        return Problem(self.spec, given["x"], given["params"], states, lengths, dy, dstates)


def cut(vector, shapes):
    """Arrays of these shapes, one behind the other in a vector."""
    ends = np.cumsum([prod(shape) for shape in shapes.values()])
    assert ends[-1] == vector.size
    parts = np.split(vector, ends[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def joined(found, shapes):
    """The inverse of :func:`cut`."""
    for name, shape in shapes.items():
        assert found[name].shape == shape, name
    return np.concatenate([found[name].ravel() for name in shapes])


@cache
def arrays():
    """All vectors by name."""
    with np.load(FOLDER / "mxnet.npz") as file:
        return dict(file)


@cache
def contents():
    """The content of ``mxnet.json``."""
    return json.loads((FOLDER / "mxnet.json").read_text())


def cases():
    """All cases."""
    return [
        Case(name, RNNSpec(**one["spec"]), one["T"], one["N"], one["lengths"], one["requests"], one["outcome"])
        for name, one in contents()["operator"].items()
    ]


def layers():
    """All layers: name, class, options, arrays by name for each path."""
    return contents()["layers"]


def layer_arrays(name, part):
    """The arrays of a layer, by name: its inputs ``in``, or what a path computed."""
    start = f"{name}/{part}/"
    return {key.removeprefix(start): value for key, value in arrays().items() if key.startswith(start)}


def exact_results(case, given, oracle):
    """What the results of a case should be, by name, from its inputs by name and what an oracle says of its problem."""
    names = case.spec.state_names
    found = {"y": oracle.y, **{f"{name}_n": one for name, one in zip(names, oracle.states, strict=True)}}
    dx, dparams, dstates = oracle.gradients
    gradients = dict(zip(case.arguments, (dx, dparams, *dstates), strict=True))
    for name, gradient in gradients.items():
        if case.requests is not None and case.requests[name] != "null":
            found[f"d{name}"] = gradient + given.get(f"held_{name}", 0)
    return found


def wrong_results(case, found, exact):
    """The names of results that are not within the tolerances; gradients of parameters have the parameters' names."""
    spec, dtype = case.spec, case.spec.dtype
    limits = tolerance(dtype, longest_sum(spec))
    wrong = [name for name in ("y", "h_n", "c_n") if name in exact and difference(found[name], exact[name], *limits)]
    groups = [{f"d{name}": (found[f"d{name}"], exact[f"d{name}"]) for name in case.arguments
               if name != "parameters" and f"d{name}" in exact}]  # fmt: skip
    if "dparameters" in exact:
        for layer in range(spec.num_layers):
            for direction in range(spec.num_directions):
                entries = [spec.layout.entry(layer, direction, kind) for kind in spec.layout.kinds]
                groups.append({one.name: tuple(_part(one, both["dparameters"]) for both in (found, exact))
                               for one in entries})  # fmt: skip
    for group in groups:
        largest = max((float(np.abs(other).max()) for _, other in group.values()), default=0.0)
        for name, (one, other) in group.items():
            scale = float(np.abs(other).max()) if other.size >= FEW else largest
            if difference(one, other, *gradient_tolerance(dtype, spec, case.T, case.N, scale)):
                wrong.append(name)
    return wrong


def _part(entry, vector):
    return vector[entry.offset : entry.offset + entry.size]


def blanked(case, found, wrong):
    """The results with NaN for those that are wrong."""
    found = {name: one.copy() for name, one in found.items()}
    for entry in case.spec.layout:
        if entry.name in wrong:
            _part(entry, found["dparameters"])[...] = np.nan
    for name in set(wrong) & set(found):
        found[name][...] = np.nan
    return found


def near(spec, name, one, other):
    """Whether two results of a layer differ by no more than each of them may differ from the exact result."""
    if name in ("y", "h_n", "c_n"):
        limits = tolerance(spec.dtype, longest_sum(spec))
    else:
        # Biases and weights have one size: the largest number says how large an array's sums are.
        limits = gradient_tolerance(spec.dtype, spec, 4, 2, float(np.abs(other).max()))
    return difference(one, other, *limits) is None
