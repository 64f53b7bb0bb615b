"""The operator in a graph under autocast on the CPU: runs torch.nn's own operations, as a graph of torch.nn would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedrnn.torch import op_call
from fusedrnn.torch.op_call import OpCall

_TORCH_FUNCTIONS = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}


def run(*arguments: Any) -> list[Tensor]:
    """The results of torch's own functions, in the dtypes that autocast chooses, with torch's dropout masks."""
    call = OpCall(*arguments)
    dtype = next((weight.dtype for weight in call.weights if weight is not None), call.x.dtype)
    # The input may come from a layer that autocast runs in another dtype.
    h0, c0 = (None if state is None else state.to(dtype) for state in (call.h0, call.c0))
    cast = op_call.checked(*call._replace(x=call.x.to(dtype), h0=h0, c0=c0))
    op_call.check_values(cast)
    batch = call.x.shape[1] if call.batch_sizes is None else int(call.batch_sizes[0])
    states = [
        cast.x.new_zeros(shape) if state is None else state
        for state, shape in zip(call.states, cast.spec.state_shape(batch), strict=True)
    ]
    if call.lengths is None:
        return list(_torch_function(call, call.x, call.batch_sizes, states))
    packed = pack_padded_sequence(call.x, call.lengths, enforce_sorted=False)
    sorted_indices, unsorted_indices = packed.sorted_indices, packed.unsorted_indices
    assert sorted_indices is not None and unsorted_indices is not None
    initial = [state.index_select(1, sorted_indices) for state in states]
    y, *final = _torch_function(call, packed.data, packed.batch_sizes, initial)
    y, _ = pad_packed_sequence(packed._replace(data=y), total_length=call.x.shape[0])
    return [y, *(state.index_select(1, unsorted_indices) for state in final)]


def _torch_function(call: OpCall, x: Tensor, batch_sizes: Tensor | None, initial: list[Tensor]) -> Any:
    """The output and the final states, by torch's own function for the whole network."""
    hx = tuple(initial) if call.mode == "lstm" else initial[0]
    per_direction = 5 if call.projection_size else 4
    has_bias = any(weight is not None and weight.dim() == 1 for weight in call.weights)
    flat_weights: list[Any] = []
    for first in range(0, len(call.weights), per_direction):
        i2h, h2h, *projection, i2h_bias, h2h_bias = call.weights[first : first + per_direction]
        assert i2h is not None
        zeros = i2h.new_zeros(len(i2h))
        biases = [zeros if bias is None else bias for bias in (i2h_bias, h2h_bias)] if has_bias else []
        flat_weights += [i2h, h2h, *biases, *projection]
    settings = has_bias, call.num_layers, call.dropout, call.dropout > 0, call.bidirectional
    function: Any = _TORCH_FUNCTIONS[call.mode]
    if batch_sizes is None:
        return function(x, hx, flat_weights, *settings, False)
    return function(x, batch_sizes, hx, flat_weights, *settings)
