"""The checks of arguments that few calls have: resets inside sequences, and every state of every step."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.operands import ForwardOperands
from fusedrnn.op.reserve import PLAIN_CALL, CallKind
from fusedrnn.op.validation import check_array, check_no_alias, check_states, check_tuple, copy_of
from fusedrnn.scalars import as_bool
from fusedrnn.spec import RNNSpec


def check_resets(resets: object, steps: int, batch: int, lengths: Array | None) -> Array:
    """Marks as contiguous bools (T, N): a copy, False after the end of a sequence."""
    expected = f"resets must be bools of shape ({steps}, {batch})"
    checked = copy_of(resets, expected)
    if checked.dtype != np.bool_:
        raise TypeError(f"{expected}; got {checked.dtype}")
    if checked.shape != (steps, batch):
        raise ValueError(f"{expected}; got {checked.shape}")
    if lengths is not None:
        checked &= np.arange(steps)[:, None] < lengths
    return checked


def with_options(
    operands: ForwardOperands, spec: RNNSpec, resets: object, reset_states: object, all_states: object
) -> tuple[ForwardOperands, CallKind]:
    """The operands with these further arguments of :meth:`RNNOp.forward`, and the kind of the call."""
    steps, batch = operands.x.shape[:2]
    if resets is None and reset_states is not None:
        raise ValueError("reset_states must be None without resets")
    returns_all = as_bool("all_states", all_states)
    if resets is not None:
        marks = check_resets(resets, steps, batch, operands.lengths)
        states = check_states(reset_states, spec, batch, "reset_states", "reset {}")
        if states is not None:
            check_no_alias("out", operands.y, {"reset_states": states})
        operands = operands._replace(resets=marks, reset_states=states)
    if returns_all:
        every = tuple(np.empty((steps, batch, size), spec.dtype) for size in spec.other_state_features)
        operands = operands._replace(all_states=every)
    kind = CallKind(resets is not None, reset_states is not None, returns_all)
    return operands, kind if True in kind else PLAIN_CALL


def restarted(states: tuple[Array, ...], batch: int, resets: object) -> tuple[Array, ...]:
    """The states that a single step starts from, zero where it is reset: the call then needs no resets."""
    marked = np.flatnonzero(check_resets(resets, 1, batch, None)[0])
    if not marked.size:
        return states
    states = tuple(state.copy() for state in states)
    for state in states:
        state[:, marked] = 0
    return states


def split_cotangents(dy: Any, spec: RNNSpec, steps: int, batch: int) -> tuple[Any, tuple[Array | None, ...]]:
    """The gradient of the output, unchecked, and the gradients of the other states of every step, None for zeros.

    ``dy`` is a tuple of all these gradients, as :meth:`RNNOp.backward` takes it, or None.
    """
    names = ("dy", *(f"d{name}" if name != "y" else "d of state y" for name in spec.other_states))
    dy_entries = (None,) * len(names) if dy is None else check_tuple("dy", dy, dict.fromkeys(names, ""), "None or ")
    others = (
        None if value is None else np.ascontiguousarray(check_array(f"dy: {name}", value, spec, (steps, batch, size)))
        for name, value, size in zip(names[1:], dy_entries[1:], spec.other_state_features, strict=True)
    )
    return dy_entries[0], tuple(others)
