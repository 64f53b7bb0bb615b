"""Parameters put back into a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedrnn.onnx.errors import naming
from fusedrnn.onnx.folding import Folder
from fusedrnn.onnx.graph import INPUTS, uses
from fusedrnn.onnx.scopes import Origin, Scope
from fusedrnn.onnx.weight_layout import WEIGHTS, Array, scatter
from fusedrnn.onnx.weights_io import Layer, Place, find_place, find_places, layer_at, refuse_others
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

# Where a tensor of floating-point numbers may hold them.
_DATA = ("raw_data", "float_data", "double_data", "int32_data")


def write(model: ModelProto, name: str, params: Array | Sequence[Array]) -> ModelProto:
    """A copy of the model in which one layer has these parameters.

    The weights are written where the model holds them, initializers or Constant nodes, in their number format: float16
    and bfloat16 are rounded. What the layer does not use, the weights of f where gates are coupled, stays as it is.
    A weight that the model computes from constants becomes a Constant node before the layer's, and what nothing else
    reads of that computation is removed.

    Args:
        model: The model, which stays as it is.
        name: The layer, by :attr:`Layer.name` or the name of one of its outputs with the same path.
        params: The flat vector of the layer's spec, of the spec's dtype; one for each part if it has two.

    Returns:
        The new model.

    Raises:
        TypeError: Naming the argument, what was given and what was expected.
        ValueError: Likewise; and naming the node and its input if the weights of that input are not constants, or
            something else reads them too.
        NotImplementedError: If the layer lies in a function, or is of an operator that is not served.
    """
    find_places(model)  # before a copy is made of what may be no model
    copy = ModelProto()
    copy.CopyFrom(model)
    places = find_places(copy)
    place = find_place(places, name)
    refuse_others([place])
    folder = Folder()
    layer = layer_at(place, folder)
    vectors = _one_each(layer, params)
    with naming(place.label):
        _store(place, layer, vectors, folder)
    return copy


def _store(place: Place, layer: Layer, vectors: Sequence[Array], folder: Folder) -> None:
    """Put the vectors into the model that the place lies in."""
    if place.scope.in_function:
        raise NotImplementedError("a layer in a function is not written; onnx.inliner puts functions into the graph")
    values = {name: value for name, value in layer.inputs.items() if name in WEIGHTS}
    holders = {name: _holder(place.scope, value) for name, value in values.items()}
    _refuse_shared(place.scope.root, {name: holder for name, holder in holders.items() if holder is not None})
    weights = {name: folder.array(place.scope, value).copy() for name, value in values.items()}
    for first, (part, vector) in enumerate(zip(layer.parts, vectors, strict=True)):
        scatter(layer.kind, part.spec, first, vector, weights)
    replaced = []
    for name, array in weights.items():
        holder = holders[name]
        if holder is not None:
            _replace(holder.tensor, array)
        else:
            replaced.append(place.scope.origin(values[name]))
            _insert(place, name, array)
    _remove_unread(place.scope.root, replaced)


def _one_each(layer: Layer, params: object) -> list[Array]:
    """A vector for each part, checked."""
    vectors: object = [params] if isinstance(params, np.ndarray) else params
    expected = " and ".join(f"{part.spec.dtype} ({part.spec.layout.size},)" for part in layer.parts)
    if isinstance(vectors, (str, bytes)) or not isinstance(vectors, Sequence):
        raise TypeError(f"params must be NumPy arrays: {expected}; got {type(params).__name__}")
    if len(vectors) != len(layer.parts):
        raise ValueError(f"params must be one array for each part: {expected}; got {len(vectors)}")
    for part, vector in zip(layer.parts, vectors, strict=True):
        if not isinstance(vector, np.ndarray) or vector.dtype != np.dtype(part.spec.dtype):
            kind = vector.dtype if isinstance(vector, np.ndarray) else type(vector).__name__
            raise TypeError(f"params must be NumPy arrays: {expected}; got {kind}")
        if vector.shape != (part.spec.layout.size,):
            raise ValueError(f"params must be NumPy arrays: {expected}; got shape {vector.shape}")
    return list(vectors)


# ---- weights that the model holds as they are


@dataclass(frozen=True)
class _Holder:
    """The tensor of a weight, and the values by which it gets to the node: its own, and what Identity makes of it."""

    tensor: TensorProto
    values: tuple[Origin, ...]


def _holder(scope: Scope, name: str) -> _Holder | None:
    """Where the model holds a weight; None if it computes it."""
    values = []
    while True:
        origin = scope.origin(name)
        if origin is None:
            return None
        values.append(origin)
        if origin.tensor is not None:
            return _Holder(origin.tensor, tuple(values))
        if origin.node is None or origin.node.op_type not in ("Identity", "Constant"):
            return None
        if origin.node.op_type == "Constant":
            tensors = [entry.t for entry in origin.node.attribute if entry.name == "value"]
            return _Holder(tensors[0], tuple(values)) if tensors else None
        scope, name = origin.scope, origin.node.input[0]


def _refuse_shared(root: Scope, holders: Mapping[str, _Holder]) -> None:
    """Refuse weights that something else reads, under their own name or as Identity of it."""
    names = {origin.name for holder in holders.values() for origin in holder.values}
    origins = [scope.origin(name) for scope, name in _reads(root) if name in names]
    count = Counter(origin.key for origin in origins if origin is not None)
    for name, holder in holders.items():
        for origin in holder.values:
            if count[origin.key] > 1:
                value = origin.name
                raise ValueError(f"{name} must be read by this node alone to be written; {value!r} is read elsewhere")


def _reads(root: Scope) -> Iterator[tuple[Scope, str]]:
    """Every name that an input of a node or an output of a graph reads, with the scope that it is read in."""
    scopes = [root]
    while scopes:
        scope = scopes.pop()
        if isinstance(scope.body, GraphProto):
            yield from ((scope, output.name) for output in scope.body.output)
        for node in scope.nodes:
            yield from ((scope, name) for name in node.input)
            scopes += scope.bodies(node)


def _replace(tensor: TensorProto, array: Array) -> None:
    """Put the array in the place of the tensor's data; all else that the tensor says stays."""
    new = numpy_helper.from_array(array)
    if new.data_type != tensor.data_type:
        kind = TensorProto.DataType.Name(tensor.data_type)
        raise NotImplementedError(f"{tensor.name!r} is {kind}, which this onnx package cannot make of an array")
    for field in _DATA:
        tensor.ClearField(field)
    tensor.raw_data = new.raw_data


# ---- weights that the model computes


def _insert(place: Place, name: str, array: Array) -> None:
    """Let the node read a weight from a Constant node before it."""
    graph, node = place.scope.body, place.node
    known = {value for scope, value in _reads(place.scope.root)}
    known.update(output for scope, other in place.scope.root.walk() for output in other.output)
    value = f"{place.name}_{name}"
    while value in known:
        value += "_"
    constant = helper.make_node("Constant", [], [value], value=numpy_helper.from_array(array, value))
    graph.node.insert(_index(graph.node, node) or 0, constant)
    node.input[INPUTS.index(name)] = value


def _remove_unread(root: Scope, replaced: Sequence[Origin | None]) -> None:
    """Remove the nodes and initializers that only values which are no longer read were computed from."""
    count = uses(root.body)
    pending = [origin for origin in replaced if origin is not None]
    while pending:
        origin = pending.pop()
        graph, node = origin.scope.body, origin.node
        if origin.scope.in_function or count[origin.name]:
            continue
        if node is None:
            inputs = {entry.name for entry in graph.input}
            index = _index(graph.initializer, origin.tensor)
            if index is not None and origin.name not in inputs:
                del graph.initializer[index]
            continue
        index = _index(graph.node, node)
        if index is None or any(count[output] for output in node.output if output):
            continue
        del graph.node[index]
        count.subtract(node.input)
        pending += [source for source in map(origin.scope.origin, filter(None, node.input)) if source is not None]


def _index(elements: Sequence[Any], element: object) -> int | None:
    """The place of this element, not of one that is equal."""
    return next((index for index, other in enumerate(elements) if other is element), None)
