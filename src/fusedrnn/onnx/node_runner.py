"""Runs one recurrent node on arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from fusedrnn.arrays import Array
from fusedrnn.frozen_array import frozen
from fusedrnn.onnx.attributes import parse
from fusedrnn.onnx.graph import errors_name_node, inputs_of, label
from fusedrnn.onnx.weight_layout import COMPUTED, WEIGHTS, check_same_format, format_of, from_onnx, state_of
from fusedrnn.op import validation
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.quantized_params import QuantizedParams

_OUTPUTS = ("Y", "Y_h", "Y_c")
# Ops with their parameters: one for the whole layer, or one for each direction.
_BoundOps = Sequence[tuple[RNNOp, Any]]


class NodeRunner:
    """A recurrent node. Its attributes are parsed once, and its weights are packed once if they are ``constants``.

    ``opset`` and ``ir_version`` are the model's versions of ONNX's operators and of the format.
    """

    def __init__(
        self, node: NodeProto, opset: int, ir_version: int, constants: Mapping[str, Array], backend: str | None
    ) -> None:
        self._node, self._backend = node, backend
        self._inputs = inputs_of(node)
        self._constant_weights: dict[str, Array] = {}
        self._packed: _BoundOps = ()
        with errors_name_node(label(node)):
            self._settings = parse(node, opset, ir_version)
            weights = {name: value for name, value in self._inputs.items() if name in WEIGHTS}
            if constants.keys() >= set(weights.values()):
                self._constant_weights = {name: constants[value] for name, value in weights.items()}
                # New ops rather than shared ones, since an op caches its packed weights.
                parts = from_onnx(self._settings, self._constant_weights)
                self._packed = [(RNNOp(part.spec, backend), _frozen(part.params)) for part in parts]

    def __call__(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the node's outputs, by name, from the model's values so far; errors as in ``PreparedModel.run``."""
        with errors_name_node(label(self._node)):
            inputs = {name: values[value] for name, value in self._inputs.items()}
            weights = {name: value for name, value in inputs.items() if name in WEIGHTS}
            bound_ops = self._packed
            if any(value is not self._constant_weights.get(name) for name, value in weights.items()):
                parts = from_onnx(self._settings, weights)
                bound_ops = [(RNNOp.get(part.spec, self._backend), part.params) for part in parts]
            outputs = self._run(bound_ops, inputs)
        return {value: output for value, output in zip(self._node.output, outputs, strict=False) if value}

    def _run(self, bound_ops: _BoundOps, inputs: Mapping[str, Array]) -> list[Array]:
        """Y, Y_h and for an LSTM Y_c, in the node's layout and number format."""
        spec = bound_ops[0][0].spec
        x = self._time_major_x(inputs, spec.input_size)
        T, N = x.shape[:2]
        H = spec.hidden_size
        lengths = inputs.get("sequence_lens")
        if lengths is not None and lengths.dtype != np.int32:
            raise TypeError(f"sequence_lens must be int32; got {lengths.dtype}")
        lengths = validation.check_lengths(lengths, T, N, "sequence_lens")
        names = [f"initial_{name}" for name in spec.state_names]
        states = {name: state_of(inputs, name, self._settings, H, N) for name in names if name in inputs}
        ys, finals = [], []
        for first, (op, params) in enumerate(bound_ops):
            D = op.spec.num_directions
            initial = [states[name][first : first + D] if name in states else None for name in names]
            y, final, _ = op.forward(x, params, initial if states else None, lengths=lengths)
            ys.append(y.reshape(T, N, D, H))
            finals.append(final)
        y = _joined(ys, axis=2)
        final_states = [_joined(parts, axis=0) for parts in zip(*finals, strict=True)]
        if self._settings.batch_first:
            results = [y.swapaxes(0, 1), *(state.swapaxes(0, 1) for state in final_states)]
        else:
            results = [y.swapaxes(1, 2), *final_states]
        return [_rounded(result, format_of(self._settings, inputs)) for result in results]

    def _time_major_x(self, inputs: Mapping[str, Array], input_size: int) -> Array:
        """X as (T, N, I), in the number format of the computation."""
        x, dtype = inputs["X"], format_of(self._settings, inputs)
        check_same_format("X", x, dtype)
        if x.ndim != 3 or x.shape[2] != input_size or 0 in x.shape:
            axes = "N, T" if self._settings.batch_first else "T, N"
            raise ValueError(f"X must have shape ({axes}, {input_size}), each at least 1; got {x.shape}")
        x = x.swapaxes(0, 1) if self._settings.batch_first else x
        return x.astype(COMPUTED[dtype], copy=False)


def _frozen(params: Any) -> Any:
    """The parameters in a form that an op need not check for changes."""
    return params if isinstance(params, QuantizedParams) else frozen(params)


def _joined(arrays: Sequence[Array], axis: int) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis)


def _rounded(value: Array, dtype: str) -> Array:
    """The value as a contiguous array in the node's number format."""
    if value.dtype.name == dtype:
        return np.ascontiguousarray(value)
    with np.errstate(over="ignore"):  # ONNX's Cast also turns an overflow into infinity
        return np.ascontiguousarray(value).astype(dtype)
