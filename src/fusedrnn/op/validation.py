"""Checks of what callers pass, before any memory is touched: errors name the argument, what came, what was expected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.ma
from numpy.typing import NDArray

from fusedrnn.engines.operand_table import BACKWARD, FORWARD, Operand, entries, is_sequence
from fusedrnn.engines.registry import Keep
from fusedrnn.scalars import shown
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
# To find out whether arrays share memory: strides so odd that it takes more count as sharing. (The type is for NumPy's
# stubs, which know only -1 and 0.)
_MOST_WORK: Any = 1000


def array(name: str, value: object, spec: RNNSpec) -> Array:
    """``value`` if it is a NumPy array of the spec's dtype."""
    if not isinstance(value, np.ndarray) or isinstance(value, numpy.ma.MaskedArray):
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
    return readable(FORWARD["x"], checked)


def readable(operand: Operand, value: Array) -> Array:
    """The array itself, or a contiguous copy if it is not as the operand must be, or its memory is unaligned."""
    if operand.contiguous:
        return np.ascontiguousarray(value) if value.flags.aligned else value.copy()
    contiguous = value.shape[-1] == 1 or value.strides[-1] == value.itemsize
    return value if contiguous and value.flags.aligned else np.ascontiguousarray(value).copy()


def parameters(params: object, spec: RNNSpec) -> Array:
    """The flat parameters, contiguous."""
    checked = array("params", params, spec)
    if checked.shape != (spec.layout.size,):
        raise ValueError(
            f"params must have shape ({spec.layout.size},), as the spec's layout has it; got {checked.shape}"
        )
    return readable(FORWARD["params"], checked)


def states(value: object, spec: RNNSpec, batch: int) -> tuple[Array, ...] | None:
    """The initial states as contiguous arrays, zeros for an entry that is None; None if all are."""
    names = [f"{name}0" for name in spec.state_names]
    checked = _each("states", value, names, FORWARD, spec, batch)
    if all(state is None for state in checked):
        return None
    shapes = spec.state_shape(batch)
    return tuple(
        np.zeros(shape, spec.dtype) if state is None else state for state, shape in zip(checked, shapes, strict=True)
    )


def output_gradient(dy: object, spec: RNNSpec, steps: int, batch: int) -> Array | None:
    """``dy`` (T, N, D·S), copied only if a kernel cannot read it; None for zeros."""
    return None if dy is None else readable(BACKWARD["dy"], shaped("dy", dy, spec, (steps, batch, spec.output_size)))


def state_gradients(dstates: object, spec: RNNSpec, batch: int) -> tuple[Array | None, ...]:
    """The gradients of the final states as contiguous arrays, None for zeros."""
    names = [f"d{name}_n" for name in spec.state_names]
    return _each("dstates", dstates, names, BACKWARD, spec, batch)


def _each(
    name: str, value: object, names: Sequence[str], operands: Mapping[str, Operand], spec: RNNSpec, batch: int
) -> tuple[Array | None, ...]:
    """One array for each state, contiguous; None for an entry that is None, and for all if ``value`` is None."""
    if value is None:
        return (None,) * len(names)
    shapes = spec.state_shape(batch)
    return tuple(
        None if entry is None else readable(operands[each], shaped(f"{name}: {each}", entry, spec, shape))
        for each, shape, entry in zip(names, shapes, one_each(name, value, names, shapes), strict=True)
    )


def one_each(name: str, value: object, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Sequence[Any]:
    """``value`` if it is a sequence of as many as there are names."""
    items = entries(value, len(names))
    if items is not None:
        return items
    expected = f"a tuple of {len(names)}: {', '.join(f'{n} {s}' for n, s in zip(names, shapes, strict=True))}"
    if not is_sequence(value):
        raise TypeError(f"{name} must be {expected}; got {type(value).__name__}")
    raise ValueError(f"{name} must be {expected}; got {len(value)}")


def shaped(name: str, value: object, spec: RNNSpec, shape: tuple[int, ...]) -> Array:
    """``value`` if it is a NumPy array of the spec's dtype and that shape."""
    checked = array(name, value, spec)
    if checked.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {checked.shape}")
    return checked


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
    checked = buffer("out", out, spec, (*x_shape[:2], spec.output_size))
    apart("out", checked, given)
    return checked


def buffer(name: str, value: object, spec: RNNSpec, shape: tuple[int, ...]) -> Array:
    """``value`` if it can be written: aligned, the last axis contiguous, no element twice."""
    checked = shaped(name, value, spec, shape)
    for quality, holds in (("writable", checked.flags.writeable), ("aligned", checked.flags.aligned)):
        if not holds:
            raise ValueError(f"{name} must be {quality}; got an array that is not")
    if (shape[-1] > 1 and checked.strides[-1] != checked.itemsize) or _overlaps_itself(checked):
        raise ValueError(
            f"{name} must have its last axis contiguous and no shared rows; got strides {checked.strides}"
        )
    return checked


def apart(name: str, value: Array, others: Mapping[str, Sequence[Array]]) -> None:
    """Refuse ``value`` if it shares memory with any of the others."""
    for other, arrays in others.items():
        if any(np.may_share_memory(value, one, max_work=_MOST_WORK) for one in arrays):
            raise ValueError(f"{name} must not share memory with {other}")


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


def seed(value: object) -> int | None:
    """``value`` if it is a seed, or None."""
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"seed must be an integer or None; got {value!r}")
    if not 0 <= value < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1; got {shown(value)}")
    return int(value)


def keep(value: object) -> Keep:
    """``value`` if it says what a reserve keeps."""
    if not isinstance(value, str):
        raise TypeError(f"reserve must be 'gates' or 'states'; got {type(value).__name__}")
    if value not in ("gates", "states"):
        raise ValueError(f"reserve must be 'gates' or 'states'; got {value!r}")
    return "gates" if value == "gates" else "states"


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
