"""Reads the recurrent layers of a model as specs and flat parameter vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto

from fusedrnn.arrays import Array
from fusedrnn.onnx.attributes import parse
from fusedrnn.onnx.folding import Folder, NotConstantError
from fusedrnn.onnx.graph import errors_name_node, has_recurrent_name, inputs_of, is_recurrent
from fusedrnn.onnx.scopes import Scope
from fusedrnn.onnx.weight_layout import WEIGHTS, Part, from_onnx, state_of
from fusedrnn.spec import RNNSpec


@dataclass(frozen=True)
class Layer:
    """An LSTM, GRU or RNN node, or a DynamicQuantizeLSTM, which is an LSTM whose spec has ``compute="int8"``.

    Attributes:
        name: The node's name, or its first output if the name is missing or not unique. In the body of another node it
            is a path, ``If_0/then_branch/LSTM_3``; in a function it is ``call/function/LSTM_3``.
        kind: ``"LSTM"``, ``"GRU"`` or ``"RNN"``.
        parts: The specs and parameters that run the layer. It is one part; if the activations of the directions differ,
            it is one part for each direction, the second with ``reverse=True``.
        states: The initial states h0 and, of an LSTM, c0, each (D, N, H) in the parts' number format, as
            :meth:`fusedrnn.RNNOp.forward` takes them. None for a state that the node omits (zeros) or that is not
            constant; ``inputs`` shows which is the case. None instead of the tuple if all are None.
        lengths: The lengths of the sequences, int32 (N,), as :meth:`fusedrnn.RNNOp.forward` takes them; None if the
            node omits them or they are not constant; ``inputs`` shows which is the case.
        batch_first: Whether X is (N, T, I) (layout 1), not (T, N, I).
        inputs: The values that the node reads, by the names of inputs in ONNX's schema.
        outputs: The names of its outputs Y, Y_h and Y_c, empty for an omitted one.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    states: tuple[Array | None, ...] | None
    lengths: Array | None
    batch_first: bool
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]

    @property
    def spec(self) -> RNNSpec:
        """The spec of the layer's only part; a ValueError if it has two."""
        return self._only_part().spec

    @property
    def params(self) -> Any:
        """The parameters of the layer's only part; a ValueError if it has two."""
        return self._only_part().params

    def _only_part(self) -> Part:
        if len(self.parts) > 1:
            raise ValueError(f"layer {self.name!r} has two parts, since the activations of its directions differ")
        return self.parts[0]


@dataclass(frozen=True)
class LayerNode:
    """A recurrent node in its scope, with :attr:`Layer.name` and its label in errors."""

    scope: Scope
    node: NodeProto
    name: str
    label: str


def read(model: ModelProto, names: Iterable[str] | None = None) -> dict[str, Layer]:
    """The recurrent layers of a model, in the order of the graph, including those in bodies of other nodes.

    Weights and states may be constants, or computed from constants alone by the operators of
    :data:`fusedrnn.onnx.folding.FOLDED`.

    Args:
        model: The model, with its weights in the same object. It does not change, and the result shares no memory with
            it.
        names: The layers to read, each by :attr:`Layer.name` or the name of one of its outputs with the same path;
            None for all.

    Returns:
        Layers by :attr:`Layer.name`; empty if the model has no recurrent nodes. Parameters in float16 and bfloat16
        become float32; for bfloat16, the spec has ``compute="bfloat16"``.

    Raises:
        TypeError: If ``model`` is not a model, or a weight has a number format that a node cannot have.
        ValueError: If a node cannot be read, because of weights that are not constants, of shapes or of attributes; the
            message names the node and the reason. Or if no recurrent node has one of ``names``.
        NotImplementedError: If some of the nodes to read are recurrent nodes of other operators; the message names
            them.

    Example:
    >>> from onnx.parser import parse_model
    >>> model = parse_model('''<ir_version: 8, opset_import: ["": 14]> g (float[T, N, 1] X) => (float[T, 1, N, 1] Y)
    ...     <float[1, 1, 1] W = {2}, float[1, 1, 1] R = {3}> { Y = RNN <hidden_size = 1> (X, W, R) }''')
    >>> layer = read(model)["Y"]
    >>> layer.spec.mode, layer.params
    ('rnn_tanh', array([2., 3.], dtype=float32))
    """
    folder = Folder()
    layers = [read_layer(layer_node, folder) for layer_node in select_nodes(model, names)]
    repeated = [name for name, count in Counter(layer.name for layer in layers).items() if count > 1]
    if names is None and repeated:
        raise ValueError(f"names of nodes or of their outputs must differ; got several {repeated[0]!r}")
    return {layer.name: layer for layer in layers}


def select_nodes(model: ModelProto, names: Iterable[str] | None) -> list[LayerNode]:
    """The recurrent nodes with these names, or all; errors are those of :func:`read`."""
    if not isinstance(model, ModelProto):
        raise TypeError(f"model must be an onnx.ModelProto; got {type(model).__name__}")
    nodes = [
        LayerNode(scope, node, scope.path_of(node), scope.label(node))
        for scope, node in Scope(model, model.graph).walk()
        if has_recurrent_name(node) and scope.functions.called_by(node) is None
    ]
    if names is not None:
        if not isinstance(names, Iterable):
            raise TypeError(f"names must be a name or several, or None; got {type(names).__name__}")
        nodes = [_node_with_name(nodes, name) for name in ([names] if isinstance(names, str) else names)]
    unsupported = [layer_node.label for layer_node in nodes if not is_recurrent(layer_node.node)]
    if unsupported:
        others = ", ".join(repr(layer_node.name) for layer_node in nodes if is_recurrent(layer_node.node))
        advice = f"; name the others to read them alone: {others}" if others else ""
        raise NotImplementedError(
            f"{', '.join(unsupported)} cannot be read; expected LSTM, GRU or RNN of ONNX's own domain, or "
            f"DynamicQuantizeLSTM of com.microsoft{advice}"
        )
    return nodes


def _node_with_name(nodes: Sequence[LayerNode], name: object) -> LayerNode:
    """The only node with this name, or else the only node with an output of this name."""
    if not isinstance(name, str):
        raise TypeError(f"name must be that of a node or of an output; got {type(name).__name__}")
    matches = [layer_node for layer_node in nodes if layer_node.name == name]
    matches = matches or [layer_node for layer_node in nodes if name in layer_node.scope.all_paths_of(layer_node.node)]
    if len(matches) != 1:
        known = ", ".join(repr(layer_node.name) for layer_node in nodes) or "which there are none"
        raise ValueError(f"name must be that of one LSTM, GRU or RNN, of {known}; got {name!r}")
    return matches[0]


def read_layer(layer_node: LayerNode, folder: Folder) -> Layer:
    """The layer of a node; errors are those of :func:`read`."""
    scope = layer_node.scope
    with errors_name_node(layer_node.label):
        node = scope.bound(layer_node.node)
        settings = parse(node, scope.opset, scope.model.ir_version)
        inputs = inputs_of(node)
        if scope.in_function:  # its caller may omit some arguments
            inputs = {name: value for name, value in inputs.items() if scope.origin(value) is not None}
        for name in ("W", "R"):
            if name not in inputs:
                raise ValueError(f"{name} must be given; the function that contains the node is called without it")
        constants = _constants(inputs, scope, folder)
        parts = from_onnx(settings, {name: constants[name] for name in WEIGHTS if name in inputs})
        hidden_size = parts[0].spec.hidden_size
        states = tuple(
            np.array(state_of(constants, name, settings, hidden_size), order="C") if name in constants else None
            for name in (f"initial_{state}" for state in parts[0].spec.state_names)
        )
        lengths = _lengths(constants.get("sequence_lens"))
    return Layer(
        name=layer_node.name,
        kind=settings.kind,
        parts=parts,
        states=None if all(state is None for state in states) else states,
        lengths=lengths,
        batch_first=settings.batch_first,
        inputs=inputs,
        outputs=tuple(node.output),
    )


def _constants(inputs: Mapping[str, str], scope: Scope, folder: Folder) -> dict[str, Array]:
    """The inputs that are constants; an error if a weight is not."""
    constants = {}
    for name in (*WEIGHTS, "initial_h", "initial_c", "sequence_lens"):
        if name in inputs:
            try:
                constants[name] = folder.array(scope, inputs[name])
            except NotConstantError as error:
                if name in WEIGHTS:
                    raise ValueError(f"{name} must be computed from constants alone; {error}") from error
    return constants


def _lengths(lengths: Array | None) -> Array | None:
    """A copy of the lengths of sequences, checked as far as possible without X."""
    if lengths is None:
        return None
    if lengths.dtype != np.int32:
        raise TypeError(f"sequence_lens must be int32; got {lengths.dtype}")
    if lengths.ndim != 1 or lengths.size == 0:
        raise ValueError(f"sequence_lens must have shape (N,); got {lengths.shape}")
    if lengths.min() < 0:
        raise ValueError(f"sequence_lens must be from 0 on; got {lengths.min()}")
    return lengths.copy()
