"""Runs one recurrent node on arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from fusedrnn.frozen_array import frozen
from fusedrnn.onnx.attributes import Settings, parse
from fusedrnn.onnx.errors import errors_name_node, label
from fusedrnn.onnx.graph import inputs_of
from fusedrnn.onnx.weight_layout import COMPUTED, WEIGHTS, Array, check_same_format, convert_state, from_onnx, specs
from fusedrnn.op import validation
from fusedrnn.op.rnn_op import RNNOp

_OUTPUTS = ("Y", "Y_h", "Y_c")


@dataclass(frozen=True)
class _BoundOp:
    """An op with its parameters; it runs the node's directions from ``first_direction`` on."""

    op: RNNOp
    params: Array
    first_direction: int


class NodeRunner:
    """An LSTM, GRU or RNN node; parses its attributes once, and packs its weights once if they are constants.

    Args:
        node: The node.
        opset: The model's version of ONNX's operators.
        ir_version: The model's version of the format.
        constants: The model's constants, by name.
        backend: As in :class:`RNNOp`.
    """

    def __init__(
        self, node: NodeProto, opset: int, ir_version: int, constants: Mapping[str, Array], backend: str | None
    ) -> None:
        self._node, self._backend = node, backend
        self.inputs = inputs_of(node)
        self._packed: tuple[_BoundOp, ...] | None = None
        self._constant_weights: dict[str, Array] = {}
        with errors_name_node(label(node)):
            self.settings = parse(node, opset, ir_version)
            weights = [name for name in WEIGHTS if name in self.inputs]
            if all(self.inputs[name] in constants for name in weights):
                self._constant_weights = {name: constants[self.inputs[name]] for name in weights}
                self._packed = self._bind(self._constant_weights, constant=True)

    def _bind(self, weights: Mapping[str, Array], *, constant: bool) -> tuple[_BoundOp, ...]:
        """Ops with these weights. For constant weights the ops are new, since an op caches its packed weights."""
        bound_ops = []
        for direction, spec in enumerate(specs(self.settings, weights)):
            params = from_onnx(self.settings.kind, spec, direction, weights)
            op = RNNOp(spec, self._backend) if constant else RNNOp.get(spec, self._backend)
            bound_ops.append(_BoundOp(op, frozen(params) if constant else params, direction))
        return tuple(bound_ops)

    def __call__(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the node's outputs, by name, from the model's values so far; errors as of ``PreparedModel.run``."""
        with errors_name_node(label(self._node)):
            inputs = {name: values[value] for name, value in self.inputs.items()}
            weights = {name: value for name, value in inputs.items() if name in WEIGHTS}
            if self._packed is not None and all(weights[name] is self._constant_weights[name] for name in weights):
                bound_ops = self._packed
            else:
                bound_ops = self._bind(weights, constant=False)
            outputs = _run(self.settings, bound_ops, inputs)
        return {value: outputs[name] for value, name in zip(self._node.output, _OUTPUTS, strict=False) if value}


def _run(settings: Settings, bound_ops: Sequence[_BoundOp], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Y, Y_h and of an LSTM Y_c, in the node's layout and number format."""
    spec = bound_ops[0].op.spec
    dtype = inputs["W"].dtype.name
    x = _time_major_x(settings, inputs["X"], dtype, spec.input_size)
    T, N = x.shape[:2]
    H = spec.hidden_size
    lengths = _lengths(inputs.get("sequence_lens"), T, N)
    states = _states(settings, inputs, spec.state_names, dtype, (settings.num_directions, N, H))
    ys, finals = [], []
    for bound in bound_ops:
        first, D = bound.first_direction, bound.op.spec.num_directions
        initial = None if states is None else [state[first : first + D] for state in states]
        y, final, _ = bound.op.forward(x, bound.params, initial, lengths=lengths)
        ys.append(y.reshape(T, N, D, H))
        finals.append(final)
    y = _joined(ys, axis=2)
    final_states = [_joined(parts, axis=0) for parts in zip(*finals, strict=True)]
    if settings.batch_first:
        results = [y.swapaxes(0, 1), *(state.swapaxes(0, 1) for state in final_states)]
    else:
        results = [y.swapaxes(1, 2), *final_states]
    return dict(zip(_OUTPUTS, (_rounded(result, dtype) for result in results), strict=False))


def _joined(arrays: Sequence[Array], axis: int) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis)


def _time_major_x(settings: Settings, x: Array, dtype: str, input_size: int) -> Array:
    """X as (T, N, I), in the number format of the computation."""
    check_same_format("X", x, dtype)
    if x.ndim != 3 or x.shape[2] != input_size or 0 in x.shape:
        axes = "N, T" if settings.batch_first else "T, N"
        raise ValueError(f"X must have shape ({axes}, {input_size}), each at least 1; got {x.shape}")
    x = x.swapaxes(0, 1) if settings.batch_first else x
    return x.astype(COMPUTED[dtype], copy=False)


def _lengths(lengths: Array | None, steps: int, batch: int) -> Array | None:
    if lengths is not None and lengths.dtype != np.int32:
        raise TypeError(f"sequence_lens must be int32; got {lengths.dtype}")
    return validation.check_lengths(lengths, steps, batch, "sequence_lens")


def _states(
    settings: Settings, inputs: Mapping[str, Array], names: Sequence[str], dtype: str, shape: tuple[int, int, int]
) -> list[Array] | None:
    """The initial states (D, N, H), zeros for an omitted one; None if all are omitted."""
    if not any(f"initial_{name}" in inputs for name in names):
        return None
    return [
        convert_state(name, inputs[name], settings, dtype, shape)
        if name in inputs
        else np.zeros(shape, COMPUTED[dtype])
        for name in (f"initial_{name}" for name in names)
    ]


def _rounded(value: Array, dtype: str) -> Array:
    """The value as a contiguous array in the node's number format."""
    if value.dtype.name == dtype:
        return np.ascontiguousarray(value)
    with np.errstate(over="ignore"):  # ONNX's Cast makes infinity of an overflow, too
        return np.ascontiguousarray(value).astype(dtype)
