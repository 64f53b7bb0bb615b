"""The gradients of one call, by MXNet's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.operands import GRAD_REQS, GradReq, is_sequence, write_or_add
from fusedrnn.op import validation
from fusedrnn.op.grad_req import backward_operands
from fusedrnn.op.reserve import Reserve
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.scalars import check_choice

GradReqs = GradReq | Sequence[GradReq] | Mapping[str, GradReq]
Buffers = Mapping[str, Array | None] | Sequence[Array | None] | None
_STATES = {"h": "state", "c": "state_cell"}


class Backward:
    """Computes the gradients of one training call. It may be called any number of times.

    Attributes:
        arguments: The arguments that have gradients, in MXNet's order: data, parameters, state, state_cell (LSTM).
        seed: The seed of dropout's mask.
    """

    def __init__(self, op: RNNOp, reserve: Reserve, with_states: bool) -> None:
        self._op, self._reserve, self._with_states = op, reserve, with_states
        self._state_names = tuple(_STATES[name] for name in op.spec.state_names)
        self.arguments = ("data", "parameters", *self._state_names)
        self.seed = reserve.seed
        # From the names of arguments in errors of RNNOp.backward to MXNet's names.
        self._names = {"out: dx": "args_grad: data", "out: dparams": "args_grad: parameters", "dstates": "out_grads"}
        self._names["dy"] = "out_grads[0]" if with_states else "out_grads"
        for index, name in enumerate(op.spec.state_names, 1):
            self._names[f"out: d{name}0"] = f"args_grad: {_STATES[name]}"
            self._names[f"dstates: d{name}_n"] = f"out_grads[{index}]"

    def __call__(
        self,
        out_grads: Array | Sequence[Array | None] | None,
        grad_req: GradReqs = "write",
        args_grad: Buffers = None,
    ) -> dict[str, Array]:
        """The gradients of the call's arguments.

        Args:
            out_grads: The gradient of the output (T, N, D·S); if the call returned states, a sequence with a gradient
                for each returned array. None stands for zeros.
            grad_req: ``"write"``, ``"add"`` (to what the buffer in ``args_grad`` holds) or ``"null"`` (not computed).
                Give one for all, a list with one for each of ``arguments``, or a dict by name, where a missing name
                means ``"null"``.
            args_grad: Buffers to write or add to instead of new arrays: a list or a dict, with None or a missing name
                for a new array. Buffers must be aligned. The buffer of data must have its last axis contiguous; the
                others must be contiguous as a whole. No buffer may share memory with another, or with ``out_grads``.

        Returns:
            The computed gradients by name. In padding, the gradient of data is zero with ``"write"`` and unchanged with
            ``"add"``.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value; the message is of the same form.
        """
        dy, dstates = self._split(out_grads)
        grad_reqs = self._grad_reqs(grad_req)
        buffers = self._buffers(args_grad, grad_reqs)
        state_reqs = [grad_reqs[name] for name in self._state_names]
        state_buffers = tuple(buffers[name] for name in self._state_names)
        # RNNOp applies one request to all states.
        is_uniform = len(set(state_reqs)) == 1 and len({buffer is None for buffer in state_buffers}) == 1
        requests: dict[str, GradReq] = {"x": grad_reqs["data"], "params": grad_reqs["parameters"], "states": "write"}
        out = [buffers["data"], buffers["parameters"], None]
        if is_uniform:
            requests["states"] = state_reqs[0]
            out[2] = None if state_buffers[0] is None else state_buffers
        with validation.renamed(self._names):
            if not is_uniform:
                self._check_buffers(dy, dstates, requests, (*out[:2], state_buffers))
            dx, dparams, dinitial = self._op.backward(dy, dstates, self._reserve, grad_req=requests, out=out)
        gradients = {"data": dx, "parameters": dparams}
        for name, gradient in zip(self._state_names, dinitial or (), strict=False):
            gradients[name] = gradient if is_uniform else _store(gradient, buffers[name], grad_reqs[name])
        return {name: array for name, array in gradients.items() if array is not None}

    def _check_buffers(self, dy: Any, dstates: Any, requests: dict[str, GradReq], out: tuple[Any, ...]) -> None:
        """Check all buffers, including those of states, which the op does not get if the states' requests differ."""
        spec, reserve = self._op.spec, self._reserve
        pairs = zip(out[2], spec.state_shape(reserve.batch), strict=True)
        states = tuple(np.empty(shape, spec.dtype) if buffer is None else buffer for buffer, shape in pairs)
        backward_operands(spec, reserve.steps, reserve.batch, dy, dstates, requests, (*out[:2], states))

    def _split(self, out_grads: object) -> tuple[Any, Sequence[Any] | None]:
        """The gradient of the output, and of the final states if the call returned them."""
        if not self._with_states or out_grads is None:
            return out_grads, None
        count = 1 + len(self._state_names)
        expected = f"a sequence of {count}: those of the output, {', '.join(self._state_names)}"
        output, *final = check_sequence("out_grads", out_grads, count, expected)
        return output, tuple(final)

    def _grad_reqs(self, grad_req: object) -> dict[str, GradReq]:
        if isinstance(grad_req, str):
            return dict.fromkeys(self.arguments, check_choice("grad_req", grad_req, GRAD_REQS))
        by_argument = by_name("grad_req", grad_req, self.arguments, f"one of {', '.join(GRAD_REQS)}, or ")
        grad_reqs = {name: by_argument.get(name, "null") for name in self.arguments}
        return {name: check_choice(f"grad_req: {name}", value, GRAD_REQS) for name, value in grad_reqs.items()}

    def _buffers(self, args_grad: object, grad_reqs: Mapping[str, GradReq]) -> dict[str, Any]:
        by_argument = {} if args_grad is None else by_name("args_grad", args_grad, self.arguments, "None, or ")
        for name, request in grad_reqs.items():
            buffer = by_argument.get(name)
            if request == "add" and buffer is None:
                raise ValueError(f"args_grad: {name} must be given where grad_req is 'add'; got None")
            if request == "null" and buffer is not None:
                raise ValueError(
                    f"args_grad: {name} must be None where grad_req is 'null'; got {type(buffer).__name__}"
                )
        return {name: by_argument.get(name) for name in self.arguments}


def _store(gradient: Array, buffer: Array | None, grad_req: GradReq) -> Array | None:
    """The gradient, in its buffer if it has one; None if it was not requested."""
    if grad_req == "null":
        return None
    if buffer is None:
        return gradient
    write_or_add(buffer, gradient, grad_req == "add")
    return buffer


def check_sequence(name: str, value: object, length: int, expected: str) -> Sequence[Any]:
    """``value`` if it is a sequence of that length, which ``expected`` describes."""
    if not is_sequence(value):
        raise TypeError(f"{name} must be {expected}; got {type(value).__name__}")
    if len(value) != length:
        raise ValueError(f"{name} must be {expected}; got {len(value)}")
    return value


def by_name(name: str, value: object, keys: Sequence[str], other: str) -> Mapping[str, Any]:
    """A list or dict with one entry for each of ``keys``, as a mapping; errors name ``other`` as accepted too."""
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in keys]:
            raise ValueError(f"{name} must have keys among {', '.join(keys)}; got {unknown[0]!r}")
        return value
    expected = f"{other}a list or a dict of one for each of {', '.join(keys)}"
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be {expected}; got {type(value).__name__}")
    if len(value) != len(keys):
        raise ValueError(f"{name} must be {expected}; got {len(value)}")
    return dict(zip(keys, value, strict=True))
