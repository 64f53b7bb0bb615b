"""Properties of single nodes, graphs and functions: names in errors, operators, inputs, subgraphs, opsets, calls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from fusedrnn.lazy import cached_property
from fusedrnn.onnx.attributes import KINDS
from fusedrnn.onnx.quantized import QUANTIZATION, is_quantized

DOMAINS = ("", "ai.onnx")
"""Both names of the domain of ONNX's own operators."""
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P", *QUANTIZATION)
"""The inputs of an LSTM, then those that only DynamicQuantizeLSTM has. A GRU and an RNN have the first of these."""

_ERRORS = (TypeError, NotImplementedError, ValueError)
_ONNX_ERRORS = (onnx.checker.ValidationError, onnx.defs.SchemaError, onnx.shape_inference.InferenceError)
_RECURRENT = re.compile("|".join(KINDS))
# The domain, the name and the overload of an operator.
_Key = tuple[str, str, str]

# ---- errors


@contextmanager
def errors_name_node(label: str) -> Iterator[None]:
    """Put the node's label before errors that are raised inside. Errors of the onnx package become a ValueError."""
    try:
        yield
    except _ERRORS as error:
        kind = next(kind for kind in _ERRORS if isinstance(error, kind))
        raise kind(f"{label}: {error}") from error
    except _ONNX_ERRORS as error:
        raise ValueError(f"{label}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message; empty if it has none."""
    return (str(error).splitlines() or [""])[0]


def label(node: NodeProto) -> str:
    """The text for a node in errors: its name, or its first output if it has no name, and its operator."""
    name = f"node {node.name!r}" if node.name else f"the node of {first_output(node)!r}"
    return f"{name} ({operator_name(node)})"


# ---- nodes


def domain_of(element: NodeProto | FunctionProto) -> str:
    """The domain of a node or function, ``""`` for ONNX's own."""
    return "" if element.domain in DOMAINS else element.domain


def operator_name(node: NodeProto) -> str:
    """The node's operator, preceded by its domain unless that is ONNX's own."""
    return f"{node.domain}.{node.op_type}" if domain_of(node) else node.op_type


def first_output(node: NodeProto) -> str:
    """The name of the first output that has a name."""
    return next(filter(None, node.output), "")


def is_recurrent(node: NodeProto) -> bool:
    """Whether the node is one of ONNX's LSTM, GRU and RNN, or a DynamicQuantizeLSTM."""
    return (node.op_type in KINDS and node.domain in DOMAINS) or is_quantized(node)


def has_recurrent_name(node: NodeProto) -> bool:
    """Whether the operator's name contains LSTM, GRU or RNN, as in quantized models with operators of other domains."""
    return _RECURRENT.search(node.op_type) is not None


def inputs_of(node: NodeProto) -> dict[str, str]:
    """The values that a recurrent node reads, by the schema's names; omitted inputs are absent."""
    return {name: value for name, value in zip(INPUTS, node.input, strict=False) if value}


def subgraphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """The graphs in the node's attributes, each with a name."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from ((f"{attribute.name}[{index}]", graph) for index, graph in enumerate(attribute.graphs))


# ---- graphs, functions and models


def _nodes_within(body: GraphProto | FunctionProto) -> list[NodeProto]:
    """The nodes of the graph or function and of all subgraphs in it."""
    nodes = list(body.node)
    for node in nodes:  # the loop appends to the list
        for _, graph in subgraphs(node):
            nodes += graph.node
    return nodes


def uses(graph: GraphProto) -> Counter[str]:
    """How many inputs of nodes and outputs of graphs read each name, including subgraphs."""
    count = Counter(output.name for output in graph.output)
    for node in _nodes_within(graph):
        count.update(node.input)
        for _, subgraph in subgraphs(node):
            count.update(output.name for output in subgraph.output)
    return count


def opset_of(owner: ModelProto | FunctionProto) -> int:
    """The last version of ONNX's own operators that a model or function imports; if there is none, a ValueError."""
    versions = [int(entry.version) for entry in owner.opset_import if entry.domain in DOMAINS]
    if not versions:
        kind = "model" if isinstance(owner, ModelProto) else f"function {owner.name!r}"
        raise ValueError(f"{kind} must import an opset of ONNX's own operators; got none")
    return versions[-1]


class Functions:
    """The functions that a model defines."""

    def __init__(self, model: ModelProto) -> None:
        self._by_key = {_key(function, function.name): function for function in model.functions}

    def called_by(self, node: NodeProto) -> FunctionProto | None:
        """The function that the node calls; a function replaces an operator of the same name."""
        return self._by_key.get(_key(node, node.op_type)) if self._by_key else None

    def is_recurrent(self, function: FunctionProto) -> bool:
        """Whether the function or one that it calls, directly or not, holds a recurrent node."""
        return _key(function, function.name) in self._recurrent

    @cached_property
    def _recurrent(self) -> set[_Key]:
        nodes = {key: _nodes_within(function) for key, function in self._by_key.items()}
        calls = {key: {_key(node, node.op_type) for node in within} for key, within in nodes.items()}
        recurrent = {key for key, within in nodes.items() if any(map(has_recurrent_name, within))}
        size = -1
        while size != len(recurrent):
            size = len(recurrent)
            recurrent |= {key for key, called in calls.items() if not called.isdisjoint(recurrent)}
        return recurrent


def _key(element: NodeProto | FunctionProto, name: str) -> _Key:
    return domain_of(element), name, element.overload
