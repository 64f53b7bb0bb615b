"""What a model's graph holds: constants, who uses which value, which nodes there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from fusedrnn.onnx.attributes import KINDS
from fusedrnn.onnx.naming import label
from fusedrnn.onnx.weights import Array

DOMAINS = ("", "ai.onnx")
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


def opset_of(model: ModelProto) -> int:
    """The version of ONNX's own operators that the model was written for.

    Raises:
        ValueError: If the model does not say.
    """
    for entry in model.opset_import:
        if entry.domain in DOMAINS:
            return int(entry.version)
    raise ValueError("model must import an opset of ONNX's own operators; got none")


def is_recurrent(node: NodeProto) -> bool:
    """Whether the node is one of ONNX's LSTM, GRU and RNN."""
    return node.op_type in KINDS and node.domain in DOMAINS


def inputs_of(node: NodeProto) -> dict[str, str]:
    """The values that a recurrent node is given, by the schema's names; those that are left out are not there."""
    return {name: value for name, value in zip(INPUTS, node.input, strict=False) if value}


def tensors(graph: GraphProto) -> dict[str, TensorProto]:
    """The constants of a graph by name as the model holds them: initializers, Constant nodes' values, Identity of both.

    Those that are held otherwise are not among them.
    """
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.domain not in DOMAINS:
            continue
        if node.op_type == "Constant":
            found.update((node.output[0], one.t) for one in node.attribute if one.name == "value")
        elif node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def array_of(name: str, tensor: TensorProto) -> Array:
    """A constant as an array, which nobody can write to.

    Raises:
        ValueError: If its data are in another file.
    """
    if tensor.data_location == TensorProto.EXTERNAL:
        raise ValueError(f"constant {name!r} must be in the model, as onnx.load puts it there; got external data")
    array = np.asarray(numpy_helper.to_array(tensor))
    array.setflags(write=False)
    return array


def constants(graph: GraphProto) -> dict[str, Array]:
    """All constants of a graph as arrays by name; what is Identity of another is the same array.

    Raises:
        NotImplementedError: Naming a constant that is sparse, or that a Constant node holds otherwise than in
            ``value``.
        ValueError: As :func:`array_of`.
    """
    for sparse in graph.sparse_initializer:
        raise NotImplementedError(f"initializer {sparse.values.name!r} is sparse, which is not served")
    held = tensors(graph)
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] not in held:
            given = ", ".join(attribute.name for attribute in node.attribute)
            raise NotImplementedError(f"{label(node)}: a constant must be held in the attribute 'value'; got {given}")
    made: dict[int, Array] = {}
    for name, tensor in held.items():
        if id(tensor) not in made:
            made[id(tensor)] = array_of(name, tensor)
    return {name: made[id(tensor)] for name, tensor in held.items()}


def uses(graph: GraphProto) -> Counter[str]:
    """How many inputs of nodes, subgraphs' included, and outputs of the graph read each value."""
    count = Counter(output.name for output in graph.output)
    for node in graph.node:
        count.update(node.input)
        for inner in subgraphs(node):
            count.update(uses(inner))
    return count


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a node holds in its attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def hidden_recurrent(model: ModelProto) -> str | None:
    """A recurrent node within a subgraph or a function, described; None if there is none."""
    places = [(label(node), inner) for node in model.graph.node for inner in subgraphs(node)]
    nodes = [(f"function {function.name!r}", node) for function in model.functions for node in function.node]
    while places or nodes:
        if nodes:
            where, node = nodes.pop()
            if is_recurrent(node):
                return f"{label(node)} in {where}"
            places += [(where, inner) for inner in subgraphs(node)]
        else:
            where, graph = places.pop()
            nodes += [(where, node) for node in graph.node]
    return None
