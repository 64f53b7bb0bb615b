"""Errors name the node that they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx

_ERRORS = (TypeError, NotImplementedError, ValueError)


def label(node: onnx.NodeProto) -> str:
    """What to call a node: its name if it has one, else its first output; and its kind."""
    name = f"node {node.name!r}" if node.name else f"the node of {first_output(node)!r}"
    return f"{name} ({node.op_type})"


def first_output(node: onnx.NodeProto) -> str:
    """The name of the first output that the node gives."""
    return next((output for output in node.output if output), "")


@contextmanager
def naming(node: onnx.NodeProto) -> Iterator[None]:
    """Let errors raised inside say which node they are about; those of onnx's checker become a ValueError."""
    try:
        yield
    except _ERRORS as error:
        kind = next(kind for kind in _ERRORS if isinstance(error, kind))
        raise kind(f"{label(node)}: {error}") from error
    except onnx.checker.ValidationError as error:
        raise ValueError(f"{label(node)}: {str(error).splitlines()[0]}") from error
