"""The onnx backend: runs LSTM, GRU, RNN and DynamicQuantizeLSTM nodes of a model, one by one, on the fused operator."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx.backend.base
from onnx import ModelProto, NodeProto

from fusedrnn.arrays import Array, check_is_array
from fusedrnn.engines import registry
from fusedrnn.onnx.attributes import KINDS
from fusedrnn.onnx.checking import checked
from fusedrnn.onnx.folding import FOLDED, Folder
from fusedrnn.onnx.graph import DOMAINS, is_recurrent, label
from fusedrnn.onnx.node_runner import NodeRunner
from fusedrnn.onnx.quantized import OPERATOR
from fusedrnn.onnx.scopes import Scope
from fusedrnn.scalars import positive_int

_FOLDED = FOLDED | {"Constant"}
_Step = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class PreparedModel(onnx.backend.base.BackendRep):  # type: ignore[misc,unused-ignore]
    """A model that is ready to run, any number of times and from any number of threads at once.

    Attributes:
        inputs: The names of the inputs that :meth:`run` takes, in order.
        outputs: The names of the outputs.
    """

    def __init__(self, model: ModelProto, backend: str | None) -> None:
        for node in model.graph.node:
            if not is_recurrent(node) and (node.domain not in DOMAINS or node.op_type not in _FOLDED):
                raise _unsupported(node)
        model = checked(model)
        graph = model.graph
        for sparse in graph.sparse_initializer:
            raise NotImplementedError(f"initializer {sparse.values.name!r} is sparse, which is not supported")
        input_names = [entry.name for entry in graph.input]
        scope, folder = Scope(model, graph), Folder()
        values = {tensor.name: folder.array(scope, tensor.name) for tensor in graph.initializer}
        fixed = values.keys() - input_names
        used_names = {*input_names, *(entry.name for entry in graph.output)}
        self._steps: list[_Step] = []
        for node in scope.nodes:
            if scope.functions.called_by(node) is not None:
                raise _unsupported(node)
            if is_recurrent(node):
                self._steps.append(NodeRunner(node, scope.opset, model.ir_version, values, backend))
            elif fixed.issuperset(filter(None, node.input)):
                results = {name: folder.array(scope, name) for name in node.output if name}
                values |= results
                fixed |= results.keys()
                continue
            elif node.op_type == "Identity":
                self._steps.append(partial(_identity, node))
                values |= _identity(node, values) if node.input[0] in values else {}
            else:
                raise _unsupported(node)
            used_names.update(node.input)
        self.inputs = tuple(name for name in input_names if name not in values)
        self.outputs = tuple(entry.name for entry in graph.output)
        self._replaceable = set(input_names).difference(self.inputs)
        self._constants = {name: value for name, value in values.items() if name in used_names}

    def run(self, inputs: Sequence[Array] | Mapping[str, Array], **unknown: Any) -> tuple[Array, ...]:
        """Compute the model's outputs, a tuple that can also be indexed by name.

        Args:
            inputs: NumPy arrays, one for each of :attr:`inputs`, in order or by name. A mapping by name may also
                replace initializers that the graph lists among its inputs.
            unknown: Any other argument is an error.

        Raises:
            TypeError: If an input has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an input has the wrong shape or value, or is missing; the message is of the same form.
            NotImplementedError: If no engine supports an option of a node; the message names both.
        """
        _reject_options(unknown)
        values = self._constants | _by_name(inputs, self.inputs, self._replaceable)
        for step in self._steps:
            values |= step(values)
        return _named(self.outputs, [values[name] for name in self.outputs])


class Backend(onnx.backend.base.Backend):  # type: ignore[misc,unused-ignore]
    """ONNX's backend interface for LSTM, GRU, RNN, ``com.microsoft.DynamicQuantizeLSTM`` and constants.

    For any other node, an error names it.

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
        """Whether models can run on the device: ``"CPU"`` only."""
        return isinstance(device, str) and device.split(":")[0] == "CPU"

    @classmethod
    def is_compatible(cls, model: ModelProto, device: str = "CPU", **options: Any) -> bool:
        """Whether :meth:`prepare` accepts the model. Weights that are inputs are checked only when the model runs."""
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
            backend: The engine, as in :class:`fusedrnn.RNNOp`; None for the first that supports the model.
            unknown: Any other option is an error.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If the model is invalid, or there is no such device or engine.
            NotImplementedError: If an operator or an option of a node is not supported; the message names the node.
        """
        if not isinstance(model, ModelProto):
            raise TypeError(f"model must be an onnx.ModelProto; got {type(model).__name__}")
        return PreparedModel(model, cls._checked_backend(device, backend, **unknown))

    @classmethod
    def _checked_backend(cls, device: str, backend: str | None = None, **unknown: Any) -> str | None:
        """The engine's name, after a check of the name, the device and the options."""
        _reject_options(unknown)
        if not cls.supports_device(device):
            raise ValueError(f"device must be 'CPU'; got {device!r}")
        registry.check_backend(backend)
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
            outputs_info: The number format and shape that each output must have; None to check nothing.
            opset_version: The version of ONNX's operators; None for the newest of this onnx package.
            options: As in :meth:`prepare`.

        Returns:
            The outputs that the node names, a tuple that can also be indexed by name.

        Raises:
            TypeError, ValueError, NotImplementedError: As in :meth:`prepare` and :meth:`PreparedModel.run`.
        """
        if not isinstance(node, NodeProto):
            raise TypeError(f"node must be an onnx.NodeProto; got {type(node).__name__}")
        backend = cls._checked_backend(device, **options)
        if not is_recurrent(node):
            raise NotImplementedError(f"{label(node)}: run_node supports only {', '.join(KINDS)} and {OPERATOR}")
        newest = onnx.defs.onnx_opset_version()
        opset = newest if opset_version is None else positive_int("opset_version", opset_version)
        values = _by_name(inputs, tuple(dict.fromkeys(filter(None, node.input))))
        outputs = NodeRunner(node, opset, onnx.IR_VERSION, {}, backend)(values)
        if outputs_info is not None:
            expected = [(value.dtype, value.shape) for value in outputs.values()]
            if expected != [(np.dtype(dtype), tuple(shape)) for dtype, shape in outputs_info]:
                raise ValueError(f"outputs_info must be {expected}; got {list(outputs_info)}")
        return _named(tuple(outputs), list(outputs.values()))


def _reject_options(unknown: Mapping[str, Any]) -> None:
    if unknown:
        raise TypeError(f"there is no option {', '.join(unknown)}")


def _unsupported(node: NodeProto) -> NotImplementedError:
    kinds = ", ".join((*KINDS, OPERATOR))
    return NotImplementedError(f"{label(node)} is not supported; expected {kinds}, or nodes that only read constants")


def _identity(node: NodeProto, values: Mapping[str, Array]) -> Mapping[str, Array]:
    return {node.output[0]: values[node.input[0]]}


def _by_name(inputs: object, names: Sequence[str], optional: Collection[str] = ()) -> dict[str, Array]:
    """Inputs as a dict of arrays, checked. It has all of ``names``; a mapping may also have any of ``optional``."""
    expected = f"{len(names)} NumPy arrays: {', '.join(names)}"
    if isinstance(inputs, Mapping):
        arrays = dict(inputs)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)):
        if len(inputs) != len(names):
            raise ValueError(f"inputs must be {expected}; got {len(inputs)}")
        arrays = dict(zip(names, inputs, strict=True))
    else:
        raise TypeError(f"inputs must be {expected}; got {type(inputs).__name__}")
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"inputs must be {expected}; missing {', '.join(missing)}")
    for name, value in arrays.items():
        if name not in names and name not in optional:
            raise ValueError(f"inputs must be {expected}; got {name!r}")
        check_is_array(f"inputs: {name}", value)
    return arrays


def _named(names: tuple[str, ...], values: Sequence[Array]) -> tuple[Array, ...]:
    """The values as a tuple that can also be indexed by name."""
    outputs: tuple[Array, ...] = onnx.backend.base.namedtupledict("Outputs", names)(*values)
    return outputs
