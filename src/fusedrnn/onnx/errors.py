"""Errors name the node that they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx

DOMAINS = ("", "ai.onnx")
"""Both names of the domain of ONNX's own operators."""

_ERRORS = (TypeError, NotImplementedError, ValueError)
_ONNX_ERRORS = (onnx.checker.ValidationError, onnx.defs.SchemaError, onnx.shape_inference.InferenceError)


def domain_of(element: onnx.NodeProto | onnx.FunctionProto) -> str:
    """The domain of a node or function, ``""`` for ONNX's own."""
    return "" if element.domain in DOMAINS else element.domain


def operator_name(node: onnx.NodeProto) -> str:
    """The node's operator, preceded by its domain unless that is ONNX's own."""
    return f"{node.domain}.{node.op_type}" if domain_of(node) else node.op_type


def label(node: onnx.NodeProto) -> str:
    """The node in an error: its name, or its first output if it has no name, and its operator."""
    name = f"node {node.name!r}" if node.name else f"the node of {first_output(node)!r}"
    return f"{name} ({operator_name(node)})"


def first_output(node: onnx.NodeProto) -> str:
    """The name of the first output that has one."""
    return next((output for output in node.output if output), "")


@contextmanager
def errors_name_node(label: str) -> Iterator[None]:
    """Put the node's label before errors raised inside; errors of the onnx package become a ValueError."""
    try:
        yield
    except _ERRORS as error:
        kind = next(kind for kind in _ERRORS if isinstance(error, kind))
        raise kind(f"{label}: {error}") from error
    except _ONNX_ERRORS as error:
        raise ValueError(f"{label}: {(str(error).splitlines() or [''])[0]}") from error
