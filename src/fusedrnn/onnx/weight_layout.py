"""Converts the weights W, R, B and P of a recurrent node to specs and flat parameter vectors, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.cell.activations import Activation
from fusedrnn.layout import Kind, Parameter
from fusedrnn.onnx.attributes import Settings
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]

WEIGHTS = ("W", "R", "B", "P")
COMPUTED = {"float32": "float32", "float64": "float64", "float16": "float32", "bfloat16": "float32"}
"""The number formats of a node, and the format that computes each."""

# ONNX's order of gates and of peepholes, in fusedrnn's names for gates.
_GATES = {"LSTM": "iofg", "GRU": "zrn", "RNN": "a"}
_PEEPHOLES = "iof"
# The input that holds a kind of parameter, and the index of its block of gates there.
_SOURCES: dict[Kind, tuple[str, int]] = {
    "i2h_weight": ("W", 0),
    "h2h_weight": ("R", 0),
    "peephole_weight": ("P", 0),
    "i2h_bias": ("B", 0),
    "h2h_bias": ("B", 1),
}


def specs(settings: Settings, weights: Mapping[str, Array]) -> tuple[RNNSpec, ...]:
    """The specs that run a node with these weights: one, or one per direction if their activations differ.

    Raises:
        TypeError: If a node cannot have the weights' number format, or they have several.
        ValueError: If shapes contradict one another or the attributes.
    """
    dtype = number_format("W", weights["W"])
    for name, weight in weights.items():
        check_same_format(name, weight, dtype)
    input_size, hidden_size = _sizes(settings, weights)
    directions = ("forward", "reverse") if len(set(settings.activations)) > 1 else (settings.direction,)
    return tuple(
        RNNSpec(
            mode=_mode(settings.kind, activations),
            activations=activations,
            input_size=input_size,
            hidden_size=hidden_size,
            dtype=COMPUTED[dtype],
            bidirectional=direction == "bidirectional",
            reverse=direction == "reverse",
            gate_clip=settings.clip,
            bias="double" if "B" in weights else "none",
            peepholes="P" in weights,
            coupled_gates=settings.input_forget,
            reset_after=settings.kind != "GRU" or settings.linear_before_reset,
        )
        for direction, activations in zip(directions, settings.activations, strict=False)
    )


def _mode(kind: str, activations: Sequence[Activation]) -> str:
    if kind != "RNN":
        return kind.lower()
    return "rnn_relu" if activations[0].name == "relu" else "rnn_tanh"


def number_format(name: str, value: Array) -> str:
    """The number format of an array, checked to be one of a node."""
    if value.dtype.name not in COMPUTED:
        raise TypeError(f"{name} must be one of {', '.join(COMPUTED)}; got {value.dtype}")
    return value.dtype.name


def check_same_format(name: str, value: Array, dtype: str) -> None:
    """Reject an array whose number format is not W's."""
    if value.dtype.name != dtype:
        raise TypeError(f"{name} must be {dtype}, as W is; got {value.dtype}")


def convert_state(name: str, state: Array, settings: Settings, dtype: str, shape: tuple[int, int | None, int]) -> Array:
    """A node's initial state as (D, N, H) in the number format of the computation.

    Checks that its number format is ``dtype``, that of W, and that its shape is ``shape``: D, N and H, None for any N.
    """
    check_same_format(name, state, dtype)
    D, N, H = shape
    expected = (N, D, H) if settings.batch_first else (D, N, H)
    if (
        state.ndim != 3
        or 0 in state.shape
        or any(e not in (None, s) for e, s in zip(expected, state.shape, strict=True))
    ):
        axes = ", ".join("N" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must have shape ({axes}); got {state.shape}")
    state = state.swapaxes(0, 1) if settings.batch_first else state
    return state.astype(COMPUTED[dtype], copy=False)


def _sizes(settings: Settings, weights: Mapping[str, Array]) -> tuple[int, int]:
    """I and H; checks all shapes."""
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


def from_onnx(kind: str, spec: RNNSpec, first_direction: int, weights: Mapping[str, Array]) -> Array:
    """The flat parameter vector of a spec that runs the node's directions from ``first_direction`` on."""
    params = np.empty(spec.layout.size, spec.dtype)
    for entry, name, direction, rows in _sources(kind, spec, first_direction):
        spec.layout.view(params, entry.layer, entry.direction, entry.kind)[...] = weights[name][direction][rows]
    return params


def to_onnx(kind: str, spec: RNNSpec, first_direction: int, params: Array, weights: Mapping[str, Array]) -> None:
    """Write the vector into the node's weights; what the spec does not use (f, if coupled) stays as it is."""
    for entry, name, direction, rows in _sources(kind, spec, first_direction):
        weights[name][direction][rows] = spec.layout.view(params, entry.layer, entry.direction, entry.kind)


def _sources(kind: str, spec: RNNSpec, first_direction: int) -> Iterator[tuple[Parameter, str, int, NDArray[np.intp]]]:
    """Of each parameter the node's input that holds it, its direction, and its rows in fusedrnn's gate order."""
    for entry in spec.layout:
        name, block = _SOURCES[entry.kind]
        onnx_gates = _PEEPHOLES if name == "P" else _GATES[kind]
        blocks = [block * len(onnx_gates) + onnx_gates.index(gate) for gate in spec.gates if gate in onnx_gates]
        rows = np.array(blocks)[:, None] * spec.hidden_size + np.arange(spec.hidden_size)
        yield entry, name, first_direction + entry.direction, rows.ravel()
