"""RNN, LSTM and GRU: torch.nn's layers on the fused operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fusedrnn.torch import autocast, class_map, dispatch, dynamo, eager, eligibility
from fusedrnn.torch.dispatch import Run
from fusedrnn.torch.formats import HasCompute
from fusedrnn.torch.graphs import as_fx_node, is_fx_proxy
from fusedrnn.torch.input_forms import Call, States, run_packed, run_tensor
from fusedrnn.torch.plan import ModulePlan, as_ratio, current_weights, initial_states, layer_plan, spec_of
from fusedrnn.torch.repeated_call import RepeatsCalls
from fusedrnn.torch.resets import (
    checked_reset_states,
    checked_resets,
    forward_pieces,
    is_single_step,
    with_marked_replaced,
    zeros_like_states,
)


class FusedLayer(HasCompute, RepeatsCalls):
    """Base of all layers. Calls that the operator does not support run :meth:`composed_forward`."""

    mode: Any
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def forward(
        self, input: Any, hx: Any = None, lengths: Any = None, resets: Any = None, all_states: bool = False,
        reset_states: Any = None,
    ) -> Any:  # fmt: skip
        """Run over sequences as torch.nn's layer does.

        Args:
            input: (T, N, I), or (N, T, I) if ``batch_first``, or (T, I), or a PackedSequence.
            hx: Initial state (L·D, N, size), or without N for unbatched input; for an LSTM, a pair of such tensors;
                None for zeros.
            lengths: Valid steps of each sequence, integers (N,) from 0 to T, as a tensor on the CPU or a list; None for
                all steps. With lengths, the input must be batched and not packed.
            resets: Where sequences begin anew: bools (T, N), or (N, T) if ``batch_first``, or (T,) for unbatched input.
                At a marked step, the sequence starts from zero states or ``reset_states``, as in a separate call; a
                mark at step 0 replaces ``hx``. The marks divide a sequence into pieces, and the reverse direction runs
                over each piece from its end. For a packed sequence, the marks are in the order of the sequences before
                sorting. None for no marks.
            all_states: Whether to return the other states of every step of the last layer too. A tuple then stands in
                the place of the output, and its members have the form of the output: for an LSTM, the result is (y, c),
                (h_n, c_n).
            reset_states: The states after resets, like ``hx``; None for zeros.

        Returns:
            The output and the final states, each as torch.nn's layer returns it. With ``lengths``, outputs are zero in
            the padding, and final states are those of each sequence's last valid step.

        Raises:
            TypeError: If ``lengths`` are not integers, ``resets`` are no tensor of bools, or ``reset_states`` are no
                tensors; or as torch.nn raises it.
            ValueError: If ``lengths`` are too many, too few or out of range; if ``resets`` or ``reset_states`` have the
                wrong shape or dtype; if there are ``reset_states`` without ``resets``; or as torch.nn raises it.
            RuntimeError: As torch.nn raises it.
        """
        if is_fx_proxy(input):
            return as_fx_node(self, FusedLayer.forward, input, hx, lengths, resets, all_states or None, reset_states)
        if lengths is not None or resets is not None or all_states or reset_states is not None:
            return self._forward_varied(input, hx, lengths, resets, bool(all_states), reset_states)
        repeated = self._repeat_call(input, hx)
        if repeated is not None:
            return repeated
        run = dispatch.runner()
        if run is not None:
            forward = self._forward_packed if isinstance(input, PackedSequence) else self._forward_tensor
            if autocast.is_enabled():
                result = autocast.forward(self, forward, run, input, hx, None, None, False, None)
            else:
                result = forward(run, input, hx)
                if result is not None:
                    self._note_call(run, input, hx)
            if result is not None:
                return result
        return self._composed_forward(input, hx)

    def composed_forward(
        self, input: Any, hx: Any = None, lengths: Tensor | None = None, resets: Tensor | None = None,
        all_states: bool = False, reset_states: States | None = None,
    ) -> Any:  # fmt: skip
        """:meth:`forward` by PyTorch's own operations, which raise the errors. ``resets`` are time-major."""
        raise NotImplementedError

    def _composed_forward(self, *args: Any) -> Any:
        return dynamo.eager_forward(self, *args) if dynamo.breaks_graph() else self.composed_forward(*args)

    def _plan(self, dtype: torch.dtype, compute: str | None = None) -> ModulePlan | None:
        return layer_plan(
            self.mode, self.input_size, self.hidden_size, self.num_layers, self.bidirectional, self.bias,
            as_ratio(self.dropout), dtype, self.proj_size, compute or self.compute,
        )  # fmt: skip

    def _forward_tensor(
        self, run: Run, x: Any, hx: Any, lengths: Tensor | None = None, resets: Tensor | None = None,
        all_states: bool = False, reset_states: States | None = None, compute: str | None = None,
    ) -> Any:  # fmt: skip
        """The results for a tensor; None if the operator does not support the call. ``compute`` replaces our own."""
        dtype = eligibility.operator_dtype(x)
        if dtype is None:
            return None
        plan, shape = self._plan(dtype, compute), x.shape
        batched = len(shape) == 3
        if plan is None or not (batched or len(shape) == 2) or shape[-1] != self.input_size or 0 in shape:
            return None
        states = None
        if hx is not None:
            batch = (shape[0 if self.batch_first else 1],) if batched else ()
            states = initial_states(hx, plan, batch, dtype, reset_states)
            if states is None:
                return None

        def call(x: Tensor, states: States | None) -> tuple[Tensor, States] | None:
            return self._run(run, plan, dtype, x, states, lengths=lengths, resets=resets, all_states=all_states)

        return run_tensor(call, x, states, self.batch_first, run, len(plan.state_sizes) if all_states else None)

    def _run_repeated(self, run: Call, x: Any, states: States | None) -> Any:
        if isinstance(x, PackedSequence):
            return run_packed(run, x, states)
        return run_tensor(run, x, states, self.batch_first, eager.run)

    def _forward_packed(
        self, run: Run, packed: PackedSequence, hx: Any, lengths: None = None, resets: Tensor | None = None,
        all_states: bool = False, reset_states: States | None = None, compute: str | None = None,
    ) -> Any:  # fmt: skip
        """The results for a packed sequence; None if the operator does not support the call."""
        x, batch_sizes, sorted_indices, unsorted_indices = packed
        dtype = eligibility.operator_dtype(x)
        if dtype is None:
            return None
        plan, shape = self._plan(dtype, compute), x.shape
        if plan is None or len(shape) != 2 or shape[1] != self.input_size:
            return None
        if not torch.compiler.is_compiling() and not eligibility.are_batch_sizes(batch_sizes, shape[0]):
            return None
        batch = eligibility.packed_batch(batch_sizes, sorted_indices, hx)
        if any(indices is not None and indices.shape != (batch,) for indices in (sorted_indices, unsorted_indices)):
            return None
        states = None
        if hx is not None:
            states = initial_states(hx, plan, (batch,), dtype, reset_states)
            if states is None:
                return None
        elif torch.compiler.is_compiling():  # in a graph, the operator cannot read N from batch_sizes
            states = tuple([x.new_zeros((*plan.state_rows, batch, size)) for size in plan.state_sizes])

        def call(x: Tensor, states: States | None) -> tuple[Tensor, States] | None:
            options: dict[str, Any] = {"batch_sizes": batch_sizes, "resets": resets, "all_states": all_states}
            return self._run(run, plan, dtype, x, states, **options)

        return run_packed(call, packed, states, len(plan.state_sizes) if all_states else None)

    def _run(
        self, run: Run, plan: ModulePlan, dtype: torch.dtype, x: Tensor, states: States | None, **options: Any
    ) -> tuple[Tensor, States] | None:
        spec = spec_of(plan, self.training)
        if spec is None or not plan.has_kernels:
            return None
        # This comes last, because reading a parametrized weight computes it.
        weights = current_weights(self, plan, dtype)
        return None if weights is None else run(spec, x, states, weights, **options)

    def _forward_varied(
        self, x: Any, hx: Any, lengths: Any, resets: Any, all_states: bool, reset_states: Any
    ) -> Any:  # fmt: skip
        """The results for sequences with lengths or resets, or every state of every step."""
        if lengths is not None:
            lengths = eligibility.checked_lengths(lengths, x, self.batch_first)
        if resets is not None:
            resets = checked_resets(resets, x, self.batch_first)
        if reset_states is not None:
            plan = self._plan(eligibility.plan_dtype(self))
            reset_states = checked_reset_states(reset_states, resets, plan, x, self.batch_first)
            hx = zeros_like_states(reset_states) if hx is None else hx
        if resets is not None and is_single_step(self, x, resets) and not all_states:
            # Not self.forward: a subclass may have called us from its own.
            return FusedLayer.forward(self, x, with_marked_replaced(hx, resets, lengths, reset_states), lengths)
        run = dispatch.runner()
        forward = self._forward_packed if isinstance(x, PackedSequence) else self._forward_tensor
        result = None
        if run is not None and autocast.is_enabled():
            result = autocast.forward(self, forward, run, x, hx, lengths, resets, all_states, reset_states)
        elif run is not None:
            result = forward(run, x, hx, lengths, resets, all_states, reset_states)
        if result is None:
            return self._composed_forward(x, hx, lengths, resets, all_states, reset_states)
        return result


class _TorchLayer(FusedLayer, torch.nn.RNNBase):
    """Base of our versions of torch.nn's three layers. Calls that the operator does not support go to torch.nn."""

    __prepare_scriptable__ = class_map.as_torch_module  # torch.jit.script compiles torch.nn's layer

    def composed_forward(
        self, input: Any, hx: Any = None, lengths: Tensor | None = None, resets: Tensor | None = None,
        all_states: bool = False, reset_states: States | None = None,
    ) -> Any:  # fmt: skip
        """torch.nn's forward, which raises the errors. It runs on packed sequences, or on the pieces between resets."""
        if all_states:
            raise NotImplementedError("all_states needs the operator, which does not run this call; torch.nn has none")
        if resets is not None:
            data = input.data if isinstance(input, PackedSequence) else input
            if not (isinstance(data, Tensor) and 0 in data.shape[:-1]):
                return forward_pieces(self, self._torch_forward, input, hx, lengths, resets, reset_states)
        if lengths is None:
            return self._torch_forward(input, hx)
        packed = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=False)
        y, final = self._torch_forward(packed, hx)
        steps = input.shape[1 if self.batch_first else 0]
        return pad_packed_sequence(y, self.batch_first, total_length=steps)[0], final

    def _torch_forward(self, input: Any, hx: Any) -> Any:
        torch_class: Any = next(cls for cls in type(self).__mro__ if cls.__module__ == torch.nn.RNN.__module__)
        return torch_class.forward(self, input, hx)


class RNN(_TorchLayer, torch.nn.RNN):
    """``torch.nn.RNN`` on the fused operator: same arguments, attributes, parameters and results.

    Its ``forward`` also takes ``lengths``, for padded sequences, and ``resets``, where sequences begin anew.

    Example:
        >>> net = RNN(10, 20, num_layers=2, nonlinearity="relu")
        >>> y, h_n = net(torch.randn(5, 3, 10), lengths=[5, 2, 4])  # (5, 3, 20), (2, 3, 20)
    """


class LSTM(_TorchLayer, torch.nn.LSTM):
    """``torch.nn.LSTM`` on the fused operator: same arguments, attributes, parameters and results.

    Its ``forward`` also takes ``lengths``, for padded sequences, and ``resets``, where sequences begin anew.

    Example:
        >>> net = LSTM(10, 20, num_layers=2, bidirectional=True)
        >>> y, (h_n, c_n) = net(torch.randn(5, 3, 10))  # (5, 3, 40), (4, 3, 20) each
    """


class GRU(_TorchLayer, torch.nn.GRU):
    """``torch.nn.GRU`` on the fused operator: same arguments, attributes, parameters and results.

    Its ``forward`` also takes ``lengths``, for padded sequences, and ``resets``, where sequences begin anew.

    Example:
        >>> net = GRU(10, 20, batch_first=True)
        >>> y, h_n = net(torch.randn(3, 5, 10))  # (3, 5, 20), (1, 3, 20)
    """


class_map.register(RNN, LSTM, GRU)
dynamo.trace(RNN, LSTM, GRU)
