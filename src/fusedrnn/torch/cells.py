"""RNNCell, LSTMCell and GRUCell: torch.nn's cells as single steps of the fused operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import RNNCellBase

from fusedrnn.torch import autocast, class_map, dispatch, eager, eligibility
from fusedrnn.torch.formats import HasCompute
from fusedrnn.torch.graphs import as_fx_node, is_fx_proxy
from fusedrnn.torch.plan import ModulePlan, cell_plan, current_weights, initial_states, spec_of
from fusedrnn.torch.repeated_call import RepeatsCalls


class _FusedCell(HasCompute, RepeatsCalls, RNNCellBase):
    """Base of the three cells. Calls that the operator does not support go to torch.nn, which raises the errors."""

    _mode: Any
    __prepare_scriptable__ = class_map.as_torch_module  # torch.jit.script compiles torch.nn's cell

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run one step as torch.nn's cell does.

        Args:
            input: (N, I), or (I,).
            hx: The state (N, H), or (H,) for unbatched input; for an LSTM, a pair of such tensors; None for zeros.

        Returns:
            The next state, or for an LSTM the pair of next states.

        Raises:
            ValueError: As torch.nn raises it.
            RuntimeError: As torch.nn raises it.
        """
        repeated = self._repeat_call(input, hx)
        if repeated is not None:
            return repeated
        run = dispatch.runner()
        if run is not None:
            if autocast.is_enabled():
                states = autocast.forward(self, self._step, run, input, hx)
            else:
                states = self._step(run, input, hx)
                if states is not None:
                    self._note_call(run, input, hx)
            if states is not None:
                return states if len(states) > 1 else states[0]
        if is_fx_proxy(input):
            return as_fx_node(self, _FusedCell.forward, input, hx)
        return super().forward(input, hx)

    def _run_repeated(self, run: dispatch.Run, x: Any, states: tuple[Any, ...] | None) -> Any:
        final = run(x, states)[1]
        return final if len(final) > 1 else final[0]

    def _plan(self, dtype: torch.dtype, compute: str | None = None) -> ModulePlan | None:
        return cell_plan(self._mode, self.input_size, self.hidden_size, self.bias, dtype, compute or self.compute)

    def _step(self, run: dispatch.Run, x: Any, hx: Any, compute: str | None = None) -> tuple[Tensor, ...] | None:
        """The next states; None if the operator does not support the call. ``compute`` replaces our own."""
        dtype = eligibility.operator_dtype(x)
        if dtype is None:
            return None
        plan, shape = self._plan(dtype, compute), x.shape
        batched = len(shape) == 2
        if plan is None or not (batched or len(shape) == 1) or shape[-1] != self.input_size or 0 in shape:
            return None
        states = None
        if hx is not None:
            states = initial_states(hx, plan, shape[:-1], dtype)
            if states is None:
                return None
        spec, weights = spec_of(plan, self.training), current_weights(self, plan, dtype)
        if spec is None or weights is None:
            return None
        recurrent: Any = weights[1]
        if dispatch.is_eager(run) and torch.is_grad_enabled() and recurrent.is_inference():
            return None  # created in inference mode: torch.nn's operations record the gradients that they can
        if run is eager.run and dtype in eligibility.DTYPE_NAMES:
            return eager.run_cell(spec, x, states, weights)[1]
        if batched:
            final = run(spec, x.unsqueeze(0), states and tuple(h.unsqueeze(0) for h in states), weights)[1]
        else:
            final = run(spec, x[None, None], states and tuple(h[None, None] for h in states), weights)[1]
        final = tuple([dispatch.without_first_axis(state, run) for state in final])
        return final if batched else tuple(state.squeeze(0) for state in final)


class RNNCell(_FusedCell, torch.nn.RNNCell):
    """``torch.nn.RNNCell`` on the fused operator: same arguments, attributes, parameters and results.

    Example:
        >>> cell = RNNCell(10, 20, nonlinearity="relu")
        >>> h = cell(torch.randn(3, 10))  # (3, 20)
    """

    @property
    def _mode(self) -> str:
        return f"rnn_{self.nonlinearity}"


class LSTMCell(_FusedCell, torch.nn.LSTMCell):
    """``torch.nn.LSTMCell`` on the fused operator: same arguments, attributes, parameters and results.

    Example:
        >>> cell = LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))  # (3, 20) each
    """

    _mode = "lstm"


class GRUCell(_FusedCell, torch.nn.GRUCell):
    """``torch.nn.GRUCell`` on the fused operator: same arguments, attributes, parameters and results.

    Example:
        >>> cell = GRUCell(10, 20)
        >>> h = cell(torch.randn(3, 10))  # (3, 20)
    """

    _mode = "gru"


class_map.register(RNNCell, LSTMCell, GRUCell)
