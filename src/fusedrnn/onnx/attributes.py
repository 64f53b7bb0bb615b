"""The attributes of recurrent nodes: of every version of the three operators, and of DynamicQuantizeLSTM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import onnx
from onnx.onnx_cpp2py_export.checker import CheckerContext

from fusedrnn.cell.activations import ACTIVATIONS, Activation
from fusedrnn.onnx.quantized import LSTM_VERSION, as_lstm, is_quantized

KINDS = ("LSTM", "GRU", "RNN")
VERSIONS = (1, 3, 7, 14, 22)
"""The supported versions of the three operators, in one tuple."""
DIRECTIONS = ("forward", "reverse", "bidirectional")

_DEFAULT_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
# Names of activations in fusedrnn, by ONNX's names for them.
_ACTIVATIONS = {name.title().replace("_", ""): name for name in ACTIVATIONS}
# ONNX no longer has operators with these names, so their parameters have no defaults.
_WITHOUT_DEFAULT = ("Affine", "ScaledTanh")


@dataclass(frozen=True)
class Settings:
    """The checked attributes of a node.

    Attributes:
        kind: ``"LSTM"``, ``"GRU"`` or ``"RNN"``.
        direction: One of :data:`DIRECTIONS`.
        activations: The activations of each direction, in the order of fusedrnn's cells.
        hidden_size: H; None if the node has no such attribute, so that H follows from the shape of R.
        clip: Bound on the absolute value of pre-activations; None for no bound.
        input_forget: Whether an LSTM's f is 1 - i.
        linear_before_reset: Whether a GRU's r multiplies the recurrent product.
        batch_first: Whether X is (N, T, I) (layout 1), not (T, N, I).
        quantized: Whether the weights are those of a DynamicQuantizeLSTM.
    """

    kind: str
    direction: str
    activations: tuple[tuple[Activation, ...], ...]
    hidden_size: int | None
    clip: float | None
    input_forget: bool
    linear_before_reset: bool
    batch_first: bool
    quantized: bool = False

    @property
    def num_directions(self) -> int:
        """D."""
        return len(self.activations)


def parse(node: onnx.NodeProto, opset: int, ir_version: int, versions: Sequence[int] = VERSIONS) -> Settings:
    """Check a recurrent node's attributes under this opset; ``versions`` are the supported versions of its operator.

    Raises:
        ValueError: If an attribute is invalid, which the message names, or there is no such opset.
        NotImplementedError: If the version of the operator is not supported.
        onnx.checker.ValidationError: If the node does not match its schema.
    """
    if is_quantized(node):
        return replace(parse(as_lstm(node), LSTM_VERSION, ir_version), quantized=True)
    context = checker_context(opset, ir_version)
    version = onnx.defs.get_schema(node.op_type, opset, "").since_version
    if version not in versions:
        raise NotImplementedError(f"{node.op_type}-{version} is not known; expected one of the versions {versions}")
    if node.domain:  # the checker does not know the domain's other name, "ai.onnx"
        node = deepcopy(node)
        node.domain = ""
    onnx.checker.check_node(node, context)
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if _flag(values, "output_sequence") and not any(node.output[:1]):  # an attribute before opset 7
        raise ValueError("output_sequence=1 needs the output Y, which must have a name; got none")
    direction = _direction(values, node.op_type, version)
    activations = _activations(node.op_type, 2 if direction == "bidirectional" else 1, values)
    clip = values.get("clip")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0; got {clip}")
    return Settings(
        kind=node.op_type,
        direction=direction,
        activations=activations,
        hidden_size=values.get("hidden_size"),
        clip=clip,
        input_forget=_flag(values, "input_forget"),
        linear_before_reset=values.get("linear_before_reset", 0) != 0,
        batch_first=_flag(values, "layout"),
    )


def checker_context(opset: int, ir_version: int) -> CheckerContext:
    """The context in which onnx's checker checks nodes; a ValueError if there is no such opset or format."""
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise ValueError(f"the opset must be from 1 to {newest}, the newest of this onnx package; got {opset}")
    if not 0 <= ir_version < 1 << 31:
        raise ValueError(f"ir_version must be a version of the format; got {ir_version}")
    context = CheckerContext()
    context.ir_version, context.opset_imports = ir_version, {"": opset}
    return context


def _direction(values: Mapping[str, Any], kind: str, version: int) -> str:
    direction: str = values.get("direction", b"forward").decode(errors="replace")
    if (kind, version, direction) == ("GRU", 1, "foward"):  # the default value, which the schema of GRU-1 misspells
        return "forward"
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}; got {direction!r}")
    return direction


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name, 0)
    if value not in (0, 1):
        raise ValueError(f"{name} must be 0 or 1; got {value}")
    return bool(value)


def _activations(kind: str, num_directions: int, values: Mapping[str, Any]) -> tuple[tuple[Activation, ...], ...]:
    """The activations of each direction with their parameters."""
    names = _activation_names(kind, num_directions, values)
    alphas, betas = (_parameters(parameter, names, values) for parameter in ("alpha", "beta"))
    activations = tuple(map(Activation, (_ACTIVATIONS[name] for name in names), alphas, betas))
    count = len(_DEFAULT_ACTIVATIONS[kind])
    return tuple(activations[first : first + count] for first in range(0, len(activations), count))


def _activation_names(kind: str, num_directions: int, values: Mapping[str, Any]) -> Sequence[str]:
    """The names in the node's list, which may be in any case; the defaults if it has none."""
    defaults = _DEFAULT_ACTIVATIONS[kind] * num_directions
    names = [name.decode(errors="replace") for name in values.get("activations", ())]
    if not names or (kind == "RNN" and names == ["Tanh", "Tanh"]):  # RNN's default for any direction
        return defaults
    if len(names) != len(defaults):
        raise ValueError(f"activations must be a list of {len(defaults)}; got {len(names)}: {', '.join(names)}")
    spellings = {name.lower(): name for name in _ACTIVATIONS}
    for name in names:
        if name.lower() not in spellings:
            raise ValueError(f"activations must be of {', '.join(_ACTIVATIONS)}; got {name!r}")
    return [spellings[name.lower()] for name in names]


def _parameters(parameter: str, names: Sequence[str], values: Mapping[str, Any]) -> list[float | None]:
    """The value of alpha or beta for each activation; None for its default. Only some activations take a value."""
    listed = values.get(f"activation_{parameter}", ())
    takers = [name for name in names if getattr(ACTIVATIONS[_ACTIVATIONS[name]], parameter) is not None]
    if len(listed) > len(takers):
        raise ValueError(
            f"activation_{parameter} must have at most {len(takers)} values, one for each function that takes one; "
            f"got {len(listed)}"
        )
    for name in takers[len(listed) :]:
        if name in _WITHOUT_DEFAULT:
            raise ValueError(f"activation_{parameter} must have a value for {name}, which has no default; got none")
    remaining = iter(listed)
    return [next(remaining, None) if name in takers else None for name in names]
