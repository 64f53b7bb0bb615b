"""The recurrent layers of a model, read as specs and flat parameter vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusedrnn.onnx.attributes import Settings, parse
from fusedrnn.onnx.errors import naming
from fusedrnn.onnx.folding import Folder, NotConstantError
from fusedrnn.onnx.graph import inputs_of
from fusedrnn.onnx.scopes import Scope
from fusedrnn.onnx.weight_layout import COMPUTED, WEIGHTS, Array, gather, same_format, specs
from fusedrnn.spec import RNNSpec
from onnx import ModelProto, NodeProto


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
        name: The node's name; or its first output, if it has none or shares it with another. Of a node in the body
            of another the path: ``If_0/then_branch/LSTM_3``; in a function ``call/function/LSTM_3``.
        kind: ``"LSTM"``, ``"GRU"`` or ``"RNN"``.
        parts: What it runs: one part; or one for each direction, the second with ``reverse=True``, if their
            activations differ.
        states: The initial states h0 and, of an LSTM, c0, each (D, N, H) in the parts' format, as
            :meth:`fusedrnn.RNNOp.forward` takes them. None for one that is left out, which means zeros, or that is
            no constant, which ``inputs`` tells; None instead of the tuple if all are.
        lengths: The lengths of the sequences, int32 (N,), as :meth:`fusedrnn.RNNOp.forward` takes them; None if the
            node has none or they are no constant, which ``inputs`` tells.
        batch_first: Whether X is (N, T, I) (layout 1), not (T, N, I).
        inputs: The values that the node reads, by the names that ONNX's schema gives its inputs.
        outputs: The names of its outputs Y, Y_h and Y_c, empty for one that it does not give.
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


@dataclass(frozen=True)
class Place:
    """A recurrent node and where it lies.

    Attributes:
        scope: The graph or function's body, and what its nodes see.
        node: The node.
    """

    scope: Scope
    node: NodeProto

    @property
    def name(self) -> str:
        """:attr:`Layer.name`."""
        return self.scope.path_of(self.node)

    @property
    def label(self) -> str:
        """What errors call the node."""
        return self.scope.label(self.node)

    @property
    def served(self) -> bool:
        """Whether it is one of ONNX's three operators."""
        return self.scope.is_recurrent(self.node)


def read(model: ModelProto, names: Iterable[str] | None = None) -> dict[str, Layer]:
    """The recurrent layers of a model, by name, in the order of the graph, those in bodies of other nodes included.

    Weights and states may be constants, or computed from constants alone by the operators of
    :data:`fusedrnn.onnx.folding.FOLDED`.

    Args:
        model: The model, with its weights inside. It stays as it is, and nothing that is returned shares its memory.
        names: Which to read, each by :attr:`Layer.name` or the name of one of its outputs with the same path; None for
            all.

    Returns:
        Layers by :attr:`Layer.name`. Parameters of float16 and bfloat16 are given in float32. Empty if the model has
        no recurrent nodes.

    Raises:
        TypeError: If ``model`` is no model, or a weight of a format that a node cannot have.
        ValueError: Naming the node and what it cannot be read for: weights that are not constants, shapes,
            attributes; or a name of which there is no recurrent node.
        NotImplementedError: Naming the recurrent nodes of other operators, such as those of quantised models, if all
            are asked for or one of them is.

    Example:
    >>> from onnx.parser import parse_model
    >>> model = parse_model('''<ir_version: 8, opset_import: ["": 14]> g (float[T, N, 1] X) => (float[T, 1, N, 1] Y)
    ...     <float[1, 1, 1] W = {2}, float[1, 1, 1] R = {3}> { Y = RNN <hidden_size = 1> (X, W, R) }''')
    >>> layer = read(model)["Y"]
    >>> layer.spec.mode, layer.params
    ('rnn_tanh', array([2., 3.], dtype=float32))
    """
    places = find_places(model)
    if names is not None and not isinstance(names, Iterable):
        raise TypeError(f"names must be a name or several, or None; got {type(names).__name__}")
    if names is not None:
        places = [find_place(places, name) for name in ([names] if isinstance(names, str) else names)]
    refuse_others(places)
    folder = Folder()
    layers = [layer_at(place, folder) for place in places]
    repeated = [name for name, count in Counter(layer.name for layer in layers).items() if count > 1]
    if names is None and repeated:
        raise ValueError(f"names of nodes or of their outputs must differ; got several {repeated[0]!r}")
    return {layer.name: layer for layer in layers}


def find_places(model: ModelProto) -> list[Place]:
    """All recurrent nodes, those of operators that are not served included.

    Raises:
        TypeError: If ``model`` is no model.
        ValueError: As :meth:`Scope.walk`.
    """
    if not isinstance(model, ModelProto):
        raise TypeError(f"model must be an onnx.ModelProto; got {type(model).__name__}")
    return [
        Place(scope, node)
        for scope, node in Scope(model, model.graph).walk()
        if scope.is_recurrent(node) or scope.is_other_recurrent(node)
    ]


def find_place(places: Sequence[Place], name: object) -> Place:
    """The one place of that name, or with an output of that name."""
    if not isinstance(name, str):
        raise TypeError(f"name must be that of a node or of an output; got {type(name).__name__}")
    matches = [place for place in places if place.name == name]
    matches = matches or [place for place in places if name in place.scope.handles(place.node)]
    if len(matches) != 1:
        known = ", ".join(repr(place.name) for place in places) or "which there are none"
        raise ValueError(f"name must be that of one LSTM, GRU or RNN, of {known}; got {name!r}")
    return matches[0]


def refuse_others(places: Sequence[Place]) -> None:
    """Refuse recurrent nodes of operators that are not served, and say which there are."""
    others = [place.label for place in places if not place.served]
    if others:
        served = ", ".join(repr(place.name) for place in places if place.served)
        advice = f"; name the others to read them alone: {served}" if served else ""
        raise NotImplementedError(
            f"{', '.join(others)} cannot be read; expected LSTM, GRU or RNN of ONNX's own domain, as in a model that "
            f"is not quantised{advice}"
        )


def layer_at(place: Place, folder: Folder) -> Layer:
    """The layer of a node.

    Raises:
        TypeError: As :func:`read`.
        ValueError: As :func:`read`.
        NotImplementedError: If a weight is a sparse constant.
    """
    scope = place.scope
    with naming(place.label):
        node = scope.bound(place.node)
        settings = parse(node, scope.opset, scope.model.ir_version)
        inputs = _inputs(place)
        for name in ("W", "R"):
            if name not in inputs:
                raise ValueError(f"{name} must be given; the function that the node lies in is called without it")
        weights = {name: _weight(name, inputs[name], scope, folder) for name in WEIGHTS if name in inputs}
        direction_specs = specs(settings, weights)
        parts = tuple(
            Part(spec, gather(settings.kind, spec, first, weights)) for first, spec in enumerate(direction_specs)
        )
        states = tuple(
            _state(f"initial_{name}", _constant(inputs.get(f"initial_{name}"), scope, folder), settings, weights)
            for name in direction_specs[0].state_names
        )
        lengths = _lengths(_constant(inputs.get("sequence_lens"), scope, folder))
    return Layer(
        name=place.name,
        kind=node.op_type,
        parts=parts,
        states=None if all(state is None for state in states) else states,
        lengths=lengths,
        batch_first=settings.batch_first,
        inputs=inputs,
        outputs=tuple(node.output),
    )


def _inputs(place: Place) -> dict[str, str]:
    """The inputs that the node has, without those that the caller of its function leaves out."""
    inputs = inputs_of(place.node)
    return {
        name: value
        for name, value in inputs.items()
        if not place.scope.in_function or place.scope.origin(value) is not None
    }


def _weight(name: str, value: str, scope: Scope, folder: Folder) -> Array:
    try:
        return folder.array(scope, value)
    except NotConstantError as error:
        raise ValueError(f"{name} must be computed from constants alone; {error}") from error


def _constant(value: str | None, scope: Scope, folder: Folder) -> Array | None:
    """A value, if there is one and it is a constant."""
    if value is None:
        return None
    try:
        return folder.array(scope, value)
    except NotConstantError:
        return None


def _lengths(lengths: Array | None) -> Array | None:
    """Lengths of sequences, checked as far as they can be without an input."""
    if lengths is None:
        return None
    if lengths.dtype != np.int32:
        raise TypeError(f"sequence_lens must be int32; got {lengths.dtype}")
    if lengths.ndim != 1 or lengths.size == 0:
        raise ValueError(f"sequence_lens must have shape (N,); got {lengths.shape}")
    if lengths.min() < 0:
        raise ValueError(f"sequence_lens must be from 0 on; got {lengths.min()}")
    return lengths.copy()


def _state(name: str, state: Array | None, settings: Settings, weights: Mapping[str, Array]) -> Array | None:
    """An initial state as (D, N, H), checked."""
    if state is None:
        return None
    same_format(name, state, weights["W"].dtype.name)
    D, H = settings.num_directions, weights["R"].shape[2]
    axes = f"(N, {D}, {H})" if settings.batch_first else f"({D}, N, {H})"
    state = state.swapaxes(0, 1) if settings.batch_first and state.ndim == 3 else state
    if state.ndim != 3 or state.shape != (D, max(1, state.shape[1]), H):
        raise ValueError(f"{name} must have shape {axes}; got {state.shape}")
    return np.array(state, COMPUTED[state.dtype.name], order="C")
