"""The operator on Keras's arrays of JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusedrnn.jax import rnn
from fusedrnn.keras.cell_spec import gate_order
from fusedrnn.keras.parameters import Parameters, Results
from fusedrnn.spec import RNNSpec


def run(
    spec: RNNSpec, x: Any, states: Sequence[Any], parameters: Sequence[Parameters], lengths: Any
) -> Results | None:
    """:meth:`fusedrnn.keras.backends.Backend.run`."""
    if jax.default_backend() != "cpu":
        return None
    if len(x) == 1 and isinstance(x, jax.core.Tracer):
        return None  # in a graph a step takes as long as rearranging the weights
    operands = x, flat_parameters(spec, parameters), *states
    x_spec, params, *initial = [operand.astype(spec.dtype) for operand in operands]
    y, final = rnn(spec, params, x_spec, tuple(initial), lengths)
    dtype = parameters[0].kernel.dtype
    return y.astype(dtype), tuple(state.astype(dtype) for state in final)


def padding_of(mask: Any) -> bool | None:
    """:meth:`fusedrnn.keras.backends.Backend.padding_of`."""
    if isinstance(mask, jax.core.Tracer):
        return False
    values = np.asarray(mask)
    return None if values.all() else bool((values[1:] <= values[:-1]).all())


def flat_parameters(spec: RNNSpec, parameters: Sequence[Parameters]) -> Any:
    """The operator's flat vector, from Keras's kernels and biases of each direction."""
    order, size = gate_order(spec), spec.num_gates * spec.hidden_size
    parts = {}
    for direction, (kernel, recurrent_kernel, bias) in enumerate(parameters):
        zeros = jnp.zeros(size, kernel.dtype)
        biases = (zeros, zeros) if bias is None else (bias, zeros) if bias.ndim == 1 else (bias[0], bias[1])
        arrays = kernel, recurrent_kernel, *biases
        for kind, array in zip(("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias"), arrays, strict=True):
            gates = jnp.split(array, len(order), axis=-1)
            parts[direction, kind] = [gates[gate].T.ravel() for gate in order]
    return jnp.concatenate([part for entry in spec.layout for part in parts[entry.direction, entry.kind]])
