"""The functions that a model defines, and which of them are worth looking into."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from fusedrnn.onnx.errors import domain_of
from fusedrnn.onnx.graph import is_other_recurrent, is_recurrent, subgraphs
from onnx import FunctionProto, ModelProto, NodeProto

# Domain, name and overload.
_Key = tuple[str, str, str]


class Functions:
    """The functions of a model, by what calls them."""

    def __init__(self, model: ModelProto) -> None:
        self._by_key = {_key(function): function for function in model.functions}

    def called_by(self, node: NodeProto) -> FunctionProto | None:
        """The function that the node calls; a function stands in for an operator of the same name."""
        return self._by_key.get(_operator(node)) if self._by_key else None

    def is_recurrent(self, function: FunctionProto) -> bool:
        """Whether the function holds a recurrent node, directly or by way of functions that it calls."""
        return _key(function) in self._recurrent

    @cached_property
    def _recurrent(self) -> set[_Key]:
        nodes = {key: list(_nodes_within(function)) for key, function in self._by_key.items()}
        calls = {key: {_operator(node) for node in within} for key, within in nodes.items()}
        holders = {
            key
            for key, within in nodes.items()
            if any(is_recurrent(node) or is_other_recurrent(node) for node in within)
        }
        size = -1
        while size != len(holders):
            size = len(holders)
            holders |= {key for key, called in calls.items() if not called.isdisjoint(holders)}
        return holders


def _nodes_within(function: FunctionProto) -> Iterator[NodeProto]:
    """The nodes of a function and of the bodies in it."""
    pending = [function.node]
    while pending:
        for node in pending.pop():
            yield node
            pending += [graph.node for _, graph in subgraphs(node)]


def _is_recurrent_kind(node: NodeProto) -> bool:
    return is_recurrent(node) or is_other_recurrent(node)


def _key(function: FunctionProto) -> _Key:
    return domain_of(function), function.name, function.overload


def _operator(node: NodeProto) -> _Key:
    return domain_of(node), node.op_type, node.overload
