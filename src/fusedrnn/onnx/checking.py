"""Models checked by onnx's checker; also accepts what ONNX Runtime accepts and the checker refuses."""

from __future__ import annotations

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto

from fusedrnn.onnx.attributes import checker_context
from fusedrnn.onnx.errors import DOMAINS, errors_name_node, label
from fusedrnn.onnx.graph import opset_of


def checked(model: ModelProto) -> ModelProto:
    """A checked copy of the model, with ONNX's domain always named ``""``.

    The graph may lack a name, and its inputs and outputs a type or a shape: the copy has placeholders for them.

    Raises:
        ValueError: If the model is invalid; names the node if a node is.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    _unify_domain(copy)
    copy.graph.name = copy.graph.name or "graph"
    for entry in (*copy.graph.input, *copy.graph.output):
        _fill_type(entry)
    _check_nodes(copy)
    try:
        onnx.checker.check_model(copy)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"model must be valid: {error}") from error
    return copy


def _check_nodes(model: ModelProto) -> None:
    """Check each node with errors that name it; onnx's check of a whole model does not name every node."""
    opset = opset_of(model)
    graph = model.graph
    defined = {entry.name for entry in graph.input} | {tensor.name for tensor in graph.initializer}
    defined |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        with errors_name_node(label(node)):
            onnx.checker.check_node(node, checker_context(opset, model.ir_version))
            missing = [name for name in node.input if name and name not in defined]
            if missing:
                raise ValueError(f"its inputs must be defined before it; there is no {missing[0]!r}")
        defined.update(node.output)


def _unify_domain(model: ModelProto) -> None:
    """Import ONNX's own operators once, under the empty name, and give their nodes the same."""
    if any(entry.domain in DOMAINS for entry in model.opset_import):
        version = opset_of(model)
        others = [entry for entry in model.opset_import if entry.domain not in DOMAINS]
        del model.opset_import[:]
        model.opset_import.extend([onnx.helper.make_opsetid("", version), *others])
    for node in model.graph.node:
        if node.domain in DOMAINS:
            node.domain = ""


def _fill_type(entry: ValueInfoProto) -> None:
    if entry.type.WhichOneof("value") is None:
        entry.type.tensor_type.elem_type = TensorProto.FLOAT
    if entry.type.HasField("tensor_type"):
        entry.type.tensor_type.shape.SetInParent()
