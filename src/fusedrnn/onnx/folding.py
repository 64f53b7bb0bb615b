"""Values that a model computes from constants alone, computed when the model is read.

Nodes are evaluated by onnx's own ReferenceEvaluator, one by one. A model is not trusted: only operators whose time and
memory grow with their inputs and outputs are evaluated, the sizes of outputs are inferred beforehand, and all that is
computed is bounded by a multiple of what the model holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
from onnx.reference import ReferenceEvaluator

import onnx
from fusedrnn.onnx.errors import DOMAINS, naming
from fusedrnn.onnx.scopes import Origin, Scope
from fusedrnn.onnx.weight_layout import Array
from onnx import NodeProto, TensorProto, TypeProto, ValueInfoProto, helper, numpy_helper

FOLDED = frozenset(
    {
        "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "ConstantOfShape",
        "DequantizeLinear", "Div", "Equal", "Exp", "Expand", "Flatten", "Floor", "Gather", "Greater",
        "Identity", "Less", "Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow",
        "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
        "ReduceSum", "ReduceSumSquare", "Reshape", "Round", "Shape", "Sign", "Size", "Slice", "Split", "Sqrt",
        "Squeeze", "Sub", "Sum", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
    }
)  # fmt: skip
"""The operators that are evaluated: moving, converting and elementwise ones, reductions along axes."""

# What may be computed, in bytes: so much anyway, and so many times the constants that it is computed from.
_FREE_BYTES = 1 << 28
_TIMES = 16
# Operators that the evaluator has from this opset on; later versions take whatever earlier ones do.
_LEAST_EVALUATED = {"DequantizeLinear": 19}
# Inputs of up to so many elements may be axes, shapes and the like, which shapes of outputs depend on.
_MAX_SHAPE_DATA = 1024


class NotConstantError(ValueError):
    """A value that is not computed from constants alone, or by an operator that is not evaluated here."""


class Folder:
    """Computes constants of one model, each once."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], Array] = {}
        self._budget = _FREE_BYTES

    def array(self, scope: Scope, name: str) -> Array:
        """A value as a read-only array.

        Args:
            scope: Where the name is read.
            name: The value's name there.

        Raises:
            NotConstantError: If it is not computed from constants alone, or by an operator that is not evaluated.
            NotImplementedError: Naming a constant that is sparse or of text.
            ValueError: Naming the node that cannot be evaluated, or the constant whose data do not fit its shape.
        """
        target = _origin(scope, name)
        stack, waiting = [target], set()
        while stack:
            origin = stack[-1]
            missing = [] if origin.key in self._values else self._missing(origin)
            if not missing:
                if origin.key not in self._values:
                    self._compute(origin)
                stack.pop()
            elif origin.key in waiting:
                raise ValueError(f"value {origin.name!r} depends on itself")
            else:
                waiting.add(origin.key)
                stack += missing
        return self._values[target.key]

    def _missing(self, origin: Origin) -> list[Origin]:
        """The values to compute before this one."""
        node = origin.node
        if node is None:
            return []
        if node.domain not in DOMAINS or node.op_type not in FOLDED | {"Constant"}:
            raise NotConstantError(f"{origin.name!r} is the result of {origin.scope.label(node)}, which is not folded")
        sources = [_origin(origin.scope, name) for name in node.input if name]
        return [source for source in sources if source.key not in self._values]

    def _compute(self, origin: Origin) -> None:
        node, scope = origin.node, origin.scope
        if node is None:
            if origin.tensor is None:
                raise NotConstantError(f"it depends on {origin.name!r}, which is an input of a graph")
            self._keep(origin, array_of(origin.name, origin.tensor))
            return
        with naming(scope.label(node)):
            bound = scope.bound(node)
            if node.op_type == "Constant":
                self._keep(origin, constant_of(bound))
                return
            inputs = [self._values[_origin(scope, name).key] if name else None for name in bound.input]
            results = self._evaluated(bound, scope.opset, inputs)
        for name, result in zip(node.output, results, strict=True):
            if name:
                self._values[id(scope), name] = result

    def _keep(self, origin: Origin, array: Array) -> None:
        self._budget += _TIMES * array.nbytes
        self._values[origin.key] = array

    def _evaluated(self, node: NodeProto, opset: int, inputs: Sequence[Array | None]) -> list[Array]:
        """All outputs of the node, those without a name included."""
        # The evaluator and shape inference know inputs by name; a name here is a place.
        renamed = NodeProto()
        renamed.CopyFrom(node)
        renamed.domain = ""
        del renamed.input[:], renamed.output[:]
        renamed.input.extend("" if value is None else f"input{place}" for place, value in enumerate(inputs))
        renamed.output.extend(f"output{place}" for place in range(len(node.output)))
        arrays = {f"input{place}": value for place, value in enumerate(inputs) if value is not None}
        self._budget -= _bytes_of_outputs(renamed, opset, arrays)
        if self._budget < 0:
            raise ValueError(
                f"what is computed from constants must be at most {_FREE_BYTES >> 20} MiB and {_TIMES} times their "
                f"size; got more"
            )
        # A graph, since the evaluator takes a node alone for one of the newest opset.
        inputs_info, outputs_info = (
            [ValueInfoProto(name=name) for name in names] for names in (arrays, renamed.output)
        )
        graph = helper.make_graph([renamed], "node", inputs_info, outputs_info)
        version = max(opset, _LEAST_EVALUATED.get(node.op_type, opset))
        try:
            with np.errstate(all="ignore"):
                results = ReferenceEvaluator(graph, opsets={"": version}).run(None, arrays)
        except Exception as error:  # whatever the evaluator meets in a node that does not fit its inputs
            raise ValueError(f"cannot be evaluated: {type(error).__name__}: {error}") from error
        outputs = [np.asarray(result) for result in results]
        for array in outputs:
            array.setflags(write=False)
        return outputs


def _origin(scope: Scope, name: str) -> Origin:
    origin = scope.origin(name)
    if origin is None:
        raise NotConstantError(f"it depends on {name!r}, which the caller of the function leaves out")
    return origin


def _bytes_of_outputs(node: NodeProto, opset: int, arrays: Mapping[str, Array]) -> int:
    """How much memory the node's outputs take.

    Raises:
        ValueError: If shape inference cannot tell, or the node is not one that its schema allows.
    """
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    for names, noun, least, most in (
        (node.input, "inputs", schema.min_input, schema.max_input),
        (node.output, "outputs", schema.min_output, schema.max_output),
    ):
        if not least <= len(names) <= most:
            raise ValueError(f"a node of this kind must have from {least} to {most} {noun}; got {len(names)}")
    parts = [attribute.i for attribute in node.attribute if attribute.name == "num_outputs"]
    if parts and parts != [len(node.output)]:  # shape inference would make as many shapes
        raise ValueError(f"num_outputs must be the number of outputs, {len(node.output)}; got {parts[0]}")
    types = {
        name: helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in arrays.items()
    }
    data = {name: numpy_helper.from_array(array) for name, array in arrays.items() if array.size <= _MAX_SHAPE_DATA}
    imports = [helper.make_opsetid("", opset)]
    kinds = onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=imports)
    return sum(_bytes(kinds.get(name)) for name in node.output)


def _bytes(kind: TypeProto | None) -> int:
    if kind is None or not kind.tensor_type.HasField("shape"):
        raise ValueError("cannot be evaluated: its result has no shape beforehand")
    tensor = kind.tensor_type
    if not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        raise ValueError("cannot be evaluated: its result has no shape beforehand")
    width = helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    return int(prod(dim.dim_value for dim in tensor.shape.dim)) * width


def constant_of(node: NodeProto) -> Array:
    """The value of a Constant node as an array.

    Raises:
        NotImplementedError: If it is sparse or text.
        ValueError: As :func:`array_of`; or if the node holds no value, or several.
    """
    if len(node.attribute) != 1:
        raise ValueError(f"a constant must have one attribute, its value; got {len(node.attribute)}")
    attribute = node.attribute[0]
    if attribute.name == "value" and attribute.type == onnx.AttributeProto.TENSOR:
        return array_of(node.output[0], attribute.t)
    numbers = {
        "value_float": (attribute.f, np.float32),
        "value_floats": (attribute.floats, np.float32),
        "value_int": (attribute.i, np.int64),
        "value_ints": (attribute.ints, np.int64),
    }
    if attribute.name not in numbers:
        raise NotImplementedError(f"a constant must be held in 'value' or as numbers; got {attribute.name}")
    value, dtype = numbers[attribute.name]
    array = np.array(value if attribute.name in ("value_float", "value_int") else list(value), dtype)
    array.setflags(write=False)
    return array


def array_of(name: str, tensor: TensorProto) -> Array:
    """A constant as a read-only array.

    Raises:
        ValueError: If its data are in another file, or do not fit its shape or its number format.
    """
    if tensor.data_location == TensorProto.EXTERNAL:
        raise ValueError(f"constant {name!r} must be in the model, as onnx.load puts it there; got external data")
    dims = tuple(tensor.dims)
    if any(dim < 0 for dim in dims):
        raise ValueError(f"constant {name!r} must have a shape of sizes from 0 on; got {dims}")
    try:
        array = np.asarray(numpy_helper.to_array(tensor))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"constant {name!r} must have data that fit its shape {dims} and format; {error}") from error
    if array.shape != dims:
        raise ValueError(f"constant {name!r} must have data that fit its shape {dims}; got {array.shape}")
    array.setflags(write=False)
    return array
