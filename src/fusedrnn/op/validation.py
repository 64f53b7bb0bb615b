"""Checks of what callers pass, before any memory is touched.

Each function returns the checked value, or raises the TypeError or ValueError that names the argument, what was given
and what was expected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fusedrnn.arrays import Array, check_is_array, is_masked
from fusedrnn.engines import registry
from fusedrnn.engines.operands import BACKWARD_USES, FORWARD_USES, ArrayUse, ForwardOperands, entries, is_sequence
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.quantized_params import QuantizedParams, check_quantized
from fusedrnn.scalars import shown
from fusedrnn.spec import DTYPES, RNNSpec

# The effort to find out whether arrays share memory; arrays whose strides need more count as sharing. (The type is
# for NumPy's stubs, which know only -1 and 0.)
_OVERLAP_WORK: Any = 1000
_STATE = ArrayUse(written=False, contiguous=True)


def check_op(spec: object, backend: object) -> None:
    """Raise an error unless there can be an op of this spec and this engine."""
    if not isinstance(spec, RNNSpec):
        raise TypeError(f"spec must be an RNNSpec; got {type(spec).__name__}")
    registry.check_backend(backend)


def check_array(name: str, array: object, spec: RNNSpec, shape: tuple[int, ...] | None = None) -> Array:
    """``array`` if it is a NumPy array of the spec's dtype, and of that shape if there is one."""
    value = array if type(array) is np.ndarray else check_is_array(name, array)
    if value.dtype != np.dtype(spec.dtype):
        hint = ""
        if value.dtype.name == "bfloat16" != spec.compute:
            hint = ", which RNNOp takes with compute='bfloat16'"
        elif value.dtype.name in DTYPES:
            hint = ": convert it with astype"
            if spec.compute is None and value.dtype.isnative:
                hint += f", or use a spec of dtype={value.dtype.name!r}"
        raise TypeError(f"{name} must have dtype {spec.dtype}; got {value.dtype}{hint}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {value.shape}")
    return value


def check_tuple(name: str, value: object, entry_shapes: Mapping[str, object], or_none: str = "") -> Sequence[Any]:
    """``value`` if it is a sequence with one entry for each key; ``entry_shapes`` may give their shapes, for errors."""
    items = entries(value, len(entry_shapes))
    if items is not None:
        return items
    listed = ", ".join(f"{entry} {shape}".rstrip() for entry, shape in entry_shapes.items())
    expected = f"{or_none}a tuple of {len(entry_shapes)}: {listed}"
    if not is_sequence(value):
        raise TypeError(f"{name} must be {expected}; got {type(value).__name__}")
    raise ValueError(f"{name} must be {expected}; got a sequence of {len(value)}")


def readable(use: ArrayUse, value: Array) -> Array:
    """The array itself, or a contiguous copy if a kernel cannot read it as it is."""
    if use.contiguous:
        return np.ascontiguousarray(value) if value.flags.aligned else value.copy()
    contiguous = value.shape[-1] == 1 or value.strides[-1] == value.itemsize
    return value if contiguous and value.flags.aligned else np.ascontiguousarray(value).copy()


def check_x(x: object, spec: RNNSpec) -> Array:
    """The input (T, N, I), T and N at least 1; a copy if a kernel cannot read it as it is."""
    checked = check_array("x", x, spec)
    if checked.ndim != 3 or checked.shape[2] != spec.input_size:
        raise ValueError(f"x must have shape (T, N, {spec.input_size}); got {checked.shape}")
    if 0 in checked.shape[:2]:
        raise ValueError(f"x must have at least one step and one sequence; got shape {checked.shape}")
    return readable(FORWARD_USES["x"], checked)


def check_params(params: object, spec: RNNSpec) -> Any:
    """The flat parameter vector, contiguous; or quantized parameters."""
    if isinstance(params, QuantizedParams):
        check_quantized(spec)
        if not params.fits(spec):
            raise ValueError(f"params must be quantized for {spec}; got those of {params.spec}")
        return params
    checked = check_array("params", params, spec)
    if checked.shape != (spec.layout.size,):
        raise ValueError(
            f"params must have shape ({spec.layout.size},), as the spec's layout has it; got {checked.shape}"
        )
    return readable(FORWARD_USES["params"], checked)


def check_states(
    states: object, spec: RNNSpec, batch: int, name: str = "states", entry_name: str = "{}0"
) -> tuple[Array, ...] | None:
    """The initial states, contiguous, with zeros for an entry that is None; None if all are None."""
    checked = _check_each(name, states, entry_name, spec, batch)
    if all(state is None for state in checked):
        return None
    shapes = spec.state_shape(batch)
    return tuple(
        np.zeros(shape, spec.dtype) if state is None else state for state, shape in zip(checked, shapes, strict=True)
    )


def check_dy(dy: object, spec: RNNSpec, steps: int, batch: int) -> Array | None:
    """The output's gradient (T, N, D·S), a copy if a kernel cannot read it as it is; None for zeros."""
    if dy is None:
        return None
    return readable(BACKWARD_USES["dy"], check_array("dy", dy, spec, (steps, batch, spec.output_size)))


def check_dstates(dstates: object, spec: RNNSpec, batch: int, name: str = "dstates") -> tuple[Array | None, ...]:
    """The gradients of the final states, contiguous; None for zeros."""
    return _check_each(name, dstates, "d{}_n", spec, batch)


def _check_each(
    name: str, value: object, entry_name: str, spec: RNNSpec, batch: int
) -> tuple[Array | None, ...]:
    """One contiguous array for each state; None for an entry that is None, and for all if ``value`` is None."""
    shapes = {entry_name.format(s): shape for s, shape in zip(spec.state_names, spec.state_shape(batch), strict=True)}
    if value is None:
        return (None,) * len(shapes)
    return tuple(
        None if state is None else readable(_STATE, check_array(f"{name}: {entry}", state, spec, shape))
        for (entry, shape), state in zip(shapes.items(), check_tuple(name, value, shapes), strict=True)
    )


def copy_of(value: object, expected: str) -> Array:
    """A contiguous copy: what is checked is what is used.

    Raises:
        TypeError: If ``value`` is no array, or a masked one; the message begins with ``expected``.
    """
    if type(value) is np.ndarray:
        return value.copy()
    if is_masked(value):
        raise TypeError(f"{expected}; got {type(value).__name__}")
    try:
        return np.array(value, order="C")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # not what a signal's handler raises
        raise TypeError(f"{expected}; got {value!r}") from error


def check_lengths(lengths: object, steps: int, batch: int, name: str = "lengths") -> Array | None:
    """Valid steps of each sequence as int64 (N,), each from 0 to T; None for T everywhere."""
    if lengths is None:
        return None
    checked = copy_of(lengths, f"{name} must be an array of {batch} integers")
    if checked.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers; got {checked.dtype}")
    if checked.shape != (batch,):
        raise ValueError(f"{name} must have shape ({batch},); got {checked.shape}")
    if checked.min() < 0 or checked.max() > steps:
        raise ValueError(f"{name} must be from 0 to {steps}, the steps of x; got {checked.min()} to {checked.max()}")
    return checked.astype(np.int64)


def check_buffer(name: str, value: object, spec: RNNSpec, shape: tuple[int, ...]) -> Array:
    """``value`` if a kernel can write it: writable, aligned, last axis contiguous, no element twice."""
    checked = check_array(name, value, spec, shape)
    check_memory(name, checked)
    return checked


def check_memory(name: str, value: Array) -> None:
    """Raise an error unless ``value`` is writable and aligned, its last axis contiguous, and no element twice."""
    for quality, present in (("writable", value.flags.writeable), ("aligned", value.flags.aligned)):
        if not present:
            raise ValueError(f"{name} must be {quality}; got an array that is not")
    is_contiguous = not value.ndim or value.shape[-1] <= 1 or value.strides[-1] == value.itemsize
    if not is_contiguous or _may_overlap_itself(value):
        raise ValueError(f"{name} must have its last axis contiguous and no shared rows; got strides {value.strides}")


def check_no_alias(name: str, value: Array, others: Mapping[str, Sequence[Array]]) -> None:
    """Raise an error if ``value`` shares memory with any of the others."""
    for other, arrays in others.items():
        if any(np.may_share_memory(value, array, max_work=_OVERLAP_WORK) for array in arrays):
            raise ValueError(f"{name} must not share memory with {other}")


def _may_overlap_itself(value: Array) -> bool:
    """Whether some axis has a stride below the extent of the axes inside it, so that elements may share memory."""
    extent = value.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(value.strides, value.shape, strict=True) if n > 1):
        if stride < extent:
            return True
        extent = stride * size
    return False


def check_seed(seed: object) -> int | None:
    """``seed`` if it is a 64-bit seed, or None."""
    if seed is None:
        return None
    if isinstance(seed, (bool, np.bool_)) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an integer or None; got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1; got {shown(seed)}")
    return int(seed)


def draw_seed(spec: RNNSpec | NetworkSpec) -> int:
    """A new seed if the network drops something, else 0."""
    return int.from_bytes(os.urandom(8), "little") if spec.drops else 0


def forward_operands(spec: RNNSpec, x: Any, params: Any, states: Any, lengths: Any, out: Any) -> ForwardOperands:
    """The operands of a forward call, from arguments as in :meth:`RNNOp.forward`."""
    checked_x = check_x(x, spec)
    steps, batch = checked_x.shape[:2]
    checked_params = check_params(params, spec)
    checked_states = check_states(states, spec, batch)
    checked_lengths = check_lengths(lengths, steps, batch)
    if out is None:
        y = np.empty((steps, batch, spec.output_size), spec.dtype)
    else:
        flat = () if isinstance(params, QuantizedParams) else (params,)
        inputs = {"x": (x,), "params": flat, "states": [state for state in states or () if state is not None]}
        y = check_buffer("out", out, spec, (steps, batch, spec.output_size))
        check_no_alias("out", y, inputs)
    return ForwardOperands(checked_x, checked_params, checked_states, checked_lengths, y)


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors raised inside the ``with`` block name arguments as the caller knows them."""
    # Quoted text is a value, and so is a field in the repr of a spec: neither is renamed.
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        message = re.sub(rf"(?<![\w'.])({pattern})(?![\w'=])", lambda match: names[match[1]], str(error))
        raise type(error)(message) from error
