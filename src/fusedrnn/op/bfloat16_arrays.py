"""Calls on NumPy arrays of bfloat16, the type of the package ml_dtypes, by calls on float32.

The conversion of arguments to float32 is exact; results are rounded to nearest even, once. A result has the dtype of
its argument: y and dx that of x, dparams that of params, final states and the gradients of initial states that of the
initial states, or of x if none are given. Buffers may be of either type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.operands import GradReq, is_sequence
from fusedrnn.op.reserve import Reserve
from fusedrnn.op.validation import check_memory, check_no_alias


@dataclass(frozen=True, eq=False, repr=False)
class MixedReserve(Reserve):
    """The reserve of a call with arrays of bfloat16: the reserve of the call in float32, and the gradients' dtypes."""

    _plain: Reserve
    _dtypes: tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]


def are_given(x: object, params: object, states: object, out: object, reset_states: object) -> bool:
    """Whether an argument of forward is of bfloat16."""
    entries = [entry for group in (states, reset_states) if is_sequence(group) for entry in group]
    return any(map(is_bfloat16, (x, params, out, *entries)))


def forward(
    run: Callable[..., Any], x: Any, params: Any, states: Any, out: Any, reset_states: Any, **options: Any
) -> tuple[Any, tuple[Array, ...], Reserve | None]:
    """:meth:`RNNOp.forward` with some arguments of bfloat16; ``run`` is the op's."""
    _check_buffers({"out": out}, {"x": x, "params": params, "states": states, "reset_states": reset_states})
    arguments = _array_as_float32(x), _array_as_float32(params), as_float32(states)
    buffers = {"out": _array_as_float32(out), "reset_states": as_float32(reset_states)}
    y, final, reserve = run(*arguments, **buffers, **options)
    state_dtypes, reset_dtypes = (
        tuple((x if state is None else state).dtype for state in group or (None,) * len(final))
        for group in (states, reset_states)
    )
    if reserve is not None:
        dtypes = x.dtype, params.dtype, state_dtypes, reset_dtypes
        reserve = MixedReserve(**vars(reserve), _plain=reserve, _dtypes=dtypes)
    final = _result(final, state_dtypes, None)
    if isinstance(y, tuple):  # every state of every step
        return tuple(_result(array, x.dtype, out if array is y[0] else None) for array in y), final, reserve
    return _result(y, x.dtype, out), final, reserve


def backward(
    run: Callable[..., Any],
    dy: Any,
    dstates: Any,
    reserve: MixedReserve,
    grad_req: GradReq | Mapping[str, GradReq],
    out: Any,
) -> tuple[Any, ...]:
    """:meth:`RNNOp.backward` after :func:`forward`; ``run`` is the op's. Gradients may be of either type."""
    spec: Any = reserve.spec
    _check_buffers(_named_buffers(out, spec.state_names), {"dy": dy, "dstates": dstates})
    cotangents = _array_as_float32(dy), as_float32(dstates)
    gradients = run(*cotangents, reserve._plain, grad_req=grad_req, out=as_float32(out))
    results: tuple[Any, ...] = _result(gradients, reserve._dtypes[: len(gradients)], out)
    return results


def is_bfloat16(value: object) -> TypeGuard[Array]:
    """Whether it is an array of bfloat16."""
    return isinstance(value, np.ndarray) and value.dtype.name == "bfloat16"


def as_float32(value: Any) -> Any:
    """Arrays of bfloat16 in float32, also in a sequence; anything else as it is."""
    return tuple(map(as_float32, value)) if is_sequence(value) else _array_as_float32(value)


def _array_as_float32(value: Any) -> Any:
    return value.astype(np.float32) if is_bfloat16(value) else value


def _check_buffers(buffers: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Check the memory of the caller's buffers, before anything is computed: copies in float32 have their own."""
    unshared = {name: list(_arrays(other)) for name, other in others.items()}
    for name, buffer in buffers.items():
        if isinstance(buffer, np.ndarray):
            if is_bfloat16(buffer):
                check_memory(name, buffer)
            check_no_alias(name, buffer, unshared)
            unshared[name] = [buffer]


def _arrays(value: Any) -> Iterator[Array]:
    """The arrays that an argument is or has as entries."""
    if isinstance(value, np.ndarray):
        yield value
    elif is_sequence(value):
        for entry in value:
            yield from _arrays(entry)


def _named_buffers(out: Any, state_names: Sequence[str]) -> dict[str, Any]:
    """The buffers of :func:`backward`, of which the op checks the number, by the names that errors give them."""
    gradients = ["dx"], ["dparams"], [f"d{name}0" for name in state_names], [f"dreset {name}" for name in state_names]
    named: dict[str, Any] = {}
    for names, entry in zip(gradients, out if is_sequence(out) else (), strict=False):
        entries = entry if is_sequence(entry) else (entry,)
        named |= zip([f"out: {name}" for name in names], entries, strict=False)
    return named


def _result(value: Any, dtype: Any, out: Any) -> Any:
    """A float32 result in its dtype, or in the caller's buffer; a tuple of them likewise. None stays None."""
    if value is None:
        return None
    if isinstance(value, tuple):
        buffers = (None,) * len(value) if out is None else out
        return tuple(_result(*entry) for entry in zip(value, dtype, buffers, strict=True))
    if out is None:
        return value.astype(dtype, copy=False)
    if is_bfloat16(out):
        out[...] = value
    return out
