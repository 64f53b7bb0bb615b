"""The gradients of one call, grad_reqs for and named as MXNet does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusedrnn.engines.operands import GRAD_REQS, GradReq, write_or_add
from fusedrnn.op import validation
from fusedrnn.op.reserve import Reserve
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.scalars import check_choice
from fusedrnn.spec import Array

GradReqs = GradReq | Sequence[GradReq] | Mapping[str, GradReq]
Buffers = Mapping[str, Array | None] | Sequence[Array | None] | None
_STATES = {"h": "state", "c": "state_cell"}


class Backward:
    """Computes the gradients of one training call, as often as it is called.

    Attributes:
        arguments: The arguments that have gradients, in MXNet's order: data, parameters, state, state_cell (LSTM).
        seed: The seed of dropout's mask.
    """

    def __init__(self, op: RNNOp, reserve: Reserve, with_states: bool) -> None:
        self._op, self._reserve, self._with_states = op, reserve, with_states
        self._state_names = tuple(_STATES[name] for name in op.spec.state_names)
        self.arguments = ("data", "parameters", *self._state_names)
        self.seed = reserve.seed

    def __call__(
        self,
        out_grads: Array | Sequence[Array | None] | None,
        grad_req: GradReqs = "write",
        args_grad: Buffers = None,
    ) -> dict[str, Array]:
        """The gradients of the call's arguments.

        Args:
            out_grads: The gradient of the output (T, N, D·S); if the call returned states, a sequence of one for each
                of what it returned. None stands for zeros.
            grad_req: ``"write"``, ``"add"`` (to what the buffer in ``args_grad`` holds) or ``"null"`` (not computed):
                one for all, a list of one for each of ``arguments``, or a dict by name, where a missing name means
                ``"null"``.
            args_grad: Buffers to write or add to instead of new arrays, as a list or a dict, None or missing for
                none. They must be aligned, the last axis of that of data and all of the others contiguous; none may
                share memory with another, nor with ``out_grads``.

        Returns:
            The computed gradients by name. That of data is zero in padding when written and untouched there
            when added to.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise.
        """
        dy, dstates = self._split(out_grads)
        grad_reqs = self._requests(grad_req)
        buffers = self._buffers(args_grad, grad_reqs)
        inputs = {"out_grads": [array for array in (dy, *(dstates or ())) if isinstance(array, np.ndarray)]}
        states = {name: grad_reqs[name] for name in self._state_names}
        is_uniform = len(set(states.values())) == 1 and len({buffers[name] is None for name in states}) == 1
        if not is_uniform:
            self._check(states, buffers, inputs)
        state_req = next(iter(states.values())) if is_uniform else "write"
        state_buffers = tuple(buffers[name] for name in states)
        use_state_buffers = is_uniform and state_buffers[0] is not None
        out = (buffers["data"], buffers["parameters"], state_buffers if use_state_buffers else None)
        requests: dict[str, GradReq] = {"x": grad_reqs["data"], "params": grad_reqs["parameters"], "states": state_req}
        with validation.renamed(self._renamed):
            dx, dparams, dinitial = self._op.backward(dy, dstates, self._reserve, grad_req=requests, out=out)
        gradients = {"data": dx, "parameters": dparams, **dict(zip(states, dinitial or (None,) * 2, strict=False))}
        if not is_uniform:
            self._store_states(states, buffers, gradients)
        return {name: array for name, array in gradients.items() if array is not None}

    @property
    def _renamed(self) -> dict[str, str]:
        """MXNet's names of the arguments of RNNOp.backward, for errors."""
        names = {"out: dx": "args_grad: data", "out: dparams": "args_grad: parameters", "dstates": "out_grads"}
        names["dy"] = "out_grads[0]" if self._with_states else "out_grads"
        for place, name in enumerate(self._op.spec.state_names, 1):
            names[f"out: d{name}0"] = f"args_grad: {_STATES[name]}"
            names[f"dstates: d{name}_n"] = f"out_grads[{place}]"
        return names

    def _split(self, out_grads: object) -> tuple[Any, Sequence[Any] | None]:
        """The gradient of the output, and those of the final states if the call returned them."""
        if not self._with_states or out_grads is None:
            return out_grads, None
        count = 1 + len(self._state_names)
        expected = f"a sequence of {count}: those of the output, {', '.join(self._state_names)}"
        if isinstance(out_grads, (np.ndarray, str, bytes)) or not isinstance(out_grads, Sequence):
            raise TypeError(f"out_grads must be {expected}; got {type(out_grads).__name__}")
        if len(out_grads) != count:
            raise ValueError(f"out_grads must be {expected}; got {len(out_grads)}")
        return out_grads[0], tuple(out_grads[1:])

    def _requests(self, grad_req: object) -> dict[str, GradReq]:
        if isinstance(grad_req, str):
            return dict.fromkeys(self.arguments, check_choice("grad_req", grad_req, GRAD_REQS))
        by_argument = by_name("grad_req", grad_req, self.arguments, f"one of {', '.join(GRAD_REQS)}, or ")
        requests = {name: by_argument.get(name, "null") for name in self.arguments}
        return {name: check_choice(f"grad_req: {name}", value, GRAD_REQS) for name, value in requests.items()}

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

    def _check(
        self, states: Mapping[str, GradReq], buffers: Mapping[str, Any], inputs: Mapping[str, Sequence[Array]]
    ) -> None:
        """Check state buffers that the op does not see: it applies one request to all states."""
        spec = self._op.spec
        taken = dict(inputs)
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
    def _store_states(
        states: Mapping[str, GradReq], buffers: Mapping[str, Any], gradients: dict[str, Array | None]
    ) -> None:
        """Write or add each state's gradient to its own buffer, where the states' requests differ."""
        for name, request in states.items():
            gradient, buffer = gradients[name], buffers[name]
            if request == "null":
                gradients[name] = None
            elif buffer is not None and gradient is not None:
                write_or_add(buffer, gradient, request == "add")
                gradients[name] = buffer


def by_name(what: str, value: object, names: Sequence[str], other: str) -> Mapping[str, Any]:
    """A list or dict with one entry for each of ``names``, as a dict; ``other`` names what else is accepted."""
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in names]:
            raise ValueError(f"{what} must have keys among {', '.join(names)}; got {unknown[0]!r}")
        return value
    expected = f"{other}a list or a dict of one for each of {', '.join(names)}"
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{what} must be {expected}; got {type(value).__name__}")
    if len(value) != len(names):
        raise ValueError(f"{what} must be {expected}; got {len(value)}")
    return dict(zip(names, value, strict=True))
