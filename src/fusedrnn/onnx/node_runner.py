"""A recurrent node ready to run on arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusedrnn.frozen_array import frozen
from fusedrnn.onnx.attributes import Settings, parse
from fusedrnn.onnx.errors import label, naming
from fusedrnn.onnx.graph import inputs_of
from fusedrnn.onnx.weight_layout import COMPUTED, WEIGHTS, Array, gather, number_format, same_format, specs
from fusedrnn.op import validation
from fusedrnn.op.rnn_op import RNNOp
from onnx import NodeProto

_OUTPUTS = ("Y", "Y_h", "Y_c")


@dataclass(frozen=True)
class _Pass:
    """An op with its parameters, for the node's directions from ``first`` on."""

    op: RNNOp
    params: Array
    first: int


class Recurrence:
    """A node LSTM, GRU or RNN: its attributes parsed, and its weights packed once if they are constants.

    Args:
        node: The node.
        opset: The model's version of ONNX's operators.
        ir_version: The model's.
        constants: Values that are known beforehand, by name.
        backend: As in :class:`RNNOp`.
    """

    def __init__(
        self, node: NodeProto, opset: int, ir_version: int, constants: Mapping[str, Array], backend: str | None
    ) -> None:
        self._node, self._backend = node, backend
        self.inputs = inputs_of(node)
        self._packed: tuple[_Pass, ...] | None = None
        self._constant: dict[str, Array] = {}
        with naming(label(node)):
            self.settings = parse(node, opset, ir_version)
            weights = [name for name in WEIGHTS if name in self.inputs]
            if all(self.inputs[name] in constants for name in weights):
                self._constant = {name: constants[self.inputs[name]] for name in weights}
                self._packed = self._passes(self._constant, keep=True)

    def _passes(self, weights: Mapping[str, Array], *, keep: bool) -> tuple[_Pass, ...]:
        """Ops and parameters; those to keep have an op, and so packed weights, of their own."""
        found = []
        for first, spec in enumerate(specs(self.settings, weights)):
            params = gather(self.settings.kind, spec, first, weights)
            op = RNNOp(spec, self._backend) if keep else RNNOp.get(spec, self._backend)
            found.append(_Pass(op, frozen(params) if keep else params, first))
        return tuple(found)

    def __call__(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs that the node has, by name, from all values known so far.

        Raises:
            TypeError: Naming node and input, what was given and what was expected.
            ValueError: Likewise.
            NotImplementedError: Naming the node and what no engine has of it.
        """
        with naming(label(self._node)):
            given = {name: values[value] for name, value in self.inputs.items()}
            weights = {name: value for name, value in given.items() if name in WEIGHTS}
            if self._packed is not None and all(weights[name] is self._constant[name] for name in weights):
                passes = self._packed
            else:
                passes = self._passes(weights, keep=False)
            made = _run(self.settings, passes, given)
        named = zip(self._node.output, _OUTPUTS, strict=False)
        return {value: made[name] for value, name in named if value}


def _run(settings: Settings, passes: Sequence[_Pass], given: Mapping[str, Array]) -> dict[str, Array]:
    """Y, Y_h and of an LSTM Y_c, in the shapes that the layout wants."""
    spec = passes[0].op.spec
    dtype = number_format("W", given["W"])
    x = _time_major(settings, given, spec.input_size)
    T, N = x.shape[:2]
    D, H = settings.num_directions, spec.hidden_size
    lengths = _lengths(given.get("sequence_lens"), T, N)
    states = _states(settings, given, spec.state_names, (D, N, H))
    outputs, finals = [], []
    for one in passes:
        count = one.op.spec.num_directions
        mine = None if states is None else [state[one.first : one.first + count] for state in states]
        y, final, _ = one.op.forward(x, one.params, mine, lengths=lengths)
        outputs.append(y.reshape(T, N, count, H))
        finals.append(final)
    joined = [outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=2)]
    joined += [column[0] if len(column) == 1 else np.concatenate(column) for column in zip(*finals, strict=True)]
    shaped = _shaped(joined, settings.batch_first)
    return dict(zip(_OUTPUTS, (_rounded(one, dtype) for one in shaped), strict=False))


def _time_major(settings: Settings, given: Mapping[str, Array], input_size: int) -> Array:
    """X as (T, N, I), in the format of the computation."""
    x = given["X"]
    axes = "(N, T, {})" if settings.batch_first else "(T, N, {})"
    same_format("X", x, given["W"].dtype.name)
    if x.ndim != 3 or x.shape[2] != input_size or 0 in x.shape:
        raise ValueError(f"X must have shape {axes.format(input_size)}, each at least 1; got {x.shape}")
    x = x.swapaxes(0, 1) if settings.batch_first else x
    return x.astype(COMPUTED[x.dtype.name], copy=False)


def _lengths(value: Array | None, steps: int, batch: int) -> Array | None:
    if value is not None and value.dtype != np.int32:
        raise TypeError(f"sequence_lens must be int32; got {value.dtype}")
    return validation.check_lengths(value, steps, batch, "sequence_lens")


def _states(
    settings: Settings, given: Mapping[str, Array], names: Sequence[str], shape: tuple[int, int, int]
) -> list[Array] | None:
    """The initial states (D, N, H), zeros for one that is left out; None if all are."""
    if not any(f"initial_{name}" in given for name in names):
        return None
    dtype = given["W"].dtype.name
    expected = (shape[1], shape[0], shape[2]) if settings.batch_first else shape
    found = []
    for name in names:
        state = given.get(f"initial_{name}")
        if state is None:
            state = np.zeros(expected, COMPUTED[dtype])
        else:
            same_format(f"initial_{name}", state, dtype)
        if state.shape != expected:
            raise ValueError(f"initial_{name} must have shape {expected}; got {state.shape}")
        state = state.swapaxes(0, 1) if settings.batch_first else state
        found.append(state.astype(COMPUTED[dtype], copy=False))
    return found


def _shaped(results: Sequence[Array], batch_first: bool) -> list[Array]:
    """From (T, N, D, H) and (D, N, H) to what the layout wants."""
    y, *final = results
    if batch_first:
        return [y.swapaxes(0, 1), *(state.swapaxes(0, 1) for state in final)]
    return [y.swapaxes(1, 2), *final]


def _rounded(value: Array, dtype: str) -> Array:
    """Contiguous, in the format of the node."""
    if value.dtype.name == dtype:
        return np.ascontiguousarray(value)
    with np.errstate(over="ignore"):  # infinity is what ONNX's Cast makes of it
        return np.ascontiguousarray(value).astype(dtype)
