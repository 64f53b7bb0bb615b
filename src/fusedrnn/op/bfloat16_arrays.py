"""Calls on NumPy arrays of bfloat16, the type of the package ml_dtypes, by calls on float32.

The conversion of arguments to float32 is exact; results are rounded to nearest even, once. A result has the dtype of
its argument: y and dx that of x, dparams that of params, final states and the gradients of initial states that of the
initial states, or of x if none are given. Buffers may be of either type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from fusedrnn.engines.operands import GradReq, is_sequence
from fusedrnn.op.reserve import Reserve
from fusedrnn.spec import Array


@dataclass(frozen=True, eq=False, repr=False)
class MixedReserve(Reserve):
    """The reserve of a call with arrays of bfloat16: the reserve of the call in float32, and the gradients' dtypes."""

    _plain: Reserve
    _dtypes: tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]


def are_given(x: object, params: object, states: object, out: object, reset_states: object) -> bool:
    """Whether an argument of forward is of bfloat16."""
    entries = [entry for group in (states, reset_states) if is_sequence(group) for entry in group]
    return any(map(_is_bfloat16, (x, params, out, *entries)))


def forward(
    run: Callable[..., Any], x: Any, params: Any, states: Any, out: Any, reset_states: Any, **options: Any
) -> tuple[Any, tuple[Array, ...], Reserve | None]:
    """:meth:`RNNOp.forward` with some arguments of bfloat16; ``run`` is the op's."""
    _check_writable(out)
    arguments = (_as_float32(argument) for argument in (x, params, states))
    reset_rows = _as_float32(reset_states)
    y, final, reserve = run(*arguments, out=_as_float32(out), reset_states=reset_rows, **options)
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
    _check_writable(out)
    gradients = run(_as_float32(dy), _as_float32(dstates), reserve._plain, grad_req=grad_req, out=_as_float32(out))
    results: tuple[Any, ...] = _result(gradients, reserve._dtypes[: len(gradients)], out)
    return results


def _is_bfloat16(value: object) -> TypeGuard[Array]:
    return isinstance(value, np.ndarray) and value.dtype.name == "bfloat16"


def _as_float32(value: Any) -> Any:
    """Arrays of bfloat16 in float32, also in a sequence; anything else as it is."""
    if is_sequence(value):
        return tuple(map(_as_float32, value))
    return value.astype(np.float32) if _is_bfloat16(value) else value


def _check_writable(out: object) -> None:
    """Reject buffers of bfloat16 that are read-only, before anything is computed."""
    if is_sequence(out):
        for buffer in out:
            _check_writable(buffer)
    elif _is_bfloat16(out) and not out.flags.writeable:
        raise ValueError("out must be writable; got an array that is not")


def _result(value: Any, dtype: Any, out: Any) -> Any:
    """A float32 result in its dtype, or in the caller's buffer; a tuple of them likewise. None stays None."""
    if value is None:
        return None
    if isinstance(value, tuple):
        buffers = (None,) * len(value) if out is None else out
        return tuple(_result(*entry) for entry in zip(value, dtype, buffers, strict=True))
    if out is None:
        return value.astype(dtype, copy=False)
    if _is_bfloat16(out):
        out[...] = value
    return out
