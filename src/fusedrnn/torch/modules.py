"""The sequence modules: torch.nn's, on the fused operator."""

from __future__ import annotations

from typing import Any

from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import torch
from fusedrnn.torch import class_map as pairs
from fusedrnn.torch import dynamo as compiling
from fusedrnn.torch import eager as call
from fusedrnn.torch import eligibility as dispatch
from fusedrnn.torch import outputs, support
from fusedrnn.torch.eligibility import Run
from fusedrnn.torch.support import Plan
from torch import Tensor

States = tuple[Tensor, ...]


class _Fused(torch.nn.RNNBase):
    """What the three modules share. Anything out of the ordinary goes to torch.nn, whose errors are right."""

    def forward(self, input: Any, hx: Any = None, lengths: Any = None) -> Any:
        """Run over sequences as torch.nn's module does.

        Args:
            input: (T, N, I), or (N, T, I) if ``batch_first``, or (T, I), or a PackedSequence.
            hx: Initial state (L·D, N, size), or without N for unbatched input; for an LSTM a pair of them; None: zeros.
            lengths: How many steps of each sequence count, from 0 to T: integers (N,), a tensor on the CPU or a
                list; None for all. Needs batched input that is not packed.

        Returns:
            The output and the final states, each as torch.nn's module returns it. With ``lengths`` outputs are zero
            in the padding, and final states are those of each sequence's last step.

        Raises:
            TypeError: ``lengths`` are not integers, or as torch.nn raises it.
            ValueError: ``lengths`` are too many, too few or out of range, or as torch.nn raises it.
            RuntimeError: As torch.nn raises it.
        """
        if support.is_proxy(input):
            return support.leaf(self, input, hx, lengths)
        if lengths is not None:
            return self._padded(input, hx, lengths)
        run = dispatch.runner()
        if run is not None:
            fused = self._packed if isinstance(input, PackedSequence) else self._whole
            result = fused(run, input, hx)
            if result is not None:
                return result
        return self._theirs(input, hx)

    def _theirs(self, input: Any, hx: Any) -> Any:
        return compiling.eagerly(self, input, hx) if compiling.breaks() else super().forward(input, hx)

    def _plan(self, dtype: torch.dtype) -> Plan | None:
        # Caches are no place for a compiler.
        make = support.traced_plan if torch.compiler.is_compiling() else support.plan
        return make(
            self.mode, self.input_size, self.hidden_size, self.num_layers, self.bidirectional, self.bias,
            self.dropout, dtype, self.proj_size,
        )  # fmt: skip

    def _states(self, hx: Any, plan: Plan, batch: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...] | None:
        """The initial states as a tuple, if they are what the operator takes."""
        states = self._given(hx)
        for state, size in zip(states or (), plan.state_sizes, strict=False):
            if not support.plain(state, dtype) or state.shape != (plan.state_rows, *batch, size):
                return None
        return states

    def _given(self, hx: Any) -> tuple[Any, ...] | None:
        return (hx,)

    def _final(self, states: States) -> Any:
        return states[0]

    def _whole(self, run: Run, x: Any, hx: Any, lengths: Tensor | None = None) -> Any:
        """The same for a tensor; None if it is not the operator's."""
        dtype = support.number_format(x)
        if dtype is None:
            return None
        plan, shape = self._plan(dtype), x.shape
        batched = len(shape) == 3
        if plan is None or not (batched or len(shape) == 2) or shape[-1] != self.input_size or 0 in shape:
            return None
        states = None
        if hx is not None:
            batch = (shape[0 if self.batch_first else 1],) if batched else ()
            states = self._states(hx, plan, batch, dtype)
            if states is None:
                return None
            if not batched:
                states = tuple(state.unsqueeze(1) for state in states)
        if not batched:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        result = self._run(run, plan, dtype, x, states, lengths=lengths)
        if result is None:
            return None
        y, final = result
        if not batched:
            y, final = y.squeeze(1), tuple(state.squeeze(1) for state in final)
        elif self.batch_first:
            y = outputs.batch_first(y, run)
        return y, self._final(final)

    def _packed(self, run: Run, packed: PackedSequence, hx: Any) -> Any:
        """The same for a packed sequence."""
        x, batch_sizes, order, back = packed
        dtype = support.number_format(x)
        if dtype is None:
            return None
        plan, shape = self._plan(dtype), x.shape
        if plan is None or len(shape) != 2 or shape[1] != self.input_size:
            return None
        if not torch.compiler.is_compiling() and not support.checked_batch_sizes(batch_sizes, shape[0]):
            return None
        batch = support.packed_batch(batch_sizes, order, hx)
        if any(places is not None and places.shape != (batch,) for places in (order, back)):
            return None
        states = None
        if hx is not None:
            states = self._states(hx, plan, (batch,), dtype)
            if states is None:
                return None
            if order is not None:
                states = tuple(state.index_select(1, order) for state in states)
        elif torch.compiler.is_compiling():  # the operator in a graph cannot tell N from batch_sizes
            states = tuple([x.new_zeros((plan.state_rows, batch, size)) for size in plan.state_sizes])
        result = self._run(run, plan, dtype, x, states, batch_sizes=batch_sizes)
        if result is None:
            return None
        y, final = result
        if back is not None:
            final = tuple(state.index_select(1, back) for state in final)
        return PackedSequence(y, batch_sizes, order, back), self._final(final)

    def _run(
        self, run: Run, plan: Plan, dtype: torch.dtype, x: Tensor, states: States | None, **kind: Tensor | None
    ) -> tuple[Tensor, States] | None:
        spec = plan.dropping if self.training else plan.spec
        if spec is None:
            return None
        # Last of all: to read a parametrized weight is to compute it.
        weights = support.current_weights(self, plan, dtype)
        if weights is None:
            return None
        if spec.dropout and run is call.run:  # a graph draws its own at every run
            return run(spec, x, states, weights, **kind, seed=support.draw_seed())
        return run(spec, x, states, weights, **kind)

    def _padded(self, x: Any, hx: Any, lengths: Any) -> Any:
        """The same for padded sequences; where the operator cannot, torch.nn packs them."""
        lengths = support.checked_lengths(lengths, x, self.batch_first)
        run = dispatch.runner()
        result = None if run is None else self._whole(run, x, hx, lengths)
        if result is not None:
            return result
        packed = pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=False)
        y, final = self._theirs(packed, hx)
        steps = x.shape[1 if self.batch_first else 0]
        return pad_packed_sequence(y, self.batch_first, total_length=steps)[0], final

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch.jit.script compiles: torch.nn's module, with the same parameters.

        torch.jit.script puts it into the model in the place of ours; ``accelerate`` changes that again.
        """
        return pairs.twin(self)


class RNN(_Fused, torch.nn.RNN):
    """``torch.nn.RNN`` on the fused operator: same arguments, attributes, parameters and results.

    Its ``forward`` also takes ``lengths``, for padded sequences.

    Example:
        >>> net = RNN(10, 20, num_layers=2, nonlinearity="relu")
        >>> y, h_n = net(torch.randn(5, 3, 10), lengths=[5, 2, 4])  # (5, 3, 20), (2, 3, 20)
    """


class LSTM(_Fused, torch.nn.LSTM):
    """``torch.nn.LSTM`` on the fused operator: same arguments, attributes, parameters and results.

    Its ``forward`` also takes ``lengths``, for padded sequences.

    Example:
        >>> net = LSTM(10, 20, num_layers=2, bidirectional=True)
        >>> y, (h_n, c_n) = net(torch.randn(5, 3, 10))  # (5, 3, 40), (4, 3, 20) each
    """

    def _given(self, hx: Any) -> tuple[Any, ...] | None:
        return tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == 2 else None

    def _final(self, states: States) -> Any:
        return states


class GRU(_Fused, torch.nn.GRU):
    """``torch.nn.GRU`` on the fused operator: same arguments, attributes, parameters and results.

    Its ``forward`` also takes ``lengths``, for padded sequences.

    Example:
        >>> net = GRU(10, 20, batch_first=True)
        >>> y, h_n = net(torch.randn(3, 5, 10))  # (3, 5, 20), (1, 3, 20)
    """


pairs.pair(RNN, LSTM, GRU)
compiling.trace(RNN, LSTM, GRU)
