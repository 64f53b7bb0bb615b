"""The forms of a layer's input, unbatched, batch first or packed, converted around a call on time-major sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.torch import dispatch
from fusedrnn.torch.dispatch import Run

States = tuple[Tensor, ...]
Call = Callable[[Tensor, States | None], tuple[Tensor, States] | None]
"""A call on input (T, N, I), or the rows of a packed sequence; returns None if the operator does not support it."""


def run_tensor(
    call: Call, x: Tensor, states: States | None, batch_first: bool, run: Run, num_states: int | None = None
) -> Any:
    """The results of a call by ``run`` on a tensor and its states; for ``num_states`` see :func:`_split`."""
    batched = x.dim() == 3
    if not batched:
        x, states = x.unsqueeze(1), states and tuple(state.unsqueeze(1) for state in states)
    elif batch_first:
        x = x.transpose(0, 1)
    result = call(x, states)
    if result is None:
        return None
    outputs, final = _split(result, num_states)
    if not batched:
        outputs, final = ([tensor.squeeze(1) for tensor in tensors] for tensors in (outputs, final))
    elif batch_first:
        outputs = [dispatch.batch_first(output, run) for output in outputs]
    return _returned(outputs, final, num_states)


def run_packed(call: Call, packed: PackedSequence, states: States | None, num_states: int | None = None) -> Any:
    """The results of a call on a packed sequence and the states of its sequences in their original order."""
    x, batch_sizes, sorted_indices, unsorted_indices = packed
    if states is not None and sorted_indices is not None:
        states = tuple(state.index_select(1, sorted_indices) for state in states)
    result = call(x, states)
    if result is None:
        return None
    outputs, final = _split(result, num_states)
    if unsorted_indices is not None:
        final = tuple(state.index_select(1, unsorted_indices) for state in final)
    sequences = [PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices) for output in outputs]
    return _returned(sequences, final, num_states)


def _split(result: tuple[Tensor, States], num_states: int | None) -> tuple[list[Tensor], Sequence[Tensor]]:
    """The results with an axis of time, and the final states. With ``num_states``, others follow the final states."""
    y, final = result
    return [y, *(() if num_states is None else final[num_states:])], final[:num_states]


def _returned(outputs: Sequence[Any], final: Sequence[Tensor], num_states: int | None) -> Any:
    """What a layer returns."""
    states = tuple(final) if len(final) > 1 else final[0]
    return outputs[0] if num_states is None else tuple(outputs), states
