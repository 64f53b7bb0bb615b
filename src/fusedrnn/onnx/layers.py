"""The recurrent layers of a model: read as specs and flat parameter vectors, and written back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from fusedrnn.onnx import graph
from fusedrnn.onnx.attributes import parse
from fusedrnn.onnx.naming import first_output, naming
from fusedrnn.onnx.weights import WEIGHTS, Array, gather, scatter, specs
from fusedrnn.spec import RNNSpec

# Where a tensor of floating-point numbers may hold them.
_DATA = ("raw_data", "float_data", "double_data", "int32_data")


@dataclass(frozen=True)
class Part:
    """A spec and its parameters: a whole layer, or one direction of a layer whose directions are unlike.

    Attributes:
        spec: What to run; one layer of one direction or two.
        params: The flat vector of ``spec.layout``, a copy.
    """

    spec: RNNSpec
    params: Array


@dataclass(frozen=True)
class Layer:
    """A node LSTM, GRU or RNN.

    Attributes:
        name: The node's name; or its first output, if it has none or shares it with another.
        kind: ``"LSTM"``, ``"GRU"`` or ``"RNN"``.
        parts: What it runs: one part; or one for each direction, the second with ``reverse=True``, if their
            activations differ.
        states: The initial states h0 and, of an LSTM, c0, each (D, N, H) in the parts' format; None for one that is
            left out, which means zeros, or that the graph computes, which ``inputs`` tells.
        batch_first: Whether X is (N, T, I) (layout 1), not (T, N, I).
        inputs: The values that the node reads, by the names that ONNX's schema gives its inputs.
        outputs: The names of its outputs Y, Y_h and Y_c, empty for one that it does not give.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    states: tuple[Array | None, ...]
    batch_first: bool
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]

    @property
    def spec(self) -> RNNSpec:
        """The spec of the one part.

        Raises:
            ValueError: If there are two.
        """
        return self._only().spec

    @property
    def params(self) -> Array:
        """The parameters of the one part.

        Raises:
            ValueError: If there are two.
        """
        return self._only().params

    def _only(self) -> Part:
        if len(self.parts) > 1:
            raise ValueError(f"layer {self.name!r} has two parts, since the activations of its directions differ")
        return self.parts[0]


def read(model: ModelProto, names: Iterable[str] | None = None) -> dict[str, Layer]:
    """The recurrent layers of a model, by name, in the order of the graph.

    Args:
        model: The model, with its weights inside. It stays as it is, and nothing that is returned shares its memory.
        names: Which to read, each by its node's name or one of its outputs; None for all.

    Returns:
        Layers by :attr:`Layer.name`. Parameters of float16 and bfloat16 are given in float32.

    Raises:
        TypeError: If ``model`` is no model, or a weight of a format that a node cannot have.
        ValueError: Naming the node and what it cannot be read for: weights that are not constants, shapes,
            attributes; or a name of which there is no recurrent node.
        NotImplementedError: If all are asked for and one lies in a subgraph or a function.

    Example:
    >>> from onnx.parser import parse_model
    >>> model = parse_model('''<ir_version: 8, opset_import: ["": 14]> g (float[T, N, 1] X) => (float[T, 1, N, 1] Y)
    ...     <float[1, 1, 1] W = {2}, float[1, 1, 1] R = {3}> { Y = RNN <hidden_size = 1> (X, W, R) }''')
    >>> layer = read(model)["Y"]
    >>> layer.spec.mode, layer.params
    ('rnn_tanh', array([2., 3.], dtype=float32))
    """
    _check_model(model)
    if names is None:
        hidden = graph.hidden_recurrent(model)
        if hidden is not None:
            raise NotImplementedError(f"{hidden} cannot be read; name those that lie in the graph itself")
        nodes = [node for node in model.graph.node if graph.is_recurrent(node)]
    else:
        nodes = [_find(model, name) for name in ([names] if isinstance(names, str) else names)]
    held = graph.tensors(model.graph)
    layers = [_layer(model, node, held) for node in nodes]
    return {layer.name: layer for layer in layers}


def write(model: ModelProto, name: str, params: Array | Sequence[Array]) -> ModelProto:
    """A copy of the model in which one layer has these parameters.

    The weights are written where the model holds them, initializers or Constant nodes, in their number format: float16
    and bfloat16 are rounded. What the layer does not use, the weights of f where gates are coupled, stays as it is.

    Args:
        model: The model, which stays as it is.
        name: The layer, by its node's name or one of its outputs.
        params: The flat vector of the layer's spec, of the spec's dtype; one for each part if it has two.

    Returns:
        The new model.

    Raises:
        TypeError: Naming the argument, what was given and what was expected.
        ValueError: Likewise; and naming the node and its input if the weights of that input are not constants, or
            somebody else reads them too.
    """
    _check_model(model)
    made = ModelProto()
    made.CopyFrom(model)
    node = _find(made, name)
    held = graph.tensors(made.graph)
    layer = _layer(made, node, held)
    given = _one_each(layer, params)
    with naming(node):
        _refuse_shared(made, layer.inputs)
        weights = {name: _array(layer.inputs[name], held).copy() for name in WEIGHTS if name in layer.inputs}
        for first, (part, vector) in enumerate(zip(layer.parts, given, strict=True)):
            scatter(layer.kind, part.spec, first, vector, weights)
        for name, array in weights.items():
            _replace(held[layer.inputs[name]], array)
    return made


def _check_model(model: object) -> None:
    if not isinstance(model, ModelProto):
        raise TypeError(f"model must be an onnx.ModelProto; got {type(model).__name__}")


def _find(model: ModelProto, name: object) -> NodeProto:
    """The recurrent node of that name, or with an output of that name."""
    if not isinstance(name, str):
        raise TypeError(f"name must be that of a node or of an output; got {type(name).__name__}")
    nodes = [node for node in model.graph.node if graph.is_recurrent(node)]
    found = [node for node in nodes if name and (node.name == name or name in node.output)]
    if len(found) != 1:
        known = ", ".join(repr(_name(model, node)) for node in nodes) or "which there are none"
        raise ValueError(f"name must be that of one LSTM, GRU or RNN, of {known}; got {name!r}")
    node: NodeProto = found[0]
    return node


def _name(model: ModelProto, node: NodeProto) -> str:
    """What a layer is called: what finds it and no other."""
    name: str = node.name
    known = [one for other in model.graph.node for one in (other.name, *other.output)]
    return name if name and known.count(name) == 1 else first_output(node)


def _layer(model: ModelProto, node: NodeProto, held: Mapping[str, TensorProto]) -> Layer:
    with naming(node):
        settings = parse(node, graph.opset_of(model), model.ir_version)
        inputs = graph.inputs_of(node)
        weights = {}
        for name in WEIGHTS:
            if name in inputs:
                if inputs[name] not in held:
                    raise ValueError(f"{name} must be an initializer or a Constant's value; got {inputs[name]!r}")
                weights[name] = _array(inputs[name], held)
        found = specs(settings, weights)
        parts = tuple(Part(spec, gather(settings.kind, spec, first, weights)) for first, spec in enumerate(found))
        states = tuple(
            _state(inputs.get(f"initial_{name}"), held, settings.batch_first, found[0]) for name in found[0].state_names
        )
    return Layer(_name(model, node), node.op_type, parts, states, settings.batch_first, inputs, tuple(node.output))


def _array(name: str, held: Mapping[str, TensorProto]) -> Array:
    return graph.array_of(name, held[name])


def _state(name: str | None, held: Mapping[str, TensorProto], batch_first: bool, spec: RNNSpec) -> Array | None:
    """An initial state (D, N, H), if it is a constant."""
    if name is None or name not in held:
        return None
    state = _array(name, held)
    return np.array(state.swapaxes(0, 1) if batch_first else state, spec.dtype, order="C")


def _one_each(layer: Layer, params: object) -> list[Array]:
    """A vector for each part, checked."""
    given: object = [params] if isinstance(params, np.ndarray) else params
    wanted = " and ".join(f"{part.spec.dtype} ({part.spec.layout.size},)" for part in layer.parts)
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise TypeError(f"params must be NumPy arrays: {wanted}; got {type(params).__name__}")
    if len(given) != len(layer.parts):
        raise ValueError(f"params must be one array for each part: {wanted}; got {len(given)}")
    for part, vector in zip(layer.parts, given, strict=True):
        if not isinstance(vector, np.ndarray) or vector.dtype != np.dtype(part.spec.dtype):
            kind = vector.dtype if isinstance(vector, np.ndarray) else type(vector).__name__
            raise TypeError(f"params must be NumPy arrays: {wanted}; got {kind}")
        if vector.shape != (part.spec.layout.size,):
            raise ValueError(f"params must be NumPy arrays: {wanted}; got shape {vector.shape}")
    return list(given)


def _refuse_shared(model: ModelProto, inputs: Mapping[str, str]) -> None:
    """Refuse weights that somebody else reads, under their own name or as Identity of it."""
    count = graph.uses(model.graph)
    made_from = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Identity" and node.domain in graph.DOMAINS
    }
    for name in WEIGHTS:
        value = inputs.get(name)
        while value is not None:
            if count[value] > 1:
                raise ValueError(f"{name} must be read by this node alone to be written; {value!r} is read elsewhere")
            value = made_from.get(value)


def _replace(tensor: TensorProto, array: Array) -> None:
    """Put the array in the place of the tensor's data; all else that the tensor says stays."""
    new = numpy_helper.from_array(array)
    if new.data_type != tensor.data_type:
        kind = TensorProto.DataType.Name(tensor.data_type)
        raise NotImplementedError(f"{tensor.name!r} is {kind}, which this onnx package cannot make of an array")
    for field in _DATA:
        tensor.ClearField(field)
    tensor.raw_data = new.raw_data
