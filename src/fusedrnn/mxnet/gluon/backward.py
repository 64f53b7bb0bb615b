"""The gradients of one call of a layer."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.operands import GRAD_REQS
from fusedrnn.mxnet.backward import Backward, Buffers, GradReqs, by_name, check_sequence
from fusedrnn.mxnet.gluon.parameter import ParameterDict
from fusedrnn.op.reserve import Reserve
from fusedrnn.op.rnn_op import RNNOp

Layout = Literal["TNC", "NTC"]


class LayerBackward:
    """The gradients of one call of a layer in training.

    Gradients of parameters are stored by each parameter's ``grad_req``, and :meth:`Parameter.grad` returns them. A call
    returns the gradients of inputs and states.

    Attributes:
        arguments: The arguments whose gradients are returned: data and, if states were given, state and state_cell.
        seed: The seed of dropout's mask.
    """

    def __init__(self, params: ParameterDict, op: RNNOp, reserve: Reserve, layout: Layout, with_states: bool) -> None:
        self._params, self._layout, self._with_states = params, layout, with_states
        self._backward = Backward(op, reserve, with_states)
        self._shape = reserve.steps, reserve.batch
        self._input_size, self._output_size, self._dtype = op.spec.input_size, op.spec.output_size, op.spec.dtype
        self.arguments = "data", *(self._backward.arguments[2:] if with_states else ())
        self.seed = reserve.seed

    def __call__(self, out_grads: Any, grad_req: GradReqs = "write", args_grad: Buffers = None) -> dict[str, Array]:
        """Store the parameters' gradients; return those of inputs and states.

        Args:
            out_grads: The gradient of the output, in the layer's layout; if states were given, a pair of this gradient
                and a list of the gradients of the final states. None stands for zeros.
            grad_req: ``"write"``, ``"add"`` or ``"null"``: one for all of ``arguments``, a list with one for each, or a
                dict by name, where a missing name means ``"null"``. It does not apply to parameters, each of which has
                its own grad_req.
            args_grad: Buffers to write or add to instead of new arrays, as a list or a dict; None for a new array.

        Returns:
            The computed gradients by name, ``"data"`` (in the layer's layout), ``"state"`` and ``"state_cell"``.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected. Or
                if parameters request gradients and were cast since the call.
            ValueError: If an argument has the wrong shape or value; the message is of the same form.
        """
        if isinstance(grad_req, str):
            grad_reqs: dict[str, Any] = dict.fromkeys(self.arguments, grad_req)
        else:
            grad_reqs = dict(by_name("grad_req", grad_req, self.arguments, f"one of {', '.join(GRAD_REQS)}, or "))
        buffers = {} if args_grad is None else dict(by_name("args_grad", args_grad, self.arguments, "None, or "))
        buffers["data"] = self._as_time_major("args_grad: data", buffers.get("data"), self._input_size)
        upstream, common = self._upstream(out_grads), self._params.common_grad_req()
        dtype = self._params.store.spec.dtype
        if common != "null" and dtype != self._dtype:
            raise TypeError(f"the layer must have dtype {self._dtype}, as in the call of train; it was cast to {dtype}")
        grad_reqs["parameters"] = common or "write"
        if common in ("write", "add"):
            buffers["parameters"] = self._params.store.gradients()
        gradients = self._backward(upstream, grad_reqs, buffers)
        flat = gradients.pop("parameters", None)
        if common is None and flat is not None:
            for parameter in self._params.values():
                parameter.store_grad(flat)
        if "data" in gradients:
            gradients["data"] = time_major(gradients["data"], self._layout)
        return gradients

    def _upstream(self, out_grads: Any) -> Any:
        """The gradients in the operator's form: that of the output (T, N, D·S), and those of the states."""
        if not self._with_states or out_grads is None:
            return self._as_time_major("out_grads", out_grads, self._output_size)
        output, final = check_sequence("out_grads", out_grads, 2, "a pair: the output's, and a list of the states'")
        output = self._as_time_major("out_grads[0]", output, self._output_size)
        count = len(self.arguments) - 1
        if final is None:
            return [output, *[None] * count]
        final = [final] if isinstance(final, np.ndarray) else final
        return [output, *check_sequence("out_grads[1]", final, count, f"a list of {count} arrays")]

    def _as_time_major(self, name: str, value: Any, size: int) -> Any:
        """A time-major view of an array in the layer's layout; the op refuses other objects."""
        if not isinstance(value, np.ndarray):
            return value
        steps, batch = self._shape
        shape = (steps, batch, size) if self._layout == "TNC" else (batch, steps, size)
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, as layout {self._layout} has it; got {value.shape}")
        return time_major(value, self._layout)


def time_major(array: Array, layout: Layout) -> Array:
    """An array in that layout as a time-major view (T, N, C), or back."""
    return array if layout == "TNC" else array.swapaxes(0, 1)
