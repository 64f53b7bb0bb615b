"""Converts the weights W, R, B and P of a recurrent node to specs and flat parameter vectors, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.arrays import Array
from fusedrnn.layout import Kind, Parameter
from fusedrnn.onnx.attributes import Settings
from fusedrnn.onnx.quantized import QUANTIZATION, quantized_weights
from fusedrnn.quantized_params import QuantizedParams
from fusedrnn.spec import RNNSpec

WEIGHTS = ("W", "R", "B", "P", *QUANTIZATION)
COMPUTED = {"float32": "float32", "float64": "float64", "float16": "float32", "bfloat16": "float32"}
"""The number formats of a node, and for each the dtype of the spec that computes it."""
_COMPUTE = {"bfloat16": "bfloat16"}
"""The format of GEMM operands of a node in this number format, if it is not the spec's dtype."""

# ONNX's order of gates and of peepholes, by fusedrnn's names of the gates.
_GATES = {"LSTM": "iofg", "GRU": "zrn", "RNN": "a"}
_PEEPHOLES = "iof"
# The input that holds a kind of parameter, and the index of its block of gates in that input.
_SOURCES: dict[Kind, tuple[str, int]] = {
    "i2h_weight": ("W", 0),
    "h2h_weight": ("R", 0),
    "peephole_weight": ("P", 0),
    "i2h_bias": ("B", 0),
    "h2h_bias": ("B", 1),
}


@dataclass(frozen=True)
class Part:
    """A spec and its parameters, for a whole layer, or for one direction if the directions' activations differ.

    Attributes:
        spec: The spec of one layer with one direction or two.
        params: The flat vector of ``spec.layout``, a copy; for a node with quantized weights, :class:`QuantizedParams`.
    """

    spec: RNNSpec
    params: Any


def from_onnx(settings: Settings, weights: Mapping[str, Array]) -> tuple[Part, ...]:
    """The parts that run a node with these weights: one, or one per direction if their activations differ.

    Raises:
        TypeError: If a node cannot have weights in that number format, or their formats differ.
        ValueError: If shapes contradict one another or the attributes.
    """
    if settings.quantized:
        return _from_quantized(settings, weights)
    parts = tuple(Part(spec, np.empty(spec.layout.size, spec.dtype)) for spec in _specs(settings, weights))
    for _, params, weight, rows in _blocks(settings.kind, parts, weights):
        params[...] = weight[rows]
    return parts


def _from_quantized(settings: Settings, weights: Mapping[str, Array]) -> tuple[Part, ...]:
    """:func:`from_onnx` for a DynamicQuantizeLSTM. Symmetric integers and their scales are used without change."""
    matrices = quantized_weights(weights, settings.num_directions)
    floats = {name: value for name, value in weights.items() if name not in QUANTIZATION}
    floats |= {name: matrix.dequantize() for name, matrix in matrices.items()}
    plain = from_onnx(replace(settings, quantized=False), floats)
    specs = [replace(part.spec, compute="int8") for part in plain]
    if not all(matrix.is_symmetric for matrix in matrices.values()):
        params = [QuantizedParams.quantize(spec, part.params) for spec, part in zip(specs, plain, strict=True)]
        return tuple(map(Part, specs, params))
    parts = []
    for first_direction, spec in enumerate(specs):
        arrays: dict[str, Any] = {}
        for entry, name, rows in _sources(settings.kind, spec):
            direction = first_direction + entry.direction
            if name in matrices:
                matrix = matrices[name]
                arrays[entry.name] = matrix.integers[direction][rows], matrix.scales[direction][rows]
            else:
                arrays[entry.name] = floats[name][direction][rows]
        parts.append(Part(spec, QuantizedParams.pack(spec, arrays)))
    return tuple(parts)


def to_onnx(kind: str, parts: Sequence[Part], weights: Mapping[str, Array]) -> None:
    """Write the parts into the node's weights. Weights that no spec uses, such as of a coupled f, do not change.

    Raises:
        ValueError: If a finite parameter is too large for the number format of a weight; the message names the weight.
    """
    for name, params, weight, rows in _blocks(kind, parts, weights):
        with np.errstate(over="ignore"):  # an error says more than NumPy's warning
            weight[rows] = params
        overflows = np.isfinite(params) & ~np.isfinite(weight[rows])
        if overflows.any():
            raise ValueError(f"{name} must hold numbers that {weight.dtype} can hold; got {params[overflows][0]}")


def _blocks(
    kind: str, parts: Sequence[Part], weights: Mapping[str, Array]
) -> Iterator[tuple[str, Array, Array, NDArray[np.intp]]]:
    """For each parameter: the name of its weight, views of it and of the weight, and the weight's rows in our order."""
    for first_direction, part in enumerate(parts):
        for entry, name, rows in _sources(kind, part.spec):
            yield name, entry.view(part.params), weights[name][first_direction + entry.direction], rows


def _sources(kind: str, spec: RNNSpec) -> Iterator[tuple[Parameter, str, NDArray[np.intp]]]:
    """Each parameter, the input that holds it, and the rows of that input in fusedrnn's order."""
    for entry in spec.layout:
        name, block = _SOURCES[entry.kind]
        onnx_gates = _PEEPHOLES if name == "P" else _GATES[kind]
        gates = [block * len(onnx_gates) + onnx_gates.index(gate) for gate in spec.gates if gate in onnx_gates]
        rows = np.array(gates)[:, None] * spec.hidden_size + np.arange(spec.hidden_size)
        yield entry, name, rows.ravel()


def _specs(settings: Settings, weights: Mapping[str, Array]) -> Iterator[RNNSpec]:
    dtype = weights["W"].dtype.name
    if dtype not in COMPUTED:
        raise TypeError(f"W must be one of {', '.join(COMPUTED)}; got {weights['W'].dtype}")
    for name, weight in weights.items():
        check_same_format(name, weight, dtype)
    input_size, hidden_size = _sizes(settings, weights)
    directions = ("forward", "reverse") if len(set(settings.activations)) > 1 else (settings.direction,)
    for direction, activations in zip(directions, settings.activations, strict=False):
        mode = settings.kind.lower()
        if mode == "rnn":
            mode = "rnn_relu" if activations[0].name == "relu" else "rnn_tanh"
        yield RNNSpec(
            mode=mode,
            activations=activations,
            input_size=input_size,
            hidden_size=hidden_size,
            dtype=COMPUTED[dtype],
            compute=_COMPUTE.get(dtype),
            bidirectional=direction == "bidirectional",
            reverse=direction == "reverse",
            gate_clip=settings.clip,
            bias="double" if "B" in weights else "none",
            peepholes="P" in weights,
            coupled_gates=settings.input_forget,
            reset_after=settings.kind != "GRU" or settings.linear_before_reset,
        )


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
            direction = f"direction {settings.direction!r}"
            raise ValueError(f"{name} must have shape {shapes[name]} for {direction} and H = {H}; got {weight.shape}")
    return I, H


def check_same_format(name: str, value: Array, dtype: str) -> None:
    """Reject an array whose number format differs from W's."""
    if value.dtype.name != dtype:
        raise TypeError(f"{name} must be {dtype}, as W is; got {value.dtype}")


def format_of(settings: Settings, weights: Mapping[str, Array]) -> str:
    """The number format of a node's inputs and outputs: that of W, or float32 where W is in integers."""
    return "float32" if settings.quantized else weights["W"].dtype.name


def state_of(
    inputs: Mapping[str, Array], name: str, settings: Settings, hidden_size: int, batch: int | None = None
) -> Array:
    """A node's initial state as (D, N, H) in the number format of the computation.

    Checks that its number format is that of W, and that its shape fits H, and N if ``batch`` gives it.
    """
    state, dtype = inputs[name], format_of(settings, inputs)
    check_same_format(name, state, dtype)
    D, H = settings.num_directions, hidden_size
    expected = (batch, D, H) if settings.batch_first else (D, batch, H)
    if (
        state.ndim != 3
        or 0 in state.shape
        or any(e not in (None, s) for e, s in zip(expected, state.shape, strict=True))
    ):
        axes = ", ".join("N" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must have shape ({axes}); got {state.shape}")
    state = state.swapaxes(0, 1) if settings.batch_first else state
    return state.astype(COMPUTED[dtype], copy=False)
