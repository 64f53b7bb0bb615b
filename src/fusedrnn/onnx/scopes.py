"""Resolves names of values: in a model's graph, in the bodies of If, Loop and Scan, and in functions.

A body sees the values of the graph around it, unless it has a value of the same name. A function sees only its
arguments. A function has one scope for each call, since each call may pass other weights.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from fusedrnn.lazy import cached_property
from fusedrnn.onnx.graph import Functions, first_output, operator_name, opset_of, subgraphs

# Far above what models need. The limits keep a malicious model from exhausting time or memory.
_MAX_DEPTH = 100
_MAX_FUNCTION_NODES = 10_000


@dataclass(frozen=True)
class Origin:
    """The scope that defines a value, and the node or initializer of the value; neither for an input of a graph."""

    scope: Scope
    name: str
    node: NodeProto | None = None
    tensor: TensorProto | None = None

    @property
    def key(self) -> tuple[int, str]:
        """A key that identifies the value while the scope exists."""
        return id(self.scope), self.name


class Scope:
    """The nodes of one graph, or of one call of a function, and the values that they see.

    Args:
        model: The model.
        body: Its graph, a graph in a node's attribute, or a function.
        path: The prefix of the nodes' names: empty in the model's graph, else it ends in ``/``.
        outer: The scope of the node that holds the body or calls the function.
        call: The node that calls the function, with its attributes bound.

    Attributes:
        root: The scope of the model's graph.
        owner: The scope of the function to which the nodes belong, directly or in bodies; else that of the model's
            graph.
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
        self.root: Scope = self if outer is None else outer.root
        self.owner: Scope = self if outer is None or call is not None else outer.owner
        self.functions: Functions = Functions(model) if outer is None else outer.functions
        self.in_function = self.owner.call is not None
        self._depth: int = 0 if outer is None else outer._depth + 1
        self._graph = body if isinstance(body, GraphProto) else GraphProto()
        self._inputs = frozenset(entry.name for entry in self._graph.input)
        self._sparse = frozenset(tensor.values.name for tensor in self._graph.sparse_initializer)
        self._bodies: dict[int, tuple[Scope, ...]] = {}
        self._function_nodes = 0

    # ---- names of nodes

    @cached_property
    def _name_counts(self) -> Counter[str]:
        """For each name, how many nodes have it as their own name or as the name of an output."""
        return Counter(name for node in self.nodes for name in {node.name, *node.output})

    def path_of(self, node: NodeProto) -> str:
        """The path with the node's name, or with its first output if the name is missing or not unique."""
        name = node.name if self._has_unique_name(node) else first_output(node)
        return self.path + (name or node.op_type)

    def _has_unique_name(self, node: NodeProto) -> bool:
        return bool(node.name) and self._name_counts[node.name] == 1

    def all_paths_of(self, node: NodeProto) -> set[str]:
        """The path with the node's name and with each of its outputs."""
        return {self.path + name for name in (node.name, *node.output) if name}

    def label(self, node: NodeProto) -> str:
        """The text for the node in errors."""
        noun = "node" if self._has_unique_name(node) else "the node of"
        return f"{noun} {self.path_of(node)!r} ({operator_name(node)})"

    # ---- operators

    @cached_property
    def opset(self) -> int:
        """The version of ONNX's own operators that the nodes use; errors are those of :func:`opset_of`."""
        return opset_of(self.owner.body if self.in_function else self.model)

    @cached_property
    def _attributes(self) -> Mapping[str, AttributeProto]:
        """The attributes of the function in this call, by name, including defaults."""
        entries = () if self.call is None else (*self.body.attribute_proto, *self.call.attribute)
        return {entry.name: entry for entry in entries}

    def bound(self, node: NodeProto) -> NodeProto:
        """The node with the function's attributes in place of references; a ValueError for a reference elsewhere."""
        references = [entry for entry in node.attribute if entry.ref_attr_name]
        if not references:
            return node
        if not self.in_function:
            name, target = references[0].name, references[0].ref_attr_name
            raise ValueError(f"{name} must have a value outside of functions; got a reference to {target!r}")
        copy = deepcopy(node)
        copy.ClearField("attribute")
        for entry in node.attribute:
            value = self.owner._attributes.get(entry.ref_attr_name) if entry.ref_attr_name else entry
            if value is not None:
                copy.attribute.add().CopyFrom(value)
                copy.attribute[-1].name = entry.name
        return copy

    # ---- bodies

    def bodies(self, node: NodeProto) -> tuple[Scope, ...]:
        """The scopes of the graphs that the node holds, or of the function that it calls.

        Raises:
            ValueError: If bodies are nested too deeply, for example in a function that calls itself, or if functions
                have too many nodes, where each call counts.
        """
        if id(node) not in self._bodies:
            self._bodies[id(node)] = tuple(self._body_scopes(node))
        return self._bodies[id(node)]

    def _body_scopes(self, node: NodeProto) -> Iterator[Scope]:
        function = self.functions.called_by(node)
        bodies: list[tuple[str, GraphProto | FunctionProto]] = [*subgraphs(node)]
        if function is not None:
            bodies = [(function.name, function)]
        if bodies and self._depth >= _MAX_DEPTH:
            raise ValueError(f"{self.label(node)}: bodies must be nested at most {_MAX_DEPTH} deep; got more")
        for name, body in bodies:
            call = self.bound(node) if function is not None else None
            scope = Scope(self.model, body, f"{self.path_of(node)}/{name}/", self, call)
            if scope.in_function:
                self.root._function_nodes += 1 + len(scope.nodes)
                if self.root._function_nodes > _MAX_FUNCTION_NODES:
                    limit = f"at most {_MAX_FUNCTION_NODES} nodes over all calls"
                    raise ValueError(f"{self.label(node)}: functions must have {limit}; got more")
            yield scope

    def walk(self) -> Iterator[tuple[Scope, NodeProto]]:
        """All nodes of this scope and its bodies, in order, each node before its bodies.

        Functions without recurrent nodes are skipped.
        """
        for node in self.nodes:
            yield self, node
            function = self.functions.called_by(node)
            if function is None or self.functions.is_recurrent(function):
                for body in self.bodies(node):
                    yield from body.walk()

    # ---- values

    @cached_property
    def _definitions(self) -> Mapping[str, list[Origin]]:
        """The nodes and initializers that define each value; more than one is an error where the value is read."""
        # A node passes the inputs of its body, so initializers with these names are only defaults.
        defaults = self._inputs if self.outer is not None else ()
        definitions: defaultdict[str, list[Origin]] = defaultdict(list)
        for node in self.nodes:
            for name in filter(None, node.output):
                definitions[name].append(Origin(self, name, node=node))
        for tensor in self._graph.initializer:
            if tensor.name not in defaults:
                definitions[tensor.name].append(Origin(self, tensor.name, tensor=tensor))
        return definitions

    @cached_property
    def _arguments(self) -> Mapping[str, str]:
        """The caller's name of each argument of the function, by the function's name; empty if it is omitted."""
        if self.call is None:
            return {}
        values = (*self.call.input, *[""] * len(self.body.input))
        return dict(zip(self.body.input, values, strict=False))

    def origin(self, name: str) -> Origin | None:
        """The origin of the value with this name in this scope; None for an argument that the caller omits.

        Raises:
            ValueError: If there is no such value, it has two origins, or it depends on itself.
            NotImplementedError: If it is a sparse initializer.
        """
        scope, seen = self, set()
        while (id(scope), name) not in seen:
            seen.add((id(scope), name))
            origin = scope._local_origin(name)
            if origin is not None:
                function_output = None if origin.node is None else scope._function_output(origin.node, name)
                if function_output is None:
                    return origin
                scope, name = function_output
            elif name in scope._arguments and scope.outer is not None:
                scope, name = scope.outer, scope._arguments[name]
                if not name:
                    return None
            elif scope.outer is not None and scope.call is None:
                scope = scope.outer
            else:
                raise ValueError(f"there is no value {name!r}")
        raise ValueError(f"value {name!r} depends on itself")

    def _local_origin(self, name: str) -> Origin | None:
        """The origin of a value that this body defines; None if it does not."""
        definitions = self._definitions.get(name, [])
        if len(definitions) > 1:
            raise ValueError(f"value {name!r} must be defined once; several nodes or initializers define it")
        if definitions:
            return definitions[0]
        if name in self._sparse:
            raise NotImplementedError(f"initializer {name!r} is sparse, which is not supported")
        return Origin(self, name) if name in self._inputs else None

    def _function_output(self, node: NodeProto, name: str) -> tuple[Scope, str] | None:
        """The value of a function that becomes this output of its call; None if the node is no call."""
        if self.functions.called_by(node) is None:
            return None
        (scope,) = self.bodies(node)
        index = list(node.output).index(name)
        if index >= len(scope.body.output):
            raise ValueError(f"{self.label(node)}: its function has no output {index} for {name!r}")
        return scope, scope.body.output[index]
