"""Replaces recurrent nodes of a model by custom operators that run on the fused operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, inliner

from fusedrnn.cell.activations import ACTIVATIONS
from fusedrnn.onnx.folding import Folder
from fusedrnn.onnx.graph import Functions, has_recurrent_name, inputs_of, is_recurrent, operator_name, subgraphs
from fusedrnn.onnx.quantized import is_quantized
from fusedrnn.onnx.scopes import Origin, Scope
from fusedrnn.onnx.weight_layout import WEIGHTS
from fusedrnn.onnx.weights_io import Layer, LayerNode, read_layer
from fusedrnn.onnx.writing import remove_unread
from fusedrnn.op.rnn_op import RNNOp

_INPUTS = ("X", "sequence_lens", "initial_h", "initial_c")
_OUTPUTS = ("Y", "Y_h", "Y_c")
# From this version of the format on, a caller may replace an initializer that is also an input.
_OVERRIDABLE_FROM = 4


@dataclass(frozen=True)
class RecurrentNode:
    """A recurrent node of a model.

    Attributes:
        name: As in :attr:`fusedrnn.onnx.Layer.name`; in the body of another node it is a path.
        operator: The operator, with its domain unless it is ONNX's own.
        in_body: Whether the node is in the body of another node.
        layer: The layer; None if ONNX Runtime must run the node.
        reason: Why ONNX Runtime must run it; None if there is a layer.
        inputs: Which of X, sequence_lens, initial_h and initial_c it has.
        outputs: Y, Y_h and for an LSTM Y_c. The kernel computes all of them, even if the node names only some.
    """

    name: str
    operator: str
    in_body: bool
    layer: Layer | None
    reason: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class RewritableModel:
    """A model whose recurrent nodes can be replaced by operators of another domain.

    Attributes:
        model: A copy of the model, whose functions with recurrent nodes are inlined.
        nodes: Its recurrent nodes, in the order of the graph.
    """

    def __init__(self, model: ModelProto) -> None:
        functions = Functions(model)
        has_recurrent_function = any(functions.is_recurrent(function) for function in model.functions)
        self.model: ModelProto = inliner.inline_local_functions(model) if has_recurrent_function else deepcopy(model)
        self.nodes = self._read()

    def _read(self) -> list[RecurrentNode]:
        graph = self.model.graph
        initializers = list(graph.initializer)
        if self.model.ir_version >= _OVERRIDABLE_FROM:
            inputs = {entry.name for entry in graph.input}
            del graph.initializer[:]
            graph.initializer.extend(tensor for tensor in initializers if tensor.name not in inputs)
        folder = Folder()
        nodes = [_recurrent_node(layer_node, folder) for layer_node in _layer_nodes(self.model)]
        del graph.initializer[:]
        graph.initializer.extend(initializers)
        return nodes

    def replace(
        self, numbers: Sequence[int], domain: str, operators: Sequence[str], names: Sequence[str] = ()
    ) -> ModelProto:
        """A copy of the model in which the nodes with these numbers are operators of a domain.

        Weights that no other node reads are removed. ``names`` are new names for all recurrent nodes.
        """
        model = _with_shapes(self.model)
        layer_nodes = list(_layer_nodes(model))
        origins: list[Origin] = []
        for number, operator in zip(numbers, operators, strict=True):
            scope, node = layer_nodes[number].scope, layer_nodes[number].node
            weights = [value for name, value in inputs_of(node).items() if name in WEIGHTS]
            origins += [origin for value in weights if (origin := scope.origin(value)) is not None]
            _replace_node(self.nodes[number], scope.body, node, domain, operator)
        remove_unread(Scope(model, model.graph), origins)
        if numbers:
            model.opset_import.append(helper.make_opsetid(domain, 1))
        for layer_node, name in zip(layer_nodes, names, strict=False):
            layer_node.node.name = name
        return model


def _layer_nodes(model: ModelProto) -> Iterator[LayerNode]:
    for scope, node in Scope(model, model.graph).walk():
        if has_recurrent_name(node) and scope.functions.called_by(node) is None:
            yield LayerNode(scope, node, scope.path_of(node), scope.label(node))


def _recurrent_node(layer_node: LayerNode, folder: Folder) -> RecurrentNode:
    node = layer_node.node
    layer, reason = None, None
    try:
        layer = _replaceable_layer(layer_node, folder)
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).removeprefix(f"{layer_node.label}: ")
    num_states = 1 if layer is None else len(layer.parts[0].spec.state_names)
    inputs = [name for name in inputs_of(node) if name in _INPUTS]
    in_body = layer_node.scope.outer is not None
    outputs = _OUTPUTS[: 1 + num_states]
    return RecurrentNode(layer_node.name, operator_name(node), in_body, layer, reason, tuple(inputs), outputs)


def _replaceable_layer(layer_node: LayerNode, folder: Folder) -> Layer:
    """The layer of a node. Errors are as in :func:`fusedrnn.onnx.read`, or say why ONNX Runtime must run it."""
    node = layer_node.node
    if not is_recurrent(node):
        raise NotImplementedError(f"{operator_name(node)} is an operator that fusedrnn does not have")
    layer = read_layer(layer_node, folder)
    if layer.batch_first:
        raise NotImplementedError("layout is 1, and ONNX Runtime has layout 0 alone")
    if not is_quantized(node):
        dtype = folder.array(layer_node.scope, layer.inputs["W"]).dtype
        if dtype != "float32":
            raise NotImplementedError(f"W is {dtype}, and ONNX Runtime has float32 alone")
    _check_activations(node, layer)
    for part in layer.parts:
        RNNOp(part.spec, "cpu")  # raises an error if the engine lacks something
    return layer


def _check_activations(node: NodeProto, layer: Layer) -> None:
    """Reject activations without values for their parameters, since ONNX Runtime's defaults differ from ONNX's."""
    num_values = Counter({entry.name: len(entry.floats) for entry in node.attribute})
    for parameter in ("alpha", "beta"):
        takers = [
            activation.name
            for part in layer.parts
            for activation in (part.spec.activations or ()) * part.spec.num_directions
            if getattr(ACTIVATIONS[activation.name], parameter) is not None
        ]
        if len(takers) > num_values[f"activation_{parameter}"]:
            raise NotImplementedError(
                f"{takers[-1]} has no activation_{parameter}, whose default is another one in ONNX Runtime"
            )


def _replace_node(recurrent: RecurrentNode, graph: GraphProto, node: NodeProto, domain: str, operator: str) -> None:
    values, outputs = inputs_of(node), dict(zip(_OUTPUTS, node.output, strict=False))
    outputs = {name: outputs.get(name) or f"{domain}/{operator}/{name}" for name in recurrent.outputs}
    inputs = [values[name] for name in recurrent.inputs]
    assert recurrent.layer is not None
    directions = sum(part.spec.num_directions for part in recurrent.layer.parts)
    for name in recurrent.outputs:
        sizes = (None, directions, None, recurrent.layer.parts[0].spec.hidden_size)[name != "Y" :]
        _add_shape(graph, helper.make_tensor_value_info(outputs[name], TensorProto.FLOAT, sizes))
    name = node.name
    node.Clear()
    node.name, node.domain, node.op_type = name, domain, operator
    node.input.extend(inputs)
    node.output.extend(outputs[name] for name in recurrent.outputs)


def _with_shapes(model: ModelProto) -> ModelProto:
    """A copy of the model with the inferred shapes of the outputs of recurrent nodes.

    ONNX Runtime does not infer shapes of operators of other domains, but a Scan needs the shapes of its body's outputs.
    """
    copy = deepcopy(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except (ValueError, onnx.shape_inference.InferenceError):  # too large, or shapes that contradict one another
        return copy
    for graph, source in zip(_graphs(copy.graph), _graphs(inferred.graph), strict=True):
        names = {name for node in graph.node if is_recurrent(node) for name in node.output if name}
        for entry in (*source.value_info, *source.output):
            if entry.name in names:
                _add_shape(graph, entry)
    return copy


def _add_shape(graph: GraphProto, entry: ValueInfoProto) -> None:
    """Add the type and shape of a value to a graph that does not have them yet."""
    known = {each.name: each for each in (*graph.value_info, *graph.output)}.get(entry.name)
    if known is None:
        graph.value_info.append(entry)
    elif not known.type.tensor_type.HasField("shape"):
        known.type.CopyFrom(entry.type)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for _, body in subgraphs(node):
            yield from _graphs(body)
