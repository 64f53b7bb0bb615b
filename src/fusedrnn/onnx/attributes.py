"""What the attributes of a recurrent node ask for, in any version of the three operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx.onnx_cpp2py_export.checker import CheckerContext

import onnx
from fusedrnn.cell.activations import ACTIVATIONS, Activation

KINDS = ("LSTM", "GRU", "RNN")
VERSIONS = (1, 3, 7, 14, 22)
"""Of the three operators together: those that are known here."""
DIRECTIONS = ("forward", "reverse", "bidirectional")

_USUAL = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_FUNCTIONS = {
    "Relu": "relu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Affine": "affine",
    "LeakyRelu": "leaky_relu",
    "ThresholdedRelu": "thresholded_relu",
    "ScaledTanh": "scaled_tanh",
    "HardSigmoid": "hard_sigmoid",
    "Elu": "elu",
    "Softsign": "softsign",
    "Softplus": "softplus",
}
# There is no operator of that name any more whose defaults it could have.
_WITHOUT_DEFAULT = ("Affine", "ScaledTanh")
# The default of direction in GRU-1, as its schema spells it.
_SPELLED = {"foward": "forward"}


@dataclass(frozen=True)
class Settings:
    """The attributes of a node, checked.

    Attributes:
        kind: ``"LSTM"``, ``"GRU"`` or ``"RNN"``.
        direction: One of :data:`DIRECTIONS`.
        activations: The functions of each direction, in the order of our cells.
        hidden_size: H; None if the node leaves it to the shape of R.
        clip: Bound of the pre-activations' size; None for none.
        input_forget: Whether an LSTM's f is 1 - i.
        linear_before_reset: Whether a GRU's r multiplies the recurrent product.
        batch_first: Whether sequences, not steps, are the first axis (layout 1).
    """

    kind: str
    direction: str
    activations: tuple[tuple[Activation, ...], ...]
    hidden_size: int | None
    clip: float | None
    input_forget: bool
    linear_before_reset: bool
    batch_first: bool

    @property
    def num_directions(self) -> int:
        """D."""
        return len(self.activations)


def parse(node: onnx.NodeProto, opset: int, ir_version: int) -> Settings:
    """The settings of a recurrent node in a model of that opset.

    Raises:
        ValueError: Naming the attribute that cannot be as it is, or if the opset has no such node.
        NotImplementedError: If the version of the operator is newer than those known here.
        onnx.checker.ValidationError: If the node is not one that its schema allows.
    """
    context = checker_context(opset, ir_version)
    version = onnx.defs.get_schema(node.op_type, opset, "").since_version
    if version not in VERSIONS:
        raise NotImplementedError(f"{node.op_type}-{version} is not known; expected one of the versions {VERSIONS}")
    if node.domain:  # the other spelling of ONNX's own, which the checker does not know
        spelled, node = node, onnx.NodeProto()
        node.CopyFrom(spelled)
        node.domain = ""
    onnx.checker.check_node(node, context)
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    _check_sequence_output(node, values)
    direction = _direction(values.get("direction", b"forward"), node.op_type, version)
    return Settings(
        kind=node.op_type,
        direction=direction,
        activations=_activations(node.op_type, 2 if direction == "bidirectional" else 1, values),
        hidden_size=values.get("hidden_size"),
        clip=_clip(values),
        input_forget=_flag(values, "input_forget"),
        linear_before_reset=values.get("linear_before_reset", 0) != 0,
        batch_first=_flag(values, "layout"),
    )


def checker_context(opset: int, ir_version: int) -> CheckerContext:
    """What onnx's checker needs to know of a model to check its nodes.

    Raises:
        ValueError: If there is no such opset or version of the format.
    """
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise ValueError(f"the opset must be from 1 to {newest}, the newest of this onnx package; got {opset}")
    if not 0 <= ir_version < 1 << 31:
        raise ValueError(f"ir_version must be a version of the format; got {ir_version}")
    context = CheckerContext()
    context.ir_version, context.opset_imports = ir_version, {"": opset}
    return context


def _direction(given: bytes, kind: str, version: int) -> str:
    direction = given.decode(errors="replace")
    if (kind, version) == ("GRU", 1):
        direction = _SPELLED.get(direction, direction)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}; got {direction!r}")
    return direction


def _check_sequence_output(node: onnx.NodeProto, values: Mapping[str, Any]) -> None:
    """Before opset 7: output_sequence=1 asks for Y."""
    if _flag(values, "output_sequence") and not node.output[0]:
        raise ValueError("output_sequence=1 asks for the output Y, which must have a name; got none")


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name, 0)
    if value not in (0, 1):
        raise ValueError(f"{name} must be 0 or 1; got {value}")
    return bool(value)


def _clip(values: Mapping[str, Any]) -> float | None:
    if "clip" not in values:
        return None
    clip = float(values["clip"])
    if not clip > 0:
        raise ValueError(f"clip must be above 0; got {clip}")
    return clip


def _activations(kind: str, directions: int, values: Mapping[str, Any]) -> tuple[tuple[Activation, ...], ...]:
    """The functions of each direction, with the parameters that they take from the two lists in their order."""
    names = [_function(name) for name in _named(kind, directions, values)]
    alphas, betas = (_taken(which, names, values) for which in ("alpha", "beta"))
    found = tuple(map(Activation, (_FUNCTIONS[name] for name in names), alphas, betas))
    count = len(_USUAL[kind])
    return tuple(found[first : first + count] for first in range(0, len(found), count))


def _named(kind: str, directions: int, values: Mapping[str, Any]) -> Sequence[str]:
    """The functions' names, as many as there must be."""
    usual = _USUAL[kind] * directions
    given = [name.decode(errors="replace") for name in values.get("activations", ())]
    if not given or (kind == "RNN" and given == ["Tanh", "Tanh"]):  # RNN's default, whatever the direction
        return usual
    if len(given) != len(usual):
        raise ValueError(f"activations must be a list of {len(usual)}; got {len(given)}: {', '.join(given)}")
    return given


def _function(given: str) -> str:
    """The name as ONNX spells it, from one in any case."""
    for name in _FUNCTIONS:
        if name.lower() == given.lower():
            return name
    raise ValueError(f"activations must be of {', '.join(_FUNCTIONS)}; got {given!r}")


def _taken(which: str, names: Sequence[str], values: Mapping[str, Any]) -> list[float | None]:
    """For each function the next value of activation_alpha or activation_beta if it takes one; None for its default."""
    given = values.get(f"activation_{which}", ())
    takers = [name for name in names if getattr(ACTIVATIONS[_FUNCTIONS[name]], which) is not None]
    if len(given) > len(takers):
        raise ValueError(
            f"activation_{which} must have at most {len(takers)} values, one for each function that takes one; "
            f"got {len(given)}"
        )
    for name in takers[len(given) :]:
        if name in _WITHOUT_DEFAULT:
            raise ValueError(f"activation_{which} must have a value for {name}, of which ONNX has no default; got none")
    left = iter(given)
    return [next(left, None) if name in takers else None for name in names]
