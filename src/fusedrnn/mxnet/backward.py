"""The gradients of one call, asked for and named as MXNet does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusedrnn.engines.operands import GRAD_REQS, GradReq, write_or_add
from fusedrnn.op import validation
from fusedrnn.op.reserve import Reserve
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.spec import Array

Asked = GradReq | Sequence[GradReq] | Mapping[str, GradReq]
Buffers = Mapping[str, Array | None] | Sequence[Array | None] | None
_STATES = {"h": "state", "c": "state_cell"}


class Backward:
    """The gradients of one call in training, which keeps what they need; call it as often as they are wanted.

    Attributes:
        arguments: What has gradients, in MXNet's order: data, parameters, state and, for an LSTM, state_cell.
        seed: What says which elements dropout dropped.
    """

    def __init__(self, op: RNNOp, reserve: Reserve, with_states: bool) -> None:
        self._op, self._reserve, self._with_states = op, reserve, with_states
        self._state_names = tuple(_STATES[name] for name in op.spec.state_names)
        self.arguments = ("data", "parameters", *self._state_names)
        self.seed = reserve.seed

    def __call__(
        self,
        out_grads: Array | Sequence[Array | None] | None,
        grad_req: Asked = "write",
        args_grad: Buffers = None,
    ) -> dict[str, Array]:
        """The gradients of the call's arguments.

        Args:
            out_grads: The gradient of the output (T, N, D·S); if the call returned states, a sequence of one for each
                of what it returned. None stands for zeros.
            grad_req: ``"write"``, ``"add"`` (to what the buffer in ``args_grad`` holds) or ``"null"`` (not wanted):
                one for all, a list of one for each of ``arguments``, or a dict by name, where what is not there is
                not wanted.
            args_grad: Buffers to write or add to instead of new arrays, as a list or a dict, None or missing for
                none. They must be aligned, the last axis of that of data and all of the others contiguous; none may
                share memory with another, nor with ``out_grads``.

        Returns:
            The gradients that are wanted, by name. That of data is zero in padding when written and untouched there
            when added to.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise.
        """
        dy, dstates = self._split(out_grads)
        asked = self._requests(grad_req)
        buffers = self._buffers(args_grad, asked)
        given = {"out_grads": [one for one in (dy, *(dstates or ())) if isinstance(one, np.ndarray)]}
        states = {name: asked[name] for name in self._state_names}
        alike = len(set(states.values())) == 1 and len({buffers[name] is None for name in states}) == 1
        if not alike:
            self._check(states, buffers, given)
        common = next(iter(states.values())) if alike else "write"
        direct = tuple(buffers[name] for name in states)
        into = (buffers["data"], buffers["parameters"], direct if alike and direct[0] is not None else None)
        requests: dict[str, GradReq] = {"x": asked["data"], "params": asked["parameters"], "states": common}
        with validation.renamed(self._renamed):
            dx, dparams, dinitial = self._op.backward(dy, dstates, self._reserve, grad_req=requests, out=into)
        found = {"data": dx, "parameters": dparams, **dict(zip(states, dinitial or (None,) * 2, strict=False))}
        if not alike:
            self._deliver(states, buffers, found)
        return {name: array for name, array in found.items() if array is not None}

    @property
    def _renamed(self) -> dict[str, str]:
        """What RNNOp.backward calls its arguments, and what they are called here."""
        names = {"out: dx": "args_grad: data", "out: dparams": "args_grad: parameters", "dstates": "out_grads"}
        names["dy"] = "out_grads[0]" if self._with_states else "out_grads"
        for place, name in enumerate(self._op.spec.state_names, 1):
            names[f"out: d{name}0"] = f"args_grad: {_STATES[name]}"
            names[f"dstates: d{name}_n"] = f"out_grads[{place}]"
        return names

    def _split(self, out_grads: object) -> tuple[Any, Sequence[Any] | None]:
        """The gradients of the output and, if there are any, of the final states."""
        if not self._with_states or out_grads is None:
            return out_grads, None
        count = 1 + len(self._state_names)
        wanted = f"a sequence of {count}: those of the output, {', '.join(self._state_names)}"
        if isinstance(out_grads, (np.ndarray, str, bytes)) or not isinstance(out_grads, Sequence):
            raise TypeError(f"out_grads must be {wanted}; got {type(out_grads).__name__}")
        if len(out_grads) != count:
            raise ValueError(f"out_grads must be {wanted}; got {len(out_grads)}")
        return out_grads[0], tuple(out_grads[1:])

    def _requests(self, grad_req: object) -> dict[str, GradReq]:
        if isinstance(grad_req, str):
            return dict.fromkeys(self.arguments, _request("grad_req", grad_req))
        given = by_name("grad_req", grad_req, self.arguments, f"one of {', '.join(GRAD_REQS)}, or ")
        return {name: _request(f"grad_req: {name}", given.get(name, "null")) for name in self.arguments}

    def _buffers(self, args_grad: object, asked: Mapping[str, GradReq]) -> dict[str, Any]:
        given = {} if args_grad is None else by_name("args_grad", args_grad, self.arguments, "None, or ")
        for name, request in asked.items():
            buffer = given.get(name)
            if request == "add" and buffer is None:
                raise ValueError(f"args_grad: {name} must be given where grad_req is 'add'; got None")
            if request == "null" and buffer is not None:
                raise ValueError(
                    f"args_grad: {name} must be None where grad_req is 'null'; got {type(buffer).__name__}"
                )
        return {name: given.get(name) for name in self.arguments}

    def _check(
        self, states: Mapping[str, GradReq], buffers: Mapping[str, Any], given: Mapping[str, Sequence[Array]]
    ) -> None:
        """Refuse buffers of states that the op is not going to see: it treats all states alike."""
        spec = self._op.spec
        taken = dict(given)
        for name in ("data", "parameters"):
            if isinstance(buffers[name], np.ndarray):
                taken[f"args_grad: {name}"] = (buffers[name],)
        for name, shape in zip(states, spec.state_shape(self._reserve.batch), strict=True):
            if buffers[name] is None:
                continue
            buffer = validation.check_buffer(f"args_grad: {name}", buffers[name], spec, shape)
            if not buffer.flags.c_contiguous:
                raise ValueError(f"args_grad: {name} must be contiguous; got strides {buffer.strides}")
            validation.check_no_alias(f"args_grad: {name}", buffer, taken)
            taken[f"args_grad: {name}"] = (buffer,)

    @staticmethod
    def _deliver(states: Mapping[str, GradReq], buffers: Mapping[str, Any], found: dict[str, Array | None]) -> None:
        """Put the gradients of states that were asked for differently where each is wanted."""
        for name, request in states.items():
            gradient, buffer = found[name], buffers[name]
            if request == "null":
                found[name] = None
            elif buffer is not None and gradient is not None:
                write_or_add(buffer, gradient, request == "add")
                found[name] = buffer


def by_name(what: str, value: object, names: Sequence[str], other: str) -> Mapping[str, Any]:
    """A list or a dict of something for each of ``names``, as a dict; ``other`` says what else it might have been."""
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in names]:
            raise ValueError(f"{what} must have keys among {', '.join(names)}; got {unknown[0]!r}")
        return value
    wanted = f"{other}a list or a dict of one for each of {', '.join(names)}"
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{what} must be {wanted}; got {type(value).__name__}")
    if len(value) != len(names):
        raise ValueError(f"{what} must be {wanted}; got {len(value)}")
    return dict(zip(names, value, strict=True))


def _request(name: str, value: object) -> GradReq:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(GRAD_REQS)}; got {type(value).__name__}")
    if value not in GRAD_REQS:
        raise ValueError(f"{name} must be one of {', '.join(GRAD_REQS)}; got {value!r}")
    return value
