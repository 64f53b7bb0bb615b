"""What nodes say: whether they are recurrent, which values they read, which graphs they hold, for which opset."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import onnx
from fusedrnn.onnx.attributes import KINDS
from fusedrnn.onnx.errors import DOMAINS
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")

_RECURRENT = re.compile("LSTM|GRU|RNN")


def opset_of(owner: ModelProto | FunctionProto) -> int:
    """The version of ONNX's own operators that a model or a function is written for; of several entries the last.

    Raises:
        ValueError: If it does not say.
    """
    versions = [int(entry.version) for entry in owner.opset_import if entry.domain in DOMAINS]
    if not versions:
        kind = "model" if isinstance(owner, ModelProto) else f"function {owner.name!r}"
        raise ValueError(f"{kind} must import an opset of ONNX's own operators; got none")
    return versions[-1]


def is_recurrent(node: NodeProto) -> bool:
    """Whether the node is one of ONNX's LSTM, GRU and RNN."""
    return node.op_type in KINDS and node.domain in DOMAINS


def is_other_recurrent(node: NodeProto) -> bool:
    """Whether the node's operator is recurrent by its name, and not one of ONNX's three.

    There are such operators in other domains, and quantisers put some in the place of ONNX's.
    """
    return not is_recurrent(node) and _RECURRENT.search(node.op_type) is not None


def inputs_of(node: NodeProto) -> dict[str, str]:
    """The values that a recurrent node is given, by the schema's names; those that are left out are not there."""
    return {name: value for name, value in zip(INPUTS, node.input, strict=False) if value}


def subgraphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """The graphs that a node holds in its attributes, with what to call them."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            for index, graph in enumerate(attribute.graphs):
                yield f"{attribute.name}[{index}]", graph


def uses(graph: GraphProto) -> Counter[str]:
    """How many inputs of nodes and outputs of graphs read each name, subgraphs included."""
    count: Counter[str] = Counter()
    graphs = [graph]
    while graphs:
        current = graphs.pop()
        count.update(output.name for output in current.output)
        for node in current.node:
            count.update(node.input)
            graphs += [inner for _, inner in subgraphs(node)]
    return count
