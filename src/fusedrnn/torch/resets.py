"""Resets inside sequences: the marks of a call, and calls with resets by torch.nn, which has none.

For torch.nn, each piece of a sequence, from one reset to the next, is a separate sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fusedrnn.torch import autocast, dispatch, eager
from fusedrnn.torch.eligibility import is_compiling, packed_batch
from fusedrnn.torch.plan import ModulePlan

States = tuple[Tensor, ...]


def checked_resets(marks: Any, x: Any, batch_first: bool) -> Tensor:
    """Marks as a bool CPU tensor (T, N); for a packed sequence, in the order of the sequences in its rows.

    Raises:
        TypeError: If they are no tensor of bools.
        ValueError: If there is not a mark for each step of each sequence.
    """
    if not isinstance(marks, Tensor) or marks.dtype is not torch.bool:
        got = marks.dtype if isinstance(marks, Tensor) else type(marks).__name__
        raise TypeError(f"resets must be a tensor of torch.bool; got {got}")
    resets = marks.detach().to("cpu")
    if isinstance(x, PackedSequence):
        steps, batch = x.batch_sizes.shape[0], packed_batch(x.batch_sizes, x.sorted_indices, None)
    elif isinstance(x, Tensor) and x.dim() == 3:
        steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    elif isinstance(x, Tensor) and x.dim() == 2:
        resets = _with_shape(resets, (x.shape[0],), "(T,)")
        return resets.unsqueeze(1)
    else:
        raise ValueError("resets need input of two or three dimensions, or a PackedSequence")
    shape, axes = ((batch, steps), "(N, T)") if batch_first else ((steps, batch), "(T, N)")
    resets = _with_shape(resets, shape, axes)
    resets = resets.T if batch_first else resets
    if isinstance(x, PackedSequence) and x.sorted_indices is not None:
        resets = resets.index_select(1, x.sorted_indices)
    return resets


def _with_shape(resets: Tensor, shape: tuple[int, ...], axes: str) -> Tensor:
    if resets.shape != shape:
        raise ValueError(f"resets must have shape {axes} = {tuple(shape)}; got {tuple(resets.shape)}")
    return resets


def checked_reset_states(states: Any, resets: Any, plan: ModulePlan | None, x: Any, batch_first: bool) -> States:
    """The states after resets as a tuple. ``plan`` is the layer's, None if the operator does not run the layer.

    Raises:
        TypeError: If there is not a tensor for each state.
        ValueError: If there are no resets, or a tensor has another shape than an initial state or another dtype than x.
    """
    if resets is None:
        raise ValueError("reset_states must be None without resets")
    given = states if isinstance(states, (tuple, list)) else (states,)
    sizes = tuple(state.shape[-1] for state in given) if plan is None else plan.state_sizes
    if len(given) != len(sizes) or not all(isinstance(state, Tensor) for state in given):
        expected = "a tensor" if len(sizes) == 1 else f"a tuple of {len(sizes)} tensors"
        got = ", ".join(type(state).__name__ for state in given)
        raise TypeError(f"reset_states must be {expected}, as the initial states are; got {got}")
    data = x.data if isinstance(x, PackedSequence) else x
    if isinstance(x, PackedSequence):
        batch: tuple[int, ...] = (packed_batch(x.batch_sizes, x.sorted_indices, given),)
    else:
        batch = () if x.dim() == 2 else (x.shape[0 if batch_first else 1],)
    for number, (state, size) in enumerate(zip(given, sizes, strict=True)):
        name = "reset_states" if len(sizes) == 1 else f"reset_states[{number}]"
        shape = (*(given[0].shape[:1] if plan is None else plan.state_rows), *batch, size)
        if state.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(state.shape)}")
        if state.dtype != data.dtype and not autocast.is_enabled():
            raise ValueError(f"{name} must have dtype {data.dtype}, as the input has; got {state.dtype}")
    return tuple(given)


def zeros_like_states(states: States) -> Any:
    """Initial states of zeros, in the form that layers take; ``states`` are states after resets."""
    zeros = tuple(torch.zeros_like(state) for state in states)
    return zeros if len(zeros) > 1 else zeros[0]


def is_single_step(layer: Any, x: Any, resets: Tensor) -> bool:
    """Whether a call with these marks equals one without marks on other initial states, which layers may recognize."""
    # While a graph is traced, this comparison would fix the number of steps.
    return not is_compiling() and len(resets) == 1 and not (layer.bidirectional or isinstance(x, PackedSequence))


def with_marked_replaced(hx: Any, resets: Tensor, lengths: Tensor | None, reset_states: States | None) -> Any:
    """Initial states, replaced for the sequences with a mark at the first step; None stands for zeros. Unchecked."""
    marks = resets[0] if lengths is None else resets[0] & (lengths > 0)  # a mark in the padding has no effect
    # Tracers and transforms have no values of marks to decide by.
    if dispatch.runner() is eager.run and not marks.any():
        return hx

    def replaced(state: Any, other: Any) -> Any:
        if not _can_be_replaced(state, other, len(marks)):
            return state  # the call raises the error
        marked = marks.to(state.device)
        return torch.where(marked[:, None] if state.dim() == 3 else marked, other, state)

    if reset_states is None:
        return _each_state(hx, lambda state: replaced(state, 0))
    if isinstance(hx, (tuple, list)):
        return tuple(map(replaced, hx, reset_states)) if len(hx) == len(reset_states) else hx
    return replaced(hx, reset_states[0])


def _can_be_replaced(state: Any, other: Any, batch: int) -> bool:
    """Whether rows of a state can be replaced without a change of its shape and dtype, which the call checks."""
    if not isinstance(state, Tensor):
        return False
    shape = state.shape
    if len(shape) not in (2, 3) or batch != (shape[1] if len(shape) == 3 else 1):
        return False
    return not isinstance(other, Tensor) or (
        shape == other.shape and (state.dtype == other.dtype or autocast.is_enabled())
    )


class _Pieces(NamedTuple):
    """The pieces of a batch: for each its sequence, its first step, its length, and whether it is the first or last."""

    sequences: Tensor
    begins: Tensor
    lengths: Tensor
    is_first: Tensor
    is_last: Tensor

    @classmethod
    def of(cls, resets: Tensor, lengths: Tensor) -> _Pieces:
        """The pieces by marks (T, N) and lengths (N,)."""
        starts = resets & (torch.arange(len(resets), device="cpu")[:, None] < lengths)
        starts[0] |= lengths > 0
        sequences, begins = starts.T.nonzero(as_tuple=True)  # sequence by sequence, in order of time
        is_first = torch.ones_like(sequences, dtype=torch.bool)
        is_first[1:] = sequences[1:] != sequences[:-1]
        is_last = is_first.roll(-1)
        ends = torch.where(is_last, lengths[sequences], begins.roll(-1))
        return cls(sequences, begins, ends - begins, is_first, is_last)


def run_pieces(
    run: Callable[[PackedSequence, States], tuple[PackedSequence, States]],
    x: Tensor, resets: Tensor, lengths: Tensor, states: States, reset_states: States | None, reverses: Tensor,
) -> tuple[Tensor, States]:  # fmt: skip
    """The output (T, N, features) and the final states of a call on padded sequences.

    Args:
        run: torch.nn's layer on packed sequences and states.
        x: (T, N, I).
        resets: (T, N).
        lengths: (N,).
        states: The initial states (L·D, N, size).
        reset_states: The states after resets; None for zeros.
        reverses: For each row of the states, whether its direction runs from the end.
    """
    pieces = _Pieces.of(resets, lengths)
    offsets = torch.arange(int(pieces.lengths.max()), device="cpu")[:, None]
    is_inside = offsets < pieces.lengths
    times = (pieces.begins + offsets).clamp(max=len(x) - 1)
    packed = pack_padded_sequence(x[times, pieces.sequences], pieces.lengths, enforce_sorted=False)
    marked = resets[0, pieces.sequences]
    enters = torch.where(reverses[:, None], pieces.is_last, pieces.is_first & ~marked)[:, :, None].to(x.device)
    leaves = torch.where(reverses[:, None], pieces.is_first, pieces.is_last)
    begins: Any = (0,) * len(states)
    if reset_states is not None:
        begins = [state[:, pieces.sequences] for state in reset_states]
    pairs = zip(states, begins, strict=True)
    initial = tuple(torch.where(enters, state[:, pieces.sequences], begin) for state, begin in pairs)
    outputs, last = run(packed, initial)
    padded = pad_packed_sequence(outputs)[0]
    index = times[is_inside], pieces.sequences.expand_as(times)[is_inside]
    y = padded.new_zeros((*x.shape[:2], padded.shape[2])).index_put(index, padded[is_inside.to(x.device)])
    rows, columns = leaves.nonzero(as_tuple=True)
    at = rows, pieces.sequences[columns]
    return y, tuple(old.index_put(at, new[rows, columns]) for old, new in zip(states, last, strict=True))


def forward_pieces(
    module: Any, forward: Callable[[Any, Any], Any], x: Any, hx: Any, lengths: Tensor | None, resets: Tensor,
    reset_states: States | None,
) -> Any:  # fmt: skip
    """The results of a module's call on ``x`` with resets (T, N), by torch.nn's ``forward`` on packed pieces."""
    if isinstance(x, PackedSequence):
        in_order, original = x.sorted_indices, x.unsorted_indices
        padded, sorted_lengths = pad_packed_sequence(x._replace(sorted_indices=None, unsorted_indices=None))
        if in_order is not None:
            hx, reset_states = (
                _each_state(states, lambda state: state.index_select(1, in_order)) for states in (hx, reset_states)
            )
        y, final = _forward_padded(module, forward, padded, hx, sorted_lengths, resets, reset_states)
        packed = pack_padded_sequence(y, sorted_lengths)
        if original is not None:
            final = _each_state(final, lambda state: state.index_select(1, original))
        return PackedSequence(packed.data, *x[1:]), final
    if x.dim() == 2:
        hx, reset_states = (_each_state(states, lambda state: state.unsqueeze(1)) for states in (hx, reset_states))
        y, final = _forward_padded(module, forward, x.unsqueeze(1), hx, None, resets, reset_states)
        return y.squeeze(1), _each_state(final, lambda state: state.squeeze(1))
    if module.batch_first:
        y, final = _forward_padded(module, forward, x.transpose(0, 1), hx, lengths, resets, reset_states)
        return y.transpose(0, 1), final
    return _forward_padded(module, forward, x, hx, lengths, resets, reset_states)


def _forward_padded(
    module: Any, forward: Callable[[Any, Any], Any], x: Tensor, hx: Any, lengths: Tensor | None, resets: Tensor,
    reset_states: States | None,
) -> tuple[Tensor, Any]:  # fmt: skip
    steps, batch = x.shape[:2]
    directions = 2 if module.bidirectional else 1
    if hx is None:
        sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if module.mode == "LSTM" else 1]
        states = tuple(x.new_zeros(module.num_layers * directions, batch, size) for size in sizes)
    else:
        module.check_forward_args(x.transpose(0, 1) if module.batch_first else x, hx, None)
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)

    def run(packed: PackedSequence, initial: States) -> tuple[PackedSequence, States]:
        outputs, final = forward(packed, initial if len(initial) > 1 else initial[0])
        return outputs, final if isinstance(final, tuple) else (final,)

    lengths = torch.full((batch,), steps, device="cpu") if lengths is None else lengths
    reverses = torch.arange(module.num_layers * directions, device="cpu") % directions == 1
    y, final = run_pieces(run, x, resets, lengths, states, reset_states, reverses)
    return y, final if len(final) > 1 else final[0]


def _each_state(hx: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if hx is None:
        return None
    return tuple(change(state) for state in hx) if isinstance(hx, (tuple, list)) else change(hx)
