"""Checks of what callers pass, before any memory is touched: errors name the argument, what came, what was expected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
# To find out whether arrays share memory: strides so odd that it takes more count as sharing. (The type is for NumPy's
# stubs, which know only -1 and 0.)
_MOST_WORK: Any = 1000


def array(name: str, value: object, spec: RNNSpec) -> Array:
    """``value`` if it is a NumPy array of the spec's dtype."""
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a NumPy array; got {type(value).__name__}")
    if value.dtype != np.dtype(spec.dtype):
        raise TypeError(f"{name} must have dtype {spec.dtype}; got {value.dtype}")
    return value


def sequence(x: object, spec: RNNSpec) -> Array:
    """``x`` (T, N, I), T and N at least 1, copied only if its last axis is not contiguous or its memory unaligned."""
    checked = array("x", x, spec)
    if checked.ndim != 3 or checked.shape[2] != spec.input_size:
        raise ValueError(f"x must have shape (T, N, {spec.input_size}); got {checked.shape}")
    if 0 in checked.shape[:2]:
        raise ValueError(f"x must have at least one step and one sequence; got shape {checked.shape}")
    return readable(checked)


def readable(value: Array) -> Array:
    """The array itself, or a copy if a kernel cannot read it: last axis not contiguous, or memory unaligned."""
    contiguous = value.shape[-1] == 1 or value.strides[-1] == value.itemsize
    return value if contiguous and value.flags.aligned else np.ascontiguousarray(value).copy()


def parameters(params: object, spec: RNNSpec) -> Array:
    """The flat parameters, contiguous."""
    checked = array("params", params, spec)
    if checked.shape != (spec.layout.size,):
        raise ValueError(
            f"params must have shape ({spec.layout.size},), as the spec's layout has it; got {checked.shape}"
        )
    return readable(checked)


def states(value: object, spec: RNNSpec, batch: int) -> tuple[Array, ...] | None:
    """The initial states as contiguous arrays, or None for zeros."""
    if value is None:
        return None
    names = spec.state_names
    shapes = spec.state_shape(batch)
    wanted = f"a tuple of {len(names)}: {', '.join(f'{n}0 {s}' for n, s in zip(names, shapes, strict=True))}"
    if isinstance(value, np.ndarray) or not isinstance(value, Sequence):
        raise TypeError(f"states must be {wanted}; got {type(value).__name__}")
    if len(value) != len(names):
        raise ValueError(f"states must be {wanted}; got {len(value)}")
    checked = []
    for name, shape, state in zip(names, shapes, value, strict=True):
        state = array(f"states: {name}0", state, spec)
        if state.shape != shape:
            raise ValueError(f"states: {name}0 must have shape {shape}; got {state.shape}")
        checked.append(np.ascontiguousarray(state) if state.flags.aligned else state.copy())
    return tuple(checked)


def lengths(value: object, steps: int, batch: int, name: str = "lengths") -> Array | None:
    """Valid steps of each sequence as int64 (N,), each from 0 to T; None for T everywhere."""
    if value is None:
        return None
    try:
        given = np.array(value)  # a copy: what is checked is what is used
    except Exception:
        raise TypeError(f"{name} must be an array of {batch} integers; got {value!r}") from None
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers; got {given.dtype}")
    if given.shape != (batch,):
        raise ValueError(f"{name} must have shape ({batch},); got {given.shape}")
    if given.min() < 0 or given.max() > steps:
        raise ValueError(f"{name} must be from 0 to {steps}, the steps of x; got {given.min()} to {given.max()}")
    return given.astype(np.int64)


def output(out: object, spec: RNNSpec, x_shape: tuple[int, ...], given: Mapping[str, Sequence[Array]]) -> Array:
    """``out`` (T, N, D·S): writable, the last axis contiguous, no element twice, no memory shared with an input."""
    checked = array("out", out, spec)
    shape = (*x_shape[:2], spec.output_size)
    if checked.shape != shape:
        raise ValueError(f"out must have shape {shape}; got {checked.shape}")
    for name, holds in (("writable", checked.flags.writeable), ("aligned", checked.flags.aligned)):
        if not holds:
            raise ValueError(f"out must be {name}; got an array that is not")
    if (shape[2] > 1 and checked.strides[2] != checked.itemsize) or _overlaps_itself(checked):
        raise ValueError(f"out must have its last axis contiguous and no shared rows; got strides {checked.strides}")
    for name, inputs in given.items():
        if any(np.may_share_memory(checked, value, max_work=_MOST_WORK) for value in inputs):
            raise ValueError(f"out must not share memory with {name}")
    return checked


def _overlaps_itself(value: Array) -> bool:
    """Whether an axis steps by less than the axes below it reach: some elements may then lie in one place."""
    reach = value.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(value.strides, value.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * size
    return False


def flag(name: str, value: object) -> bool:
    """``value`` if it is a truth value."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors raised inside speak of a caller's arguments by the names that the caller knows."""
    # Not what is quoted, nor a field in the repr of a spec: that is a value, not a name.
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        message = re.sub(rf"(?<![\w'.])({pattern})(?![\w'=])", lambda found: names[found[1]], str(error))
        raise type(error)(message) from error
