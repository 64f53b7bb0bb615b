"""The network as an ONNX model: one node for each layer, weights inside it, as exporters write them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from fusedrnn.bench.peers.workers.protocol import Problem

_KINDS = {"lstm": "LSTM", "gru": "GRU"}
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
"""ONNX's gates, i o f c and z r h, in terms of ours."""

_OPSET, _IR = 14, 8
"""Old enough for every runtime, and the first whose RNN operators know layouts."""


def build(problem: Problem) -> bytes:
    """The model, from ``x`` to ``y`` and the final states ``h0``, ``h1`` ... and ``c0`` ... of each layer."""
    float_type = TensorProto.FLOAT if problem.dtype == "float32" else TensorProto.DOUBLE
    steps, batch, features = problem.x.shape
    hidden, directions = problem.hidden_size, len(problem.directions)
    nodes, constants, outputs = [], [], []
    current = "x"

    def constant(name: str, value: Any) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    constant("to_rows", np.array([steps, batch, directions * hidden], np.int64))
    for layer in range(problem.layers):
        inputs = [current, *(constant(f"{name}{layer}", value) for name, value in _weights(problem, layer).items())]
        final = [f"{name}{layer}" for name in problem.state_names]
        kind = _KINDS.get(problem.mode, "RNN")
        nodes.append(helper.make_node(kind, inputs, [f"all{layer}", *final], **_options(problem)))
        # (T, D, N, H) to (T, N, D*H)
        nodes.append(helper.make_node("Transpose", [f"all{layer}"], [f"turned{layer}"], perm=[0, 2, 1, 3]))
        current = "y" if layer == problem.layers - 1 else f"y{layer}"
        nodes.append(helper.make_node("Reshape", [f"turned{layer}", "to_rows"], [current]))
        outputs += [helper.make_tensor_value_info(name, float_type, [directions, batch, hidden]) for name in final]
    given = helper.make_tensor_value_info("x", float_type, [steps, batch, features])
    made = helper.make_tensor_value_info("y", float_type, [steps, batch, directions * hidden])
    graph = helper.make_graph(nodes, "network", [given], [made, *outputs], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def output_names(problem: Problem) -> list[str]:
    """Of the model: the output, then the final states layer by layer."""
    return ["y", *(f"{name}{layer}" for layer in range(problem.layers) for name in problem.state_names)]


def arrays(problem: Problem, made: Any) -> dict[str, Any]:
    """The outputs by our names, from those of the model in its order."""
    y, *final = made
    count = len(problem.state_names)
    return problem.outputs(y, [np.concatenate(final[state::count]) for state in range(count)])


def _weights(problem: Problem, layer: int) -> dict[str, Any]:
    """W (D, G*H, in), R (D, G*H, H) and B (D, 2*G*H), gates in ONNX's order."""
    order = _ORDER.get(problem.mode, (0,))
    each = [[_reorder(array, order) for array in problem.weights(layer, way)] for way in problem.directions]
    return {
        "W": np.stack([weights[0] for weights in each]),
        "R": np.stack([weights[1] for weights in each]),
        "B": np.stack([np.concatenate(weights[2:]) for weights in each]),
    }


def _reorder(array: Any, order: tuple[int, ...]) -> Any:
    gates = np.split(array, len(order))
    return np.concatenate([gates[gate] for gate in order])


def _options(problem: Problem) -> dict[str, Any]:
    options: dict[str, Any] = {"hidden_size": problem.hidden_size}
    if problem.bidirectional:
        options["direction"] = "bidirectional"
    if problem.mode == "gru":
        options["linear_before_reset"] = 1
    elif problem.mode != "lstm":
        options["activations"] = [problem.mode[4:].capitalize()] * len(problem.directions)
    return options
