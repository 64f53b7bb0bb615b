"""The operator under autocast on the CPU: what torch.nn's modules run there, as in a program of theirs."""

from __future__ import annotations

from typing import Any

from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torch
from fusedrnn.torch import operands
from fusedrnn.torch.operands import Call
from torch import Tensor

_TORCHS = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}


def run(*arguments: Any) -> list[Tensor]:
    """What torch.nn's modules run, in the dtypes that autocast has for it, with torch.nn's dropout masks."""
    call = Call.of(arguments)
    dtype = next((weight.dtype for weight in call.weights if weight is not None), call.x.dtype)
    # Layers before this one may have given input of autocast's dtype.
    h0, c0 = (None if state is None else state.to(dtype) for state in (call.h0, call.c0))
    cast = call._replace(x=call.x.to(dtype), h0=h0, c0=c0)
    operands.check(cast)
    operands.check_values(cast)
    if call.lengths is None:
        return list(_torchs(call, call.x, call.batch_sizes, _initial(call, dtype)))
    packed = pack_padded_sequence(call.x, call.lengths, enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None and back is not None
    initial = [state.index_select(1, order) for state in _initial(call, dtype)]
    y, *final = _torchs(call, packed.data, packed.batch_sizes, initial)
    y, _ = pad_packed_sequence(packed._replace(data=y), total_length=call.x.shape[0])
    return [y, *(state.index_select(1, back) for state in final)]


def _initial(call: Call, dtype: torch.dtype) -> list[Tensor]:
    options = call.options
    batch = call.x.shape[1] if call.batch_sizes is None else int(call.batch_sizes[0])
    return [
        call.x.new_zeros((options.rows, batch, size), dtype=dtype) if state is None else state
        for state, size in zip(call.states, options.state_sizes, strict=True)
    ]


def _torchs(call: Call, x: Tensor, batch_sizes: Tensor | None, initial: list[Tensor]) -> Any:
    """The output and the final states by torch's own function for the whole network."""
    options = call.options
    hx = tuple(initial) if options.mode == "lstm" else initial[0]
    per_pass = len(call.weights) // options.rows
    biased = any(weight is not None and weight.dim() == 1 for weight in call.weights)
    flat: list[Any] = []
    for start in range(0, len(call.weights), per_pass):
        i2h, h2h, *projection, i2h_bias, h2h_bias = call.weights[start : start + per_pass]
        assert i2h is not None
        zeros = i2h.new_zeros(len(i2h))
        biases = [zeros if bias is None else bias for bias in (i2h_bias, h2h_bias)] if biased else []
        flat += [i2h, h2h, *biases, *projection]
    settings = biased, options.num_layers, options.dropout, options.dropout > 0, options.bidirectional
    function: Any = _TORCHS[options.mode]
    if batch_sizes is None:
        return function(x, hx, flat, *settings, False)
    return function(x, batch_sizes, hx, flat, *settings)
