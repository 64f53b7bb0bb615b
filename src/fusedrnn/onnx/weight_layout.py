"""The weights of a recurrent node, W, R, B and P, as specs and flat parameter vectors, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.layout import Kind, Parameter
from fusedrnn.onnx.attributes import Settings
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]

WEIGHTS = ("W", "R", "B", "P")
COMPUTED = {"float32": "float32", "float64": "float64", "float16": "float32", "bfloat16": "float32"}
"""The number formats of a node, and in which each is computed: results of the last two are rounded at the end."""

# ONNX's order of gates by our names for them, and that of the peepholes.
_GATES = {"LSTM": "iofg", "GRU": "zrn", "RNN": "a"}
_PEEPHOLES = "iof"
# Where a kind of parameter comes from: the input, and which of the blocks of gates that it stacks.
_SOURCES: dict[Kind, tuple[str, int]] = {
    "i2h_weight": ("W", 0),
    "h2h_weight": ("R", 0),
    "peephole_weight": ("P", 0),
    "i2h_bias": ("B", 0),
    "h2h_bias": ("B", 1),
}


def specs(settings: Settings, weights: Mapping[str, Array]) -> tuple[RNNSpec, ...]:
    """What a node with these weights runs: one spec, or one for each direction if their activations differ.

    Raises:
        TypeError: If the weights are of a number format that is not one of a node, or of several.
        ValueError: If shapes do not fit one another, or not the attributes.
    """
    dtype = number_format("W", weights["W"])
    for name, weight in weights.items():
        same_format(name, weight, dtype)
    inputs, hidden = _sizes(settings, weights)
    apart = len(set(settings.activations)) > 1
    ways = ("forward", "reverse") if apart else (settings.direction,)
    return tuple(
        RNNSpec(
            input_size=inputs,
            hidden_size=hidden,
            dtype=COMPUTED[dtype],
            bidirectional=way == "bidirectional",
            reverse=way == "reverse",
            gate_clip=settings.clip,
            bias="double" if "B" in weights else "none",
            peepholes="P" in weights,
            coupled_gates=settings.input_forget,
            reset_after=settings.kind != "GRU" or settings.linear_before_reset,
            **_cell(settings, index),
        )
        for index, way in enumerate(ways)
    )


def _cell(settings: Settings, direction: int) -> dict[str, Any]:
    """The mode, and the activations."""
    functions = settings.activations[direction]
    if settings.kind != "RNN":
        return {"mode": settings.kind.lower(), "activations": functions}
    return {"mode": "rnn_relu" if functions[0].name == "relu" else "rnn_tanh", "activations": functions}


def number_format(name: str, value: Array) -> str:
    """The number format of an array, if a node may have it."""
    if value.dtype.name not in COMPUTED:
        raise TypeError(f"{name} must be one of {', '.join(COMPUTED)}; got {value.dtype}")
    return value.dtype.name


def same_format(name: str, value: Array, dtype: str) -> None:
    """Refuse an array of another number format than W's."""
    if value.dtype.name != dtype:
        raise TypeError(f"{name} must be {dtype}, as W is; got {value.dtype}")


def _sizes(settings: Settings, weights: Mapping[str, Array]) -> tuple[int, int]:
    """I and H, all shapes checked."""
    W, R = weights["W"], weights["R"]
    D, G = settings.num_directions, len(_GATES[settings.kind])
    for name, weight, last in (("W", W, "I"), ("R", R, "H")):
        if weight.ndim != 3:
            raise ValueError(f"{name} must have three axes, ({D}, {G}·H, {last}); got shape {weight.shape}")
    I, H = W.shape[2], R.shape[2]
    if settings.hidden_size not in (None, H):
        raise ValueError(f"hidden_size must be {H}, as R of shape {R.shape} has it; got {settings.hidden_size}")
    shapes = {"W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H), "P": (D, 3 * H)}
    for name, weight in weights.items():
        if weight.shape != shapes[name]:
            raise ValueError(
                f"{name} must have shape {shapes[name]} for direction {settings.direction!r} and H = {H}; "
                f"got {weight.shape}"
            )
    return I, H


def gather(kind: str, spec: RNNSpec, first: int, weights: Mapping[str, Array]) -> Array:
    """The flat parameter vector of a spec that stands for the node's directions from ``first`` on."""
    params = np.empty(spec.layout.size, spec.dtype)
    for entry, name, direction, rows in _places(kind, spec, first):
        spec.layout.view(params, entry.layer, entry.direction, entry.kind)[...] = weights[name][direction][rows]
    return params


def scatter(kind: str, spec: RNNSpec, first: int, params: Array, weights: Mapping[str, Array]) -> None:
    """Write the vector into the node's weights; what the spec does not use (f, if coupled) stays as it is."""
    for entry, name, direction, rows in _places(kind, spec, first):
        weights[name][direction][rows] = spec.layout.view(params, entry.layer, entry.direction, entry.kind)


def _places(kind: str, spec: RNNSpec, first: int) -> Iterator[tuple[Parameter, str, int, NDArray[np.intp]]]:
    """For each parameter: the node's input that holds it, the direction there, and the rows in our order of gates."""
    for entry in spec.layout:
        name, block = _SOURCES[entry.kind]
        theirs = _PEEPHOLES if name == "P" else _GATES[kind]
        ours = [gate for gate in spec.gates if gate in theirs]
        rows = _rows([block * len(theirs) + theirs.index(gate) for gate in ours], spec.hidden_size)
        yield entry, name, first + entry.direction, rows


def _rows(blocks: Sequence[int], size: int) -> NDArray[np.intp]:
    return (np.array(blocks)[:, None] * size + np.arange(size)).ravel()
