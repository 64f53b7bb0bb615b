"""Constant folding: computes values that depend on constants alone.

onnx's ReferenceEvaluator evaluates the nodes one by one. Models are not trusted, so only operators whose time and
memory are linear in their inputs and outputs are evaluated. The sizes of outputs are inferred beforehand, and a budget
proportional to the model's constants bounds the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import prod

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fusedrnn.arrays import Array
from fusedrnn.onnx.graph import DOMAINS, errors_name_node
from fusedrnn.onnx.scopes import Origin, Scope

FOLDED = frozenset({
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "ConstantOfShape", "DequantizeLinear", "Div",
    "Equal", "Exp", "Expand", "Flatten", "Floor", "Gather", "Greater", "Identity", "Less", "Log", "Max", "Mean", "Min",
    "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Reshape", "Round", "Shape", "Sign",
    "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
    "Xor",
})  # fmt: skip
"""The evaluated operators: they move or convert data, act on elements, or reduce axes."""

# The budget for results, in bytes: a fixed part, and a multiple of the constants' size.
_FREE_BYTES = 1 << 28
_BYTES_PER_CONSTANT_BYTE = 16
# The first opset in which the evaluator has the operator; that version accepts what earlier versions accept.
_FIRST_EVALUATED_OPSET = {"DequantizeLinear": 19}
# The most elements of an input that is passed to shape inference: axes, shapes and the like are smaller.
_MAX_SHAPE_ELEMENTS = 1024


class NotConstantError(ValueError):
    """A value depends on an input, or on an operator that is not evaluated."""


class Folder:
    """Computes values of one model, each of them once."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], Array] = {}
        self._budget = _FREE_BYTES

    def array(self, scope: Scope, name: str) -> Array:
        """The value that a name has in a scope, as a read-only array.

        Raises:
            NotConstantError: If it depends on an input, or on an operator that is not evaluated.
            NotImplementedError: If a constant is sparse or text; the message names it.
            ValueError: If a node cannot be evaluated, or a constant's data do not fit its shape; the message names it.
        """
        target = _origin(scope, name)
        stack, expanded = [target], set()
        while stack:
            origin = stack[-1]
            if origin.key in self._values:
                stack.pop()
            elif missing := self._missing(origin):
                if origin.key in expanded:
                    raise ValueError(f"value {origin.name!r} depends on itself")
                expanded.add(origin.key)
                stack += missing
            else:
                self._compute(origin)
        return self._values[target.key]

    def _missing(self, origin: Origin) -> list[Origin]:
        """The values on which this value depends and which are not computed yet."""
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
            self._add_constant(origin, _array_of(origin.name, origin.tensor))
            return
        with errors_name_node(scope.label(node)):
            bound = scope.bound(node)
            if node.op_type == "Constant":
                self._add_constant(origin, _constant_of(bound))
                return
            inputs = [self._values[_origin(scope, name).key] if name else None for name in bound.input]
            results = self._evaluate(bound, scope.opset, inputs)
        for name, result in zip(node.output, results, strict=True):
            if name:
                self._values[id(scope), name] = result

    def _add_constant(self, origin: Origin, array: Array) -> None:
        self._budget += _BYTES_PER_CONSTANT_BYTE * array.nbytes
        self._values[origin.key] = array

    def _evaluate(self, node: NodeProto, opset: int, inputs: Sequence[Array | None]) -> list[Array]:
        """All outputs of the node, including those without a name."""
        # The evaluator and shape inference identify values by name, so unnamed and repeated values need new names.
        node = deepcopy(node)
        node.domain = ""
        node.input[:] = ["" if value is None else f"input{index}" for index, value in enumerate(inputs)]
        node.output[:] = [f"output{index}" for index in range(len(node.output))]
        arrays = {name: value for name, value in zip(node.input, inputs, strict=True) if value is not None}
        self._budget -= _bytes_of_outputs(node, opset, arrays)
        if self._budget < 0:
            limit = f"{_FREE_BYTES >> 20} MiB and {_BYTES_PER_CONSTANT_BYTE} times their size"
            raise ValueError(f"results computed from constants must take at most {limit}; got more")
        # The node is put into a function, since the evaluator runs a single node only in the newest opset.
        imports = [helper.make_opsetid("", max(opset, _FIRST_EVALUATED_OPSET.get(node.op_type, opset)))]
        function = helper.make_function("", "node", list(arrays), list(node.output), [node], imports)
        try:
            with np.errstate(all="ignore"):
                results = ReferenceEvaluator(function).run(None, arrays, attributes={})
        except Exception as error:  # the evaluator raises any kind of error for invalid inputs
            raise ValueError(f"cannot be evaluated: {type(error).__name__}: {error}") from error
        return [_read_only(np.asarray(result)) for result in results]


def _read_only(array: Array) -> Array:
    array.setflags(write=False)
    return array


def _origin(scope: Scope, name: str) -> Origin:
    origin = scope.origin(name)
    if origin is None:
        raise NotConstantError(f"it depends on {name!r}, which the caller of the function omits")
    return origin


def _bytes_of_outputs(node: NodeProto, opset: int, arrays: Mapping[str, Array]) -> int:
    """The size of the node's outputs; a ValueError if shape inference cannot tell, or the schema does not fit."""
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    for names, noun, minimum, maximum in (
        (node.input, "inputs", schema.min_input, schema.max_input),
        (node.output, "outputs", schema.min_output, schema.max_output),
    ):
        if not minimum <= len(names) <= maximum:
            raise ValueError(f"a node of this kind must have from {minimum} to {maximum} {noun}; got {len(names)}")
    counts = [attribute.i for attribute in node.attribute if attribute.name == "num_outputs"]
    if counts and counts != [len(node.output)]:  # shape inference would make as many shapes as this number says
        raise ValueError(f"num_outputs must be the number of outputs, {len(node.output)}; got {counts[0]}")
    types = {
        name: helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in arrays.items()
    }
    data = {name: numpy_helper.from_array(array) for name, array in arrays.items() if array.size <= _MAX_SHAPE_ELEMENTS}
    imports = [helper.make_opsetid("", opset)]
    inferred = onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=imports)
    return sum(_bytes(inferred.get(name)) for name in node.output)


def _bytes(inferred: TypeProto | None) -> int:
    tensor = TypeProto.Tensor() if inferred is None else inferred.tensor_type
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        raise ValueError("cannot be evaluated: the shape of its result cannot be inferred")
    width = helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    return int(prod(dim.dim_value for dim in tensor.shape.dim)) * width


def _constant_of(node: NodeProto) -> Array:
    """The value of a Constant node."""
    if len(node.attribute) != 1:
        raise ValueError(f"a constant must have one attribute, its value; got {len(node.attribute)}")
    attribute = node.attribute[0]
    if attribute.name == "value" and attribute.type == onnx.AttributeProto.TENSOR:
        return _array_of(node.output[0], attribute.t)
    fields = {
        "value_float": ("f", np.float32),
        "value_floats": ("floats", np.float32),
        "value_int": ("i", np.int64),
        "value_ints": ("ints", np.int64),
    }
    if attribute.name not in fields:
        raise NotImplementedError(f"a constant must be in 'value' or in numbers; got {attribute.name}")
    field, dtype = fields[attribute.name]
    return _read_only(np.array(getattr(attribute, field), dtype))


def _array_of(name: str, tensor: TensorProto) -> Array:
    """A constant as a read-only array."""
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
    return _read_only(array)
