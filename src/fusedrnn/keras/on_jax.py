"""The operator on Keras's arrays of JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusedrnn.jax import rnn
from fusedrnn.jax.array_layout import Piece
from fusedrnn.jax.param_arrays import ParamArrays
from fusedrnn.keras.cell_spec import gate_order
from fusedrnn.keras.parameters import Parameters, Results
from fusedrnn.layout import Kind
from fusedrnn.spec import RNNSpec

_KINDS: tuple[Kind, ...] = "i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias"


def run(spec: RNNSpec, x: Any, states: Sequence[Any], parameters: Sequence[Parameters], lengths: Any) -> Results | None:
    """:meth:`fusedrnn.keras.backends.Backend.run`."""
    if jax.default_backend() != "cpu":
        return None
    if x.shape[0] == 1 and isinstance(x, jax.core.Tracer):  # a symbolic T has no len
        return None  # in a graph, the check whether the parameters have changed takes as long as a step
    if len({tensor.dtype for own in parameters for tensor in own if tensor is not None}) > 1:
        return None
    spec = _available(spec, jax.dtypes.canonicalize_dtype(spec.dtype).name)
    x_spec, *initial = [operand.astype(spec.dtype) for operand in (x, *states)]
    params = _params(spec, parameters)
    # Keras's arrays are (N, T, features). In a graph, XLA removes the two transpositions, which cancel.
    y, final = rnn(spec, params, x_spec.swapaxes(0, 1), tuple(initial), lengths, batch_first=True)
    y = y.swapaxes(0, 1)
    dtype = parameters[0].kernel.dtype
    return y.astype(dtype), tuple(state.astype(dtype) for state in final)


@lru_cache(maxsize=256)
def _available(spec: RNNSpec, dtype: str) -> RNNSpec:
    """The spec in the dtype of arrays: without jax_enable_x64, JAX turns float64 into float32, as Keras does."""
    return replace(spec, dtype=dtype)


def padding_of(mask: Any) -> bool | None:
    """:meth:`fusedrnn.keras.backends.Backend.padding_of`."""
    if isinstance(mask, jax.core.Tracer):
        return False
    values = np.asarray(mask)
    return None if values.all() else bool((values[1:] <= values[:-1]).all())


def _params(spec: RNNSpec, parameters: Sequence[Parameters]) -> ParamArrays:
    """Keras's kernels and biases of each direction as the operator's parameters."""
    order, size = gate_order(spec), spec.num_gates * spec.hidden_size
    arrays: list[Any] = []
    numbers = {}
    for direction, (kernel, recurrent_kernel, bias) in enumerate(parameters):
        zeros = jnp.zeros(size, kernel.dtype)
        biases = (zeros, zeros) if bias is None else (bias, zeros) if bias.ndim == 1 else (bias[0], bias[1])
        for kind, array in zip(_KINDS, (kernel, recurrent_kernel, *biases), strict=True):
            numbers[direction, kind] = len(arrays)
            arrays.append(array.astype(spec.dtype))
    units = spec.hidden_size
    pieces = [
        Piece(numbers[entry.direction, entry.kind], gate * units, units) for entry in spec.layout for gate in order
    ]
    return ParamArrays.of(arrays, pieces)
