"""The network as an ONNX model, as exporters write it: one node for each layer, with weights as initializers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from benchmarks.peers.workers.protocol import Workload

_KINDS = {"lstm": "LSTM", "gru": "GRU"}
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
"""Our index of each of ONNX's gates i o f c and z r h."""

_OPSET, _IR = 14, 8
"""The first opset whose RNN operators have a layout attribute. It is old enough for every runtime."""


def build(work: Workload) -> bytes:
    """The model. Its input is ``x``; its outputs are ``y`` and the final states ``h0``, ``h1`` ... and ``c0`` ..."""
    float_type = TensorProto.FLOAT if work.dtype == "float32" else TensorProto.DOUBLE
    steps, batch, features = work.x.shape
    hidden, directions = work.hidden_size, len(work.directions)
    nodes, constants, outputs = [], [], []
    current = "x"

    def constant(name: str, value: Any) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    if directions == 1:
        constant("directions", np.array([1], np.int64))
    else:
        constant("y_shape", np.array([steps, batch, directions * hidden], np.int64))
    for layer in range(work.layers):
        inputs = [current, *(constant(f"{name}{layer}", value) for name, value in _weights(work, layer).items())]
        final = [f"{name}{layer}" for name in work.state_names]
        kind = _KINDS.get(work.mode, "RNN")
        nodes.append(helper.make_node(kind, inputs, [f"all{layer}", *final], **_options(work)))
        current = "y" if layer == work.layers - 1 else f"y{layer}"
        nodes += _joined_directions(layer, directions, current)
        outputs += [helper.make_tensor_value_info(name, float_type, [directions, batch, hidden]) for name in final]
    x_info = helper.make_tensor_value_info("x", float_type, [steps, batch, features])
    y_info = helper.make_tensor_value_info("y", float_type, [steps, batch, directions * hidden])
    graph = helper.make_graph(nodes, "network", [x_info], [y_info, *outputs], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def _joined_directions(layer: int, directions: int, output: str) -> list[onnx.NodeProto]:
    """The nodes that make (T, N, D*H) of a layer's (T, D, N, H), the same as exporters write."""
    every = f"all{layer}"
    if directions == 1:
        return [helper.make_node("Squeeze", [every, "directions"], [output])]
    return [
        helper.make_node("Transpose", [every], [f"time_batch{layer}"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", [f"time_batch{layer}", "y_shape"], [output]),
    ]


def output_names(work: Workload) -> list[str]:
    """The output names of the model: the output, then the final states of each layer."""
    return ["y", *(f"{name}{layer}" for layer in range(work.layers) for name in work.state_names)]


def arrays(work: Workload, values: Any) -> dict[str, Any]:
    """The outputs by our names, from the output values in the order of the model."""
    y, *final = values
    count = len(work.state_names)
    return work.outputs(y, [np.concatenate(final[state::count]) for state in range(count)])


def _weights(work: Workload, layer: int) -> dict[str, Any]:
    """W (D, G*H, in), R (D, G*H, H) and B (D, 2*G*H), gates in ONNX's order."""
    order = _ORDER.get(work.mode, (0,))
    by_direction = [[_reorder(array, order) for array in work.weights(layer, d)] for d in work.directions]
    return {
        "W": np.stack([weights[0] for weights in by_direction]),
        "R": np.stack([weights[1] for weights in by_direction]),
        "B": np.stack([np.concatenate(weights[2:]) for weights in by_direction]),
    }


def _reorder(array: Any, order: tuple[int, ...]) -> Any:
    gates = np.split(array, len(order))
    return np.concatenate([gates[gate] for gate in order])


def _options(work: Workload) -> dict[str, Any]:
    options: dict[str, Any] = {"hidden_size": work.hidden_size}
    if work.bidirectional:
        options["direction"] = "bidirectional"
    if work.mode == "gru":
        options["linear_before_reset"] = 1
    elif work.mode != "lstm":
        options["activations"] = [work.mode[4:].capitalize()] * len(work.directions)
    return options
