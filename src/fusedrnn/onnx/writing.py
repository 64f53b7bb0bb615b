"""Writes parameters into a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from fusedrnn.arrays import Array, is_plain
from fusedrnn.onnx.folding import Folder
from fusedrnn.onnx.graph import INPUTS, errors_name_node, uses
from fusedrnn.onnx.quantized import is_quantized
from fusedrnn.onnx.scopes import Origin, Scope
from fusedrnn.onnx.weight_layout import WEIGHTS, Part, to_onnx
from fusedrnn.onnx.weights_io import Layer, LayerNode, read_layer, select_nodes


def write(model: ModelProto, name: str, params: Array | Sequence[Array]) -> ModelProto:
    """A copy of the model with new parameters in one layer.

    The weights stay where the model holds them, in initializers or Constant nodes. They keep their number format;
    parameters are rounded to float16 or bfloat16. Weights that the layer does not use, such as those of f with coupled
    gates, do not change. A weight that the model computes from constants becomes a Constant node before the layer's
    node; the nodes that computed it are removed if nothing else reads them.

    Args:
        model: The model, which does not change.
        name: The layer, by :attr:`Layer.name` or the name of one of its outputs with the same path.
        params: The flat vector of the layer's spec, in the spec's dtype; if the layer has two parts, a vector for each.

    Returns:
        The new model.

    Raises:
        TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
        ValueError: If an argument has the wrong shape or value. Also if the weights of an input are not constants, if
            something else reads them too, or if a finite parameter is too large for their number format; in these
            cases the message names the node and the input.
        NotImplementedError: If the layer is in a function or quantized, or its operator is not supported.
    """
    select_nodes(model, [name])  # checks both arguments before the model is copied
    copy = deepcopy(model)
    (layer_node,) = select_nodes(copy, [name])
    if is_quantized(layer_node.node):
        raise NotImplementedError(
            f"{layer_node.label}: a layer with quantized weights cannot be written; write it before quantization"
        )
    folder = Folder()
    layer = read_layer(layer_node, folder)
    parts = _parts(layer, params)
    with errors_name_node(layer_node.label):
        _store(layer_node, layer, parts, folder)
    return copy


def _parts(layer: Layer, params: object) -> list[Part]:
    """The layer's parts with these parameters, checked."""
    vectors: object = [params] if isinstance(params, np.ndarray) else params
    expected = " and ".join(f"{part.spec.dtype} ({part.spec.layout.size},)" for part in layer.parts)
    if isinstance(vectors, (str, bytes)) or not isinstance(vectors, Sequence):
        raise TypeError(f"params must be NumPy arrays: {expected}; got {type(params).__name__}")
    if len(vectors) != len(layer.parts):
        raise ValueError(f"params must be one array for each part: {expected}; got {len(vectors)}")
    for part, vector in zip(layer.parts, vectors, strict=True):
        if not is_plain(vector) or vector.dtype != np.dtype(part.spec.dtype):
            kind = vector.dtype if is_plain(vector) else type(vector).__name__
            raise TypeError(f"params must be NumPy arrays: {expected}; got {kind}")
        if vector.shape != (part.spec.layout.size,):
            raise ValueError(f"params must be NumPy arrays: {expected}; got shape {vector.shape}")
    return [Part(part.spec, vector) for part, vector in zip(layer.parts, vectors, strict=True)]


def _store(layer_node: LayerNode, layer: Layer, parts: Sequence[Part], folder: Folder) -> None:
    """Write the parts into the model that holds the node."""
    scope = layer_node.scope
    if scope.in_function:
        raise NotImplementedError(
            "a layer in a function cannot be written; inline the function with onnx.inliner first"
        )
    values = {name: value for name, value in layer.inputs.items() if name in WEIGHTS}
    sources = {name: _sources(scope, value) for name, value in values.items()}
    tensors = {name: _stored_tensor(origins[-1]) for name, origins in sources.items()}
    _reject_shared(scope.root, {name: origins for name, origins in sources.items() if tensors[name] is not None})
    weights = {name: folder.array(scope, value).copy() for name, value in values.items()}
    to_onnx(layer.kind, parts, weights)
    for name, array in weights.items():
        tensor = tensors[name]
        if tensor is None:
            _insert_constant(layer_node, name, array)
        else:
            _replace_data(tensor, array)
    remove_unread(scope.root, [sources[name][0] for name, tensor in tensors.items() if tensor is None])


# ---- weights that the model stores


def _sources(scope: Scope, name: str) -> list[Origin]:
    """The origins of a weight: first those of the Identity nodes that it passes, then that of its value."""
    origins: list[Origin] = []
    origin = scope.origin(name)
    while origin is not None:
        origins.append(origin)
        node = origin.node
        origin = origin.scope.origin(node.input[0]) if node is not None and node.op_type == "Identity" else None
    return origins


def _stored_tensor(origin: Origin) -> TensorProto | None:
    """The tensor in an initializer or a Constant node; None if the model computes the weight."""
    if origin.node is None or origin.node.op_type != "Constant":
        return origin.tensor
    return next((entry.t for entry in origin.node.attribute if entry.name == "value"), None)


def _reject_shared(root: Scope, weights: Mapping[str, Sequence[Origin]]) -> None:
    """Reject weights that something else reads, directly or through Identity."""
    names = {origin.name for origins in weights.values() for origin in origins}
    origins = [scope.origin(name) for scope, name in _reads(root) if name in names]
    count = Counter(origin.key for origin in origins if origin is not None)
    for name, sources in weights.items():
        for origin in sources:
            if count[origin.key] > 1:
                value = origin.name
                raise ValueError(f"{name} must be read by this node alone to be written; {value!r} is read elsewhere")


def _reads(root: Scope) -> Iterator[tuple[Scope, str]]:
    """Every name that an input of a node or an output of a graph reads, with its scope."""
    for scope in _scopes(root):
        if isinstance(scope.body, GraphProto):
            yield from ((scope, output.name) for output in scope.body.output)
        for node in scope.nodes:
            yield from ((scope, name) for name in node.input)


def _scopes(root: Scope) -> Iterator[Scope]:
    """The scope and those of all bodies in it."""
    scopes = [root]
    while scopes:
        scope = scopes.pop()
        yield scope
        scopes += (body for node in scope.nodes for body in scope.bodies(node))


def _replace_data(tensor: TensorProto, array: Array) -> None:
    """Replace the tensor's data with the array; its other fields do not change."""
    new = numpy_helper.from_array(array)
    if new.data_type != tensor.data_type:
        kind = TensorProto.DataType.Name(tensor.data_type)
        raise NotImplementedError(f"{tensor.name!r} is {kind}, which this onnx package cannot make of an array")
    for field in ("raw_data", "float_data", "double_data", "int32_data"):  # the fields for floating-point data
        tensor.ClearField(field)
    tensor.raw_data = new.raw_data


# ---- weights that the model computes


def _insert_constant(layer_node: LayerNode, name: str, array: Array) -> None:
    """Insert a Constant node before the layer's node, which reads the weight from it."""
    scope, node = layer_node.scope, layer_node.node
    used_names = _used_names(scope.root)
    value = f"{layer_node.name}_{name}"
    while value in used_names:
        value += "_"
    constant = helper.make_node("Constant", [], [value], value=numpy_helper.from_array(array, value))
    scope.body.node.insert(_index(scope.body.node, node) or 0, constant)
    node.input[INPUTS.index(name)] = value


def _used_names(root: Scope) -> set[str]:
    """The names of all values, even of those that nothing reads."""
    names: set[str] = set()
    for scope in _scopes(root):
        body = scope.body
        if isinstance(body, GraphProto):
            names.update(entry.name for entry in (*body.input, *body.initializer, *body.output))
            names.update(tensor.values.name for tensor in body.sparse_initializer)
        for node in scope.nodes:
            names.update(node.input, node.output)
    return names


def remove_unread(root: Scope, replaced: Sequence[Origin]) -> None:
    """Remove the nodes and initializers that only the replaced values depended on."""
    count = uses(root.body)
    pending = [*replaced]
    while pending:
        origin = pending.pop()
        body, node = origin.scope.body, origin.node
        names = [origin.name] if node is None else node.output
        if origin.scope.in_function or any(count[name] for name in names if name):
            continue
        elements, element = (body.initializer, origin.tensor) if node is None else (body.node, node)
        index = _index(elements, element)
        if index is None or (node is None and origin.name in {entry.name for entry in body.input}):
            continue
        del elements[index]
        if node is not None:
            count.subtract(node.input)
            pending += filter(None, map(origin.scope.origin, filter(None, node.input)))


def _index(elements: Sequence[Any], element: object) -> int | None:
    """The index of this object itself, not of an equal one."""
    return next((index for index, other in enumerate(elements) if other is element), None)
