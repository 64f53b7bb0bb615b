"""Checks models with onnx's checker; also accepts models that ONNX Runtime runs and the checker rejects."""

from __future__ import annotations

from copy import deepcopy

import onnx
from onnx import ModelProto, TensorProto

from fusedrnn.onnx.attributes import checker_context
from fusedrnn.onnx.graph import DOMAINS, domain_of, errors_name_node, label, opset_of
from fusedrnn.onnx.quantized import LSTM_VERSION, as_lstm, is_quantized


def checked(model: ModelProto) -> ModelProto:
    """A checked copy of the model, with ONNX's domain always named ``""``.

    The graph may lack a name, and its inputs and outputs may lack a type or a shape: the copy has placeholders for
    these.

    Raises:
        ValueError: If the model is invalid; if a node is invalid, the message names it.
    """
    model = deepcopy(model)
    opset = opset_of(model)
    others = [entry for entry in model.opset_import if entry.domain not in DOMAINS]
    del model.opset_import[:]
    model.opset_import.extend([onnx.helper.make_opsetid("", opset), *others])
    graph = model.graph
    graph.name = graph.name or "graph"
    for node in graph.node:
        node.domain = domain_of(node)
    for entry in (*graph.input, *graph.output):
        if entry.type.WhichOneof("value") is None:
            entry.type.tensor_type.elem_type = TensorProto.FLOAT
        if entry.type.HasField("tensor_type"):
            entry.type.tensor_type.shape.SetInParent()
    _check_nodes(model, opset)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"model must be valid: {error}") from error
    return model


def _check_nodes(model: ModelProto, opset: int) -> None:
    """Check each node, with errors that name it; onnx's check of a whole model does not always name the node."""
    graph = model.graph
    defined = {entry.name for entry in graph.input} | {tensor.name for tensor in graph.initializer}
    defined |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        with errors_name_node(label(node)):
            if is_quantized(node):  # the checker does not know this operator
                onnx.checker.check_node(as_lstm(node), checker_context(LSTM_VERSION, model.ir_version))
            else:
                onnx.checker.check_node(node, checker_context(opset, model.ir_version))
            missing = [name for name in node.input if name and name not in defined]
            if missing:
                raise ValueError(f"its inputs must be defined before it; there is no {missing[0]!r}")
        defined.update(node.output)
