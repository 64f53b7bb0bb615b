"""The operator as a function of JAX arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusedrnn.arrays import is_masked
from fusedrnn.cell.user_cell import UserCell
from fusedrnn.jax.calls import OPTIONAL, Call
from fusedrnn.jax.explicit_sharding import bind
from fusedrnn.jax.param_arrays import ParamArrays
from fusedrnn.jax.primitives import rnn_p
from fusedrnn.spec import RNNSpec

Array = Any


def rnn(
    spec: RNNSpec,
    params: Array | ParamArrays,
    x: Array,
    states: Sequence[Array | None] | Array | None = None,
    lengths: Array | None = None,
    resets: Array | None = None,
    *,
    key: Array | None = None,
    batch_first: bool = False,
) -> tuple[Array, tuple[Array, ...]]:
    """Run a recurrent network on a batch of sequences.

    It may be jitted, mapped by ``vmap`` and ``shard_map``, scanned and exported. It may be differentiated in reverse
    mode any number of times, with respect to ``params``, ``x`` and ``states``. On the CPU it runs fusedrnn's kernels,
    without the interpreter; on other devices it runs a scan of the same cell. The kernels use the threads that
    :func:`fusedrnn.set_num_threads` allows at the time of the call.

    Args:
        spec: The network. It is static: a jitted function must close over it.
        params: The flat parameter vector (``spec.layout.size``,) of ``spec.dtype``; or the arrays of a framework that
            make up the vector, as layers pass them.
        x: Input (T, N, I), or (N, T, I) if ``batch_first``, T and N at least 1, of ``spec.dtype``.
        states: The initial states, each (L·D, N, size), as in :meth:`RNNOp.forward`; None for zeros.
        lengths: The valid steps of each sequence, integers (N,) from 0 to T; None for T everywhere. The output is zero
            after these.
        resets: Where sequences begin anew, bools (T, N), or (N, T) if ``batch_first``: the states become zero before
            such a step.
        key: A random key of JAX. With a key, elements are dropped by ``spec.dropout`` and by the masks inside the cell;
            without one, nothing is dropped, as in inference.
        batch_first: Whether the batch is the first axis of input, output and resets. This needs no transposition.

    Returns:
        The output (T, N, D·S), or (N, T, D·S) if ``batch_first``, and the final states as a tuple, each (L·D, N, size).

    Raises:
        TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
        ValueError: If an argument has the wrong shape or value; the message is of the same form.
        NotImplementedError: If a format that is for inference, such as int8, is to give gradients or to run on a device
            other than the CPU.

    Example:
    >>> import jax, jax.numpy as jnp
    >>> from fusedrnn import RNNSpec
    >>> from fusedrnn.jax import rnn
    >>> spec = RNNSpec("gru", input_size=3, hidden_size=5)
    >>> params = jnp.zeros(spec.layout.size)
    >>> run = jax.jit(lambda params, x: rnn(spec, params, x))
    >>> y, (h_n,) = run(params, jnp.ones((7, 2, 3)))
    >>> y.shape, h_n.shape
    ((7, 2, 5), (1, 2, 5))
    """
    if not isinstance(spec, RNNSpec):
        raise TypeError(f"spec must be an RNNSpec; got {type(spec).__name__}")
    dtype = np.dtype(spec.dtype)
    params = _params(spec, params, dtype)
    x = _array("x", x, dtype, (None, None, spec.input_size))
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    options = {
        "states": _states(spec, states, batch, dtype),
        "lengths": _lengths(lengths, batch, steps),
        "resets": [] if resets is None else [_resets(resets, x.shape[:2], batch_first)],
        "seed": [] if key is None or not spec.drops else [_seed(key)],
    }
    if options["resets"] and options["lengths"]:
        # Kernels take marks in the padding for marks of the sequence.
        valid = jnp.arange(steps)[:, None] < options["lengths"][0][None]
        options["resets"] = [options["resets"][0] & valid]
    own_spec = spec if options["seed"] else _without_masks(spec)
    call = Call(own_spec, tuple(name for name in OPTIONAL if options[name]), batch_first, params.layout)
    others = [operand for name in call.options for operand in options[name]]
    y, *final = bind(rnn_p, (x, *params.arrays, *others), call)
    return y, tuple(final)


@lru_cache(maxsize=256)
def _without_masks(spec: RNNSpec) -> RNNSpec:
    """The network in inference: it drops nothing, and its cell's masks are their expectations."""
    mode = spec.mode.expectation if isinstance(spec.mode, UserCell) else spec.mode
    return replace(spec, mode=mode, dropout=0.0, input_dropout=0.0)


def _array(name: str, value: Any, dtype: np.dtype[Any], shape: Sequence[int | None]) -> Array:
    """A JAX array of that dtype and shape, in which None stands for any size."""
    if value is None:
        raise TypeError(f"{name} must be an array; got None")
    array = _converted(name, value)
    if array.dtype != dtype:
        hint = "; set jax_enable_x64 for float64" if dtype == np.float64 and array.dtype == np.float32 else ""
        raise TypeError(f"{name} must have dtype {dtype.name}; got {array.dtype.name}{hint}")
    matches = array.ndim == len(shape) and all(
        size is None or size == own for size, own in zip(shape, array.shape, strict=True)
    )
    if not matches:
        expected = ", ".join("any size" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({expected}); got {array.shape}")
    if 0 in [size for size in array.shape if isinstance(size, int)]:
        raise ValueError(f"{name} must not be empty; got shape {array.shape}")
    return array


def _converted(name: str, value: Any, as_array: Callable[[Any], Array] = jnp.asarray) -> Array:
    try:
        if is_masked(value):  # NumPy would drop the mask
            raise TypeError
        return as_array(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array; got {type(value).__name__}") from error


def uncut(value: Any) -> Array:
    """The value as an array; of NumPy, if it is an array of NumPy, a number or numbers in a list.

    Without jax_enable_x64, an array of JAX would cut integers of 64 bits before they are checked.
    """
    entries = value if isinstance(value, (list, tuple)) else [value]
    is_known = all(isinstance(entry, (np.ndarray, np.generic, int)) for entry in entries)
    return np.asarray(value) if is_known else jnp.asarray(value)


def _params(spec: RNNSpec, params: Any, dtype: np.dtype[Any]) -> ParamArrays:
    """The parameters as arrays that make up a vector of the network's size and dtype."""
    arrays, layout = params if isinstance(params, ParamArrays) else ((params,), None)
    if layout is None:
        return ParamArrays((_array("params", arrays[0], dtype, (spec.layout.size,)),), None)
    # The kernels read as many elements as the network has, so a smaller array would be read beyond its end.
    shapes = tuple(tuple(array.shape) for array in arrays)
    if shapes != layout.shapes:
        raise ValueError(f"the arrays of params must have the shapes {layout.shapes}; got {shapes}")
    if layout.size != spec.layout.size:
        raise ValueError(f"the arrays of params must have {spec.layout.size} elements; got {layout.size}")
    dtypes = {array.dtype.name for array in arrays}
    if dtypes != {dtype.name}:
        raise TypeError(f"the arrays of params must have dtype {dtype.name}; got {', '.join(sorted(dtypes))}")
    return ParamArrays(arrays, layout)


def _states(spec: RNNSpec, states: Any, batch: Any, dtype: np.dtype[Any]) -> list[Array]:
    """The initial states; either all of them, or none if all are zeros."""
    names, shapes = spec.state_names, spec.state_shape(batch)
    if states is None:
        return []
    if not isinstance(states, (tuple, list)):
        states = (states,)
    if len(states) != len(names):
        raise ValueError(f"states must be {len(names)} arrays, {', '.join(names)}; got {len(states)}")
    if all(state is None for state in states):
        return []
    return [
        jnp.zeros(shape, dtype) if state is None else _array(f"states[{index}]", state, dtype, shape)
        for index, (state, shape) in enumerate(zip(states, shapes, strict=True))
    ]


def _lengths(lengths: Any, batch: Any, steps: Any) -> list[Array]:
    if lengths is None:
        return []
    array = _converted("lengths", lengths, uncut)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers; got {array.dtype.name}")
    if array.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},); got {array.shape}")
    check_range(array, steps)
    own, limit = np.iinfo(array.dtype), np.iinfo(np.int32).max
    if own.max > limit:  # a length that is out of range stays so in 32 bits, and the call refuses it
        array = (np if isinstance(array, np.ndarray) else jnp).clip(array, max(own.min, -1), limit)
    return [jnp.asarray(array, jnp.int32)]


def check_range(lengths: Array, steps: Any) -> None:
    """Refuse lengths that are not from 0 to ``steps``, if their values are known."""
    if isinstance(lengths, jax.core.Tracer):
        return
    values = np.asarray(lengths)  # with NumPy, because inside of jit, JAX traces operations even on a constant
    is_too_long = isinstance(steps, int) and (values > steps).any()  # an exported call checks a symbolic T
    if (values < 0).any() or is_too_long:
        raise ValueError(f"each of lengths must be from 0 to {steps}; got {values}")


def _resets(resets: Any, shape: Sequence[int], batch_first: bool) -> Array:
    """The marks (T, N)."""
    marks = _array("resets", resets, np.dtype(np.bool_), shape)
    return marks.T if batch_first else marks


def _seed(key: Any) -> Array:
    """The two words of the seed of dropout, from a key of JAX."""
    try:
        return jax.random.bits(key, (2,), "uint32")
    except (TypeError, ValueError) as error:
        raise TypeError(f"key must be a random key of JAX, from jax.random.key; got {key!r}") from error
