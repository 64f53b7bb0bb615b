"""Errors name the node that they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx

DOMAINS = ("", "ai.onnx")
"""Both spellings of the domain of ONNX's own operators."""

_ERRORS = (TypeError, NotImplementedError, ValueError)


def domain_of(element: onnx.NodeProto | onnx.FunctionProto) -> str:
    """The domain of a node or of a function, ONNX's own as ``""``."""
    return "" if element.domain in DOMAINS else element.domain


def operator_name(node: onnx.NodeProto) -> str:
    """The node's operator, with its domain unless that is ONNX's own."""
    return node.op_type if node.domain in DOMAINS else f"{node.domain}.{node.op_type}"


def label(node: onnx.NodeProto) -> str:
    """What to call a node: its name if it has one, else its first output; and its operator."""
    name = f"node {node.name!r}" if node.name else f"the node of {first_output(node)!r}"
    return f"{name} ({operator_name(node)})"


def first_output(node: onnx.NodeProto) -> str:
    """The name of the first output that the node gives."""
    return next((output for output in node.output if output), "")


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Let errors raised inside begin with the label of a node; those of onnx's checkers become a ValueError."""
    try:
        yield
    except _ERRORS as error:
        kind = next(kind for kind in _ERRORS if isinstance(error, kind))
        raise kind(f"{label}: {error}") from error
    except (
        onnx.checker.ValidationError,
        onnx.defs.SchemaError,
        onnx.shape_inference.InferenceError,
    ) as error:
        raise ValueError(f"{label}: {(str(error).splitlines() or [''])[0]}") from error
