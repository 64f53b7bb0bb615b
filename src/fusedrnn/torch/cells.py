"""The cells: torch.nn's, one step of the fused operator at a time."""

from __future__ import annotations

from typing import Any

from torch.nn import RNNCellBase

import torch
from fusedrnn.torch import class_map as pairs
from fusedrnn.torch import eager as call
from fusedrnn.torch import eligibility as dispatch
from fusedrnn.torch import outputs, support
from torch import Tensor


class _FusedCell(RNNCellBase):
    """What the three cells share. Anything out of the ordinary goes to torch.nn, whose errors are right."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run one step as torch.nn's cell does.

        Args:
            input: (N, I), or (I,).
            hx: The state (N, H), or (H,) for unbatched input; for an LSTM a pair of them; None: zeros.

        Returns:
            The next state, or the pair of them.

        Raises:
            ValueError: As torch.nn raises it.
            RuntimeError: As torch.nn raises it.
        """
        run = dispatch.runner()
        if run is not None:
            states = self._step(run, input, hx)
            if states is not None:
                return self._final(states)
        if support.is_proxy(input):
            return support.leaf(self, input, hx)
        return super().forward(input, hx)

    def _mode(self) -> str:
        raise NotImplementedError

    def _given(self, hx: Any) -> tuple[Any, ...] | None:
        """The states as a tuple, if there are as many as there should be."""
        return (hx,)

    def _final(self, states: tuple[Tensor, ...]) -> Any:
        return states[0]

    def _step(self, run: dispatch.Run, x: Any, hx: Any) -> tuple[Tensor, ...] | None:
        """The next states; None if the call is not the operator's."""
        dtype = support.number_format(x)
        if dtype is None:
            return None
        # Caches are no place for a compiler.
        make = support.traced_cell_plan if torch.compiler.is_compiling() else support.cell_plan
        plan, shape = make(self._mode(), self.input_size, self.hidden_size, self.bias, dtype), x.shape
        batched = len(shape) == 2
        if plan is None or not (batched or len(shape) == 1) or shape[-1] != self.input_size or 0 in shape:
            return None
        states = None
        if hx is not None:
            states = self._given(hx)
            if states is None:
                return None
            wanted = (shape[0], self.hidden_size) if batched else (self.hidden_size,)
            for state in states:
                if not support.plain(state, dtype) or state.shape != wanted:
                    return None
        weights = support.current_weights(self, plan, dtype)
        if weights is None:
            return None
        recurrent: Any = weights[1]
        if run is call.run and torch.is_grad_enabled() and recurrent.is_inference():
            return None  # built in inference mode: torch.nn's operations record as much as they can
        if batched:
            final = run(plan.spec, x.unsqueeze(0), states and tuple(h.unsqueeze(0) for h in states), weights)[1]
        else:
            final = run(plan.spec, x[None, None], states and tuple(h[None, None] for h in states), weights)[1]
        final = tuple([outputs.one_step(state, run) for state in final])
        return final if batched else tuple(state.squeeze(0) for state in final)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch.jit.script compiles: torch.nn's cell, with the same parameters."""
        return pairs.twin(self)


class RNNCell(_FusedCell, torch.nn.RNNCell):
    """``torch.nn.RNNCell`` on the fused operator: same arguments, attributes, parameters and results.

    Example:
        >>> cell = RNNCell(10, 20, nonlinearity="relu")
        >>> h = cell(torch.randn(3, 10))  # (3, 20)
    """

    def _mode(self) -> str:
        return f"rnn_{self.nonlinearity}"


class LSTMCell(_FusedCell, torch.nn.LSTMCell):
    """``torch.nn.LSTMCell`` on the fused operator: same arguments, attributes, parameters and results.

    Example:
        >>> cell = LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))  # (3, 20) each
    """

    def _mode(self) -> str:
        return "lstm"

    def _given(self, hx: Any) -> tuple[Any, ...] | None:
        return tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == 2 else None

    def _final(self, states: tuple[Tensor, ...]) -> Any:
        return states


class GRUCell(_FusedCell, torch.nn.GRUCell):
    """``torch.nn.GRUCell`` on the fused operator: same arguments, attributes, parameters and results.

    Example:
        >>> cell = GRUCell(10, 20)
        >>> h = cell(torch.randn(3, 10))  # (3, 20)
    """

    def _mode(self) -> str:
        return "gru"


pairs.pair(RNNCell, LSTMCell, GRUCell)
