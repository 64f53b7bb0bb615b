"""The backend: models whose nodes are LSTM, GRU and RNN, run node by node on the fused operator."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx.backend.base

import onnx
from fusedrnn.engines import registry
from fusedrnn.onnx.attributes import KINDS
from fusedrnn.onnx.checking import checked
from fusedrnn.onnx.errors import DOMAINS, label
from fusedrnn.onnx.folding import FOLDED, Folder
from fusedrnn.onnx.graph import is_recurrent
from fusedrnn.onnx.node_runner import Recurrence
from fusedrnn.onnx.scopes import Scope
from fusedrnn.onnx.weight_layout import Array
from fusedrnn.scalars import positive_int
from onnx import ModelProto, NodeProto

_ACCEPTED = frozenset({*KINDS, "Constant", *FOLDED})


class PreparedModel(onnx.backend.base.BackendRep):  # type: ignore[misc,unused-ignore]
    """A model ready to run, any number of times and from any number of threads at once.

    Attributes:
        inputs: The names of the inputs to be given to :meth:`run`, in order.
        outputs: Those of the outputs.
    """

    def __init__(self, model: ModelProto, backend: str | None) -> None:
        for node in model.graph.node:
            if node.domain not in DOMAINS or node.op_type not in _ACCEPTED:
                raise _not_served(node)
        model = checked(model)
        graph = model.graph
        for sparse in graph.sparse_initializer:
            raise NotImplementedError(f"initializer {sparse.values.name!r} is sparse, which is not served")
        listed = [entry.name for entry in graph.input]
        scope, folder = Scope(model, graph), Folder()
        values = {tensor.name: folder.array(scope, tensor.name) for tensor in graph.initializer}
        fixed = values.keys() - listed
        self._steps: list[Recurrence | NodeProto] = []
        for node in scope.nodes:
            if scope.is_recurrent(node):
                self._steps.append(Recurrence(node, scope.opset, model.ir_version, values, backend))
            elif scope.functions.called_by(node) is None and fixed.issuperset(filter(None, node.input)):
                results = {name: folder.array(scope, name) for name in node.output if name}
                values |= results
                fixed |= results.keys()
            elif node.op_type == "Identity":
                self._steps.append(node)
                if node.input[0] in values:
                    values[node.output[0]] = values[node.input[0]]
            else:
                raise _not_served(node)
        self.inputs = tuple(name for name in listed if name not in values)
        self.outputs = tuple(entry.name for entry in graph.output)
        self._replaceable = set(listed).difference(self.inputs)
        needed = {name for step in self._steps for name in _read_by(step)}.union(self.outputs, listed)
        self._constants = {name: value for name, value in values.items() if name in needed}

    def run(self, inputs: Sequence[Array] | Mapping[str, Array], **unknown: Any) -> tuple[Array, ...]:
        """The model's outputs, a tuple that also knows them by name.

        Args:
            inputs: NumPy arrays: one for each of :attr:`inputs` in order; or by name, and then also for initializers
                that the graph lists among its inputs, to be used in their place.
            unknown: There are no other arguments.

        Raises:
            TypeError: Naming the input, what was given and what was expected.
            ValueError: Likewise.
            NotImplementedError: Naming a node and what no engine has of it.
        """
        _refuse(unknown)
        values = self._constants | _by_name(inputs, self.inputs, self._replaceable)
        for step in self._steps:
            if isinstance(step, Recurrence):
                values.update(step(values))
            else:
                values[step.output[0]] = values[step.input[0]]
        return _named({name: values[name] for name in self.outputs})


class Backend(onnx.backend.base.Backend):  # type: ignore[misc,unused-ignore]
    """ONNX's backend interface. It serves LSTM, GRU and RNN, and constants; every other node is refused by name.

    Example:
    >>> import numpy as np
    >>> from onnx import helper
    >>> node = helper.make_node("GRU", ["X", "W", "R"], ["Y", "Y_h"], hidden_size=4, linear_before_reset=1)
    >>> X, W, R = (np.zeros(shape, np.float32) for shape in ((7, 2, 3), (1, 12, 3), (1, 12, 4)))
    >>> Y, Y_h = Backend.run_node(node, [X, W, R], backend="reference")
    >>> Y.shape, Y_h.shape
    ((7, 1, 2, 4), (1, 2, 4))
    """

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether models can run there: on ``"CPU"``."""
        return isinstance(device, str) and device.split(":")[0] == "CPU"

    @classmethod
    def is_compatible(cls, model: ModelProto, device: str = "CPU", **options: Any) -> bool:
        """Whether :meth:`prepare` accepts the model; what weights that are inputs ask for shows only in a run."""
        try:
            cls.prepare(model, device, **options)
        except (TypeError, ValueError, NotImplementedError):
            return False
        return True

    @classmethod
    def prepare(
        cls, model: ModelProto, device: str = "CPU", *, backend: str | None = None, **unknown: Any
    ) -> PreparedModel:
        """Check a model and pack its weights.

        Args:
            model: The model.
            device: ``"CPU"``.
            backend: The engine, as in :class:`fusedrnn.RNNOp`; None for the first that can.
            unknown: There are no other options.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If the model is not valid, or an argument not one of those there are.
            NotImplementedError: Naming the node of a kind that is not served, or what no engine has of a node.
        """
        if not isinstance(model, ModelProto):
            raise TypeError(f"model must be an onnx.ModelProto; got {type(model).__name__}")
        return PreparedModel(model, cls._checked(device, backend, **unknown))

    @classmethod
    def _checked(cls, device: str, backend: str | None = None, **unknown: Any) -> str | None:
        """The engine asked for, device and options being such as there are."""
        _refuse(unknown)
        if not cls.supports_device(device):
            raise ValueError(f"device must be 'CPU'; got {device!r}")
        if backend is not None:
            registry.find(backend)  # raises if there is none
        return backend

    @classmethod
    def run_model(
        cls, model: ModelProto, inputs: Sequence[Array] | Mapping[str, Array], device: str = "CPU", **options: Any
    ) -> tuple[Array, ...]:
        """:meth:`prepare` with its options, then :meth:`PreparedModel.run`."""
        return cls.prepare(model, device, **options).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: NodeProto,
        inputs: Sequence[Array] | Mapping[str, Array],
        device: str = "CPU",
        outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None = None,
        *,
        opset_version: Any = None,
        **options: Any,
    ) -> tuple[Array, ...]:
        """Run one node.

        Args:
            node: The node.
            inputs: An array for each input that the node names, in order or by name.
            device: ``"CPU"``.
            outputs_info: Number format and shape that each output must have; None for whatever they have.
            opset_version: The version of ONNX's operators; None for the newest of this onnx package.
            options: As in :meth:`prepare`.

        Returns:
            The outputs that the node names, a tuple that also knows them by name.

        Raises:
            TypeError: As in :meth:`prepare` and :meth:`PreparedModel.run`.
            ValueError: Likewise.
            NotImplementedError: Likewise.
        """
        if not isinstance(node, NodeProto):
            raise TypeError(f"node must be an onnx.NodeProto; got {type(node).__name__}")
        backend = cls._checked(device, **options)
        if not is_recurrent(node):
            raise NotImplementedError(f"{label(node)}: run_node serves {', '.join(KINDS)} alone")
        newest = onnx.defs.onnx_opset_version()
        opset = newest if opset_version is None else positive_int("opset_version", opset_version)
        values = _by_name(inputs, tuple(dict.fromkeys(filter(None, node.input))))
        made = Recurrence(node, opset, onnx.IR_VERSION, {}, backend)(values)
        _compare(made, outputs_info)
        return _named(made)


def _refuse(unknown: Mapping[str, Any]) -> None:
    if unknown:
        raise TypeError(f"there is no option {', '.join(unknown)}")


def _not_served(node: NodeProto) -> NotImplementedError:
    kinds = ", ".join(KINDS)
    return NotImplementedError(f"{label(node)} is not served; expected {kinds}, or nodes that only read constants")


def _read_by(step: Recurrence | NodeProto) -> Iterable[str]:
    return step.inputs.values() if isinstance(step, Recurrence) else step.input


def _by_name(inputs: object, names: Sequence[str], others: Collection[str] = ()) -> dict[str, Array]:
    """The inputs of these names, given in order or by name; by name there may be others too."""
    wanted = f"{len(names)} NumPy arrays: {', '.join(names)}"
    if isinstance(inputs, Mapping):
        given = dict(inputs)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)):
        if len(inputs) != len(names):
            raise ValueError(f"inputs must be {wanted}; got {len(inputs)}")
        given = dict(zip(names, inputs, strict=True))
    else:
        raise TypeError(f"inputs must be {wanted}; got {type(inputs).__name__}")
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"inputs must be {wanted}; missing {', '.join(missing)}")
    for name, value in given.items():
        if name not in names and name not in others:
            raise ValueError(f"inputs must be {wanted}; got {name!r}")
        if not isinstance(value, np.ndarray):
            raise TypeError(f"inputs: {name} must be a NumPy array; got {type(value).__name__}")
    return given


def _named(values: Mapping[str, Array]) -> tuple[Array, ...]:
    """A tuple that knows its elements by name."""
    made: tuple[Array, ...] = onnx.backend.base.namedtupledict("Outputs", tuple(values))(*values.values())
    return made


def _compare(made: Mapping[str, Array], info: Sequence[tuple[Any, tuple[int, ...]]] | None) -> None:
    """Whether the outputs are of these formats and shapes."""
    if info is None:
        return
    found = [(value.dtype, value.shape) for value in made.values()]
    if found != [(np.dtype(dtype), tuple(shape)) for dtype, shape in info]:
        raise ValueError(f"outputs_info must be {found}; got {list(info)}")
