"""A recurrent layer that ONNX Runtime calls: it checks the shapes of a call, prepares repeated calls, or runs one."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.frozen_array import frozen
from fusedrnn.onnx.ort.layer_job import LayerJob
from fusedrnn.onnx.ort.op_kernel import CALL, IN_MACHINE_CODE, IN_PYTHON, MAX_AXES, MAX_INPUTS, OPERATOR
from fusedrnn.onnx.weights_io import Layer
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.op.validation import check_lengths
from fusedrnn.quantized_params import QuantizedParams
from fusedrnn.runtime.thread_pool import thread_limits

_SHAPE_WORDS = 1 + MAX_AXES


class _Call(NamedTuple):
    """A call of the kernel: shapes of the inputs, and addresses of inputs and outputs, by name."""

    shapes: Mapping[str, tuple[int, ...]]
    addresses: Mapping[str, int]
    has_slot: bool


class LayerRunner:
    """A layer for ONNX Runtime. Any number of threads may call it at once.

    Args:
        layer: The layer, in float32 or quantized, with X time-major.
        inputs: The names of the inputs that a call has, from X, sequence_lens, initial_h and initial_c.
        outputs: The names of the outputs, Y first.
        num_threads: The most threads of a call.
    """

    def __init__(self, layer: Layer, inputs: Sequence[str], outputs: Sequence[str], num_threads: int) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._ops = [RNNOp(part.spec, "cpu") for part in layer.parts]
        self._params = [
            part.params if isinstance(part.params, QuantizedParams) else frozen(part.params) for part in layer.parts
        ]
        spec = layer.parts[0].spec
        self.input_size, self.hidden_size = spec.input_size, spec.hidden_size
        self.directions = sum(part.spec.num_directions for part in layer.parts)
        self._states = [f"initial_{name}" for name in spec.state_names]
        self._slot: list[object] = []  # the objects that the slot refers to
        self._job: LayerJob | None = None
        self.set_num_threads(num_threads)

    def set_num_threads(self, num_threads: int) -> None:
        """Set the most threads of a call. This does not change calls that are already prepared."""
        self._num_threads = num_threads
        if len(self._ops) == 1:  # a layer with a spec for each direction is two jobs
            self._job = LayerJob(self._ops[0], self._params[0], num_threads)

    def check(self, call: int, operator: Array) -> int:
        """Check the shapes of a call. If the call has the operator's slot, prepare the slot to repeat it.

        Returns:
            How the call goes on, one of :data:`fusedrnn.onnx.ort.op_kernel.MODES`.

        Raises:
            ValueError: If a shape is wrong; the message names the input, its shape and what was expected.
        """
        words = _words(call)
        shapes, _, has_slot = self._read(words)
        self._check_shapes(shapes)
        if not has_slot:
            return IN_PYTHON
        mode = IN_PYTHON
        for name, value in (("mode", mode), ("min_steps", shapes["X"][0]), ("max_steps", shapes["X"][0])):
            operator[OPERATOR.index[name]] = value
        if self._job is not None:
            steps, batch, _ = shapes["X"]
            slot = self._job.fill_slot(operator, steps, batch, (self.inputs, self.outputs))
            if slot is not None:
                self._slot = slot
                operator[OPERATOR.index["mode"]] = mode = IN_MACHINE_CODE
        first = OPERATOR.index["known ndim of 0"]
        operator[first : first + MAX_INPUTS * _SHAPE_WORDS] = words[: MAX_INPUTS * _SHAPE_WORDS]
        return mode

    def run(self, call: int) -> None:
        """Run a call that :meth:`check` has accepted.

        Raises:
            ValueError: If a length of a sequence is not from 0 to T.
        """
        shapes, addresses, _ = self._read(_words(call))
        steps, batch, _ = shapes["X"]
        lengths = None
        if "sequence_lens" in shapes:
            lengths = _view(addresses["sequence_lens"], (batch,), np.int32)
            lengths = check_lengths(lengths, steps, batch, "sequence_lens")
        states = {name: (self.directions, batch, self.hidden_size) for name in self.outputs if name != "Y"}
        outputs = {name: _view(addresses[name], shape) for name, shape in states.items()}
        outputs["Y"] = _view(addresses["Y"], (steps, self.directions, batch, self.hidden_size))
        if self._job is not None:
            if lengths is not None:
                outputs["Y"][:] = 0
            self._job.run(steps, batch, addresses, lengths)
        else:
            inputs = {name: _view(addresses[name], shapes[name]) for name in shapes if name != "sequence_lens"}
            self._run_parts(inputs, outputs, lengths)
        if lengths is not None:
            for name in states:
                outputs[name][:, lengths == 0] = 0  # as ONNX Runtime does

    def _read(self, words: Sequence[int]) -> _Call:
        shapes = {}
        for number, name in enumerate(self.inputs):
            ndim, *sizes = words[number * _SHAPE_WORDS : (number + 1) * _SHAPE_WORDS]
            shapes[name] = (*sizes[:ndim], *[-1] * (ndim - MAX_AXES))  # -1 for further axes: unknown, and an error
        first_input, first_output = CALL.index["input0"], CALL.index["output0"]
        addresses = {name: words[first_input + number] for number, name in enumerate(self.inputs)}
        addresses |= {name: words[first_output + number] for number, name in enumerate(self.outputs)}
        return _Call(shapes, addresses, bool(words[CALL.index["has_slot"]]))

    def _check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        x = shapes["X"]
        if len(x) != 3 or x[2] != self.input_size or 0 in x:
            raise ValueError(f"X must have shape (T, N, {self.input_size}), each at least 1; got {x}")
        state_shape = self.directions, x[1], self.hidden_size
        for name, shape in {**dict.fromkeys(self._states, state_shape), "sequence_lens": (x[1],)}.items():
            if name in shapes and shapes[name] != shape:
                raise ValueError(f"{name} must have shape {shape}; got {shapes[name]}")

    def _run_parts(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], lengths: Array | None) -> None:
        """Run the operator once for each direction, each with its own spec."""
        x = inputs["X"]
        for direction, (op, params) in enumerate(zip(self._ops, self._params, strict=True)):
            part = slice(direction, direction + 1)
            initial = [inputs[name][part] if name in inputs else None for name in self._states]
            with thread_limits(self._num_threads):
                y, final, _ = op.forward(x, params, initial, lengths=lengths)
            outputs["Y"][:, direction] = y
            for name, state in zip(("Y_h", "Y_c"), final, strict=False):
                if name in outputs:
                    outputs[name][part] = state


def _words(call: int) -> Sequence[int]:
    """The struct of a call as integers."""
    return list((ctypes.c_int64 * len(CALL)).from_address(call))


def _view(where: int, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    """The memory at an address as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, (ctypes.c_char * size).from_address(where))
