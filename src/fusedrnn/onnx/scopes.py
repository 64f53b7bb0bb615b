"""Which value a name means: in a model's graph, in the bodies of If, Loop and Scan, and in functions.

A body sees the values of the graph around it, unless one of its own has the same name. A function sees its arguments
alone. A function has a scope for each call, since each call may give it other weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from fusedrnn.onnx.errors import first_output, operator_name
from fusedrnn.onnx.functions import Functions
from fusedrnn.onnx.graph import is_other_recurrent, is_recurrent, opset_of, subgraphs
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

# Limits that no model comes near by accident, so that one made to exhaust time or memory is refused.
_MAX_DEPTH = 100
_MAX_FUNCTION_NODES = 10_000


@dataclass(frozen=True)
class Origin:
    """What makes a value: a node, or a tensor that a graph holds; neither for an input of a graph.

    Attributes:
        scope: Where the value is made.
        name: Its name there.
        node: The node that makes it.
        tensor: The initializer that holds it.
    """

    scope: Scope
    name: str
    node: NodeProto | None = None
    tensor: TensorProto | None = None

    @property
    def key(self) -> tuple[int, str]:
        """What tells values apart; the scope must stay alive."""
        return id(self.scope), self.name


class Scope:
    """The nodes of one graph, or of a function for one of its calls, and the values that they see.

    Args:
        model: The model.
        body: Its graph, a graph that a node holds as an attribute, or a function.
        path: What precedes the names of the nodes: nothing in the model's graph, else it ends in ``/``.
        outer: The scope of the node that holds the body or calls the function.
        call: The node that calls the function.
    """

    def __init__(
        self,
        model: ModelProto,
        body: GraphProto | FunctionProto,
        path: str = "",
        outer: Scope | None = None,
        call: NodeProto | None = None,
    ) -> None:
        self.model, self.body, self.path, self.outer, self.call = model, body, path, outer, call
        self.nodes = tuple(body.node)
        self.depth: int = 0 if outer is None else outer.depth + 1
        self._bodies: dict[int, tuple[Scope, ...]] = {}
        self._function_nodes = 0

    @property
    def root(self) -> Scope:
        """The scope of the model's graph."""
        scope = self
        while scope.outer is not None:
            scope = scope.outer
        return scope

    # ---- names of nodes

    @cached_property
    def _handles(self) -> Counter[str]:
        """How often each name of a node or of an output occurs."""
        return Counter(name for node in self.nodes for name in {node.name, *node.output})

    def path_of(self, node: NodeProto) -> str:
        """What a node is called: the path with its name; with its first output if the name is missing or not unique."""
        name = node.name if self._has_own_name(node) else first_output(node)
        return self.path + (name or node.op_type)

    def _has_own_name(self, node: NodeProto) -> bool:
        return bool(node.name) and self._handles[node.name] == 1

    def handles(self, node: NodeProto) -> set[str]:
        """The paths with the node's name and with its outputs."""
        return {self.path + name for name in (node.name, *node.output) if name}

    def label(self, node: NodeProto) -> str:
        """What an error calls a node."""
        before = "node" if self._has_own_name(node) else "the node of"
        return f"{before} {self.path_of(node)!r} ({operator_name(node)})"

    # ---- operators

    @cached_property
    def opset(self) -> int:
        """The version of ONNX's own operators that the nodes are written for.

        Raises:
            ValueError: If the model or the function does not say.
        """
        if self.call is None and self.outer is not None:
            return self.outer.opset
        owner = self.body if isinstance(self.body, FunctionProto) else self.model
        return opset_of(owner)

    @property
    def in_function(self) -> bool:
        """Whether the nodes belong to a function, directly or by way of bodies."""
        return self.call is not None or (self.outer is not None and self.outer.in_function)

    @cached_property
    def functions(self) -> Functions:
        """Those of the model."""
        return Functions(self.model) if self.outer is None else self.outer.functions

    def is_recurrent(self, node: NodeProto) -> bool:
        """Whether the node is one of ONNX's LSTM, GRU and RNN."""
        return is_recurrent(node) and self.functions.called_by(node) is None

    def is_other_recurrent(self, node: NodeProto) -> bool:
        """Whether the node's operator is recurrent by its name, and not one of ONNX's three."""
        return is_other_recurrent(node) and self.functions.called_by(node) is None

    @cached_property
    def _attributes(self) -> Mapping[str, AttributeProto]:
        """The attributes that the function is called with, by name, and its defaults."""
        if self.call is None:
            return {} if self.outer is None else self.outer._attributes
        defaults = {entry.name: entry for entry in self.body.attribute_proto}
        return defaults | {entry.name: entry for entry in self.call.attribute}

    def bound(self, node: NodeProto) -> NodeProto:
        """The node with references to attributes of the function replaced.

        Raises:
            ValueError: If it has such a reference and is in no function.
        """
        references = [entry for entry in node.attribute if entry.ref_attr_name]
        if not references:
            return node
        if not self.in_function:
            name, target = references[0].name, references[0].ref_attr_name
            raise ValueError(f"{name} must have a value outside of functions; got a reference to {target!r}")
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.ClearField("attribute")
        for entry in node.attribute:
            value = self._attributes.get(entry.ref_attr_name) if entry.ref_attr_name else entry
            if value is not None:
                copy.attribute.add().CopyFrom(value)
                copy.attribute[-1].name = entry.name
        return copy

    # ---- bodies

    def bodies(self, node: NodeProto) -> tuple[Scope, ...]:
        """The scopes of the graphs that the node holds, or of the function that it calls.

        Raises:
            ValueError: If bodies are nested too deep, as those of a function that calls itself are, or if functions
                have too many nodes, those of each call counted.
        """
        if id(node) not in self._bodies:
            self._bodies[id(node)] = tuple(self._scopes_of(node))
        return self._bodies[id(node)]

    def _scopes_of(self, node: NodeProto) -> Iterator[Scope]:
        function = self.functions.called_by(node)
        inner: list[tuple[str, GraphProto | FunctionProto]] = [*subgraphs(node)]
        if function is not None:
            inner = [(function.name, function)]
        if inner and self.depth >= _MAX_DEPTH:
            raise ValueError(f"{self.label(node)}: bodies must be nested at most {_MAX_DEPTH} deep; got more")
        for name, body in inner:
            call = self.bound(node) if function is not None else None
            scope = Scope(self.model, body, f"{self.path_of(node)}/{name}/", self, call)
            if scope.in_function:
                self._count(node, 1 + len(scope.nodes))
            yield scope

    def _count(self, node: NodeProto, number: int) -> None:
        root = self.root
        root._function_nodes += number
        if root._function_nodes > _MAX_FUNCTION_NODES:
            most = _MAX_FUNCTION_NODES
            raise ValueError(f"{self.label(node)}: functions must have at most {most} nodes over all calls; got more")

    def walk(self) -> Iterator[tuple[Scope, NodeProto]]:
        """All nodes here and in bodies, in their order; a node comes before those of its bodies.

        Functions without recurrent nodes are passed over.

        Raises:
            ValueError: As :meth:`bodies`.
        """
        stack = [(self, iter(self.nodes))]
        while stack:
            scope, nodes = stack[-1]
            node = next(nodes, None)
            if node is None:
                stack.pop()
                continue
            yield scope, node
            function = scope.functions.called_by(node)
            if function is not None and not self.functions.is_recurrent(function):
                continue
            stack += [(body, iter(body.nodes)) for body in reversed(scope.bodies(node))]

    # ---- values

    @cached_property
    def _producers(self) -> Mapping[str, NodeProto]:
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def _repeated(self) -> frozenset[str]:
        """The values with more than one origin."""
        makers = Counter(name for node in self.nodes for name in node.output if name)
        if isinstance(self.body, GraphProto):
            makers.update(tensor.name for tensor in self.body.initializer if tensor.name in self._initializers)
        return frozenset(name for name, count in makers.items() if count > 1)

    @cached_property
    def _initializers(self) -> Mapping[str, TensorProto]:
        if not isinstance(self.body, GraphProto):
            return {}
        # An input of a body is given by its node; an initializer of that name would be no more than a default.
        inputs = self._inputs if self.outer is not None else frozenset[str]()
        return {tensor.name: tensor for tensor in self.body.initializer if tensor.name not in inputs}

    @cached_property
    def _inputs(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.body.input) if isinstance(self.body, GraphProto) else frozenset()

    @cached_property
    def _sparse(self) -> Mapping[str, SparseTensorProto]:
        if not isinstance(self.body, GraphProto):
            return {}
        return {tensor.values.name: tensor for tensor in self.body.sparse_initializer}

    @cached_property
    def _arguments(self) -> Mapping[str, str]:
        """The values that a function is called with, by its own names for them; empty for one that is left out."""
        if self.call is None or not isinstance(self.body, FunctionProto):
            return {}
        values = (*self.call.input, *[""] * len(self.body.input))
        return dict(zip(self.body.input, values, strict=False))

    def origin(self, name: str) -> Origin | None:
        """What makes the value that has this name here; None for an argument that the caller leaves out.

        Raises:
            ValueError: If there is no such value, it has two origins, or it depends on itself.
            NotImplementedError: If it is a sparse initializer.
        """
        scope, seen = self, set()
        while (id(scope), name) not in seen:
            seen.add((id(scope), name))
            node = scope._producers.get(name)
            if node is not None:
                if name in scope._repeated:
                    raise ValueError(f"value {name!r} must be made once; got several nodes or an initializer that do")
                if scope.functions.called_by(node) is None:
                    return Origin(scope, name, node=node)
                (body,) = scope.bodies(node)
                place = list(node.output).index(name)
                if place >= len(body.body.output):
                    raise ValueError(f"{scope.label(node)}: its function has no output {place} for {name!r}")
                scope, name = body, body.body.output[place]
            elif name in scope._initializers:
                if name in scope._repeated:
                    raise ValueError(f"value {name!r} must be made once; got several initializers that do")
                return Origin(scope, name, tensor=scope._initializers[name])
            elif name in scope._sparse:
                raise NotImplementedError(f"initializer {name!r} is sparse, which is not served")
            elif name in scope._inputs:
                return Origin(scope, name)
            elif name in scope._arguments and scope.outer is not None:
                scope, name = scope.outer, scope._arguments[name]
                if not name:
                    return None
            elif scope.outer is None or scope.call is not None:
                break
            else:
                scope = scope.outer
        else:
            raise ValueError(f"value {name!r} depends on itself")
        raise ValueError(f"there is no value {name!r}")
