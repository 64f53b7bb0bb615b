"""JAX: one input GEMM for all steps, then a jitted scan over the cell; gradients by vjp in the same program."""

from __future__ import annotations

import importlib
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.peers.workers.protocol import Workload

fastest = importlib.import_module("fastest").fastest

_UNROLLS = (1, 2, 4)
"""Unroll factors of the compiled loop; the fastest is timed."""

_KINDS = ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias")


def facts() -> dict[str, str]:
    """Versions."""
    import jax

    return {"jax": jax.__version__}


def prepare(work: Workload) -> tuple[Any, Any]:
    """The call to time, and a function that converts its result to arrays."""
    if hasattr(os, "sched_setaffinity"):  # XLA starts a thread for each processor on which it may run
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: work.threads])
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", work.dtype == "float64")
    x = jax.numpy.asarray(work.x)
    params = {name: jax.numpy.asarray(array) for name, array in work.params.items()}
    states = tuple(jax.numpy.asarray(state) for state in work.states)
    upstream = tuple(jax.numpy.asarray(array) for array in (work.dy, *work.dstates) if array is not None)

    def call_with(unroll: int) -> Any:
        forward = partial(_forward, work.mode, work.layers, work.directions, unroll)

        def train(x: Any, params: Any, states: Any) -> Any:
            out, vjp = jax.vjp(forward, x, params, states)
            return out, vjp((upstream[0], upstream[1:]))

        run = jax.jit(train if work.training else forward)
        return lambda: jax.block_until_ready(run(x, params, states))

    def arrays(result: Any) -> dict[str, Any]:
        (y, final), gradients = result if work.training else (result, None)
        results = work.outputs(np.asarray(y), [np.asarray(state) for state in final])
        if gradients:
            dx, dparams, dstates = jax.tree_util.tree_map(np.asarray, gradients)
            results.update(work.gradients(dx, dstates, dparams))
        return results

    return fastest([call_with(unroll) for unroll in _UNROLLS]), arrays


def _forward(mode: str, layers: int, directions: str, unroll: int, x: Any, params: Any, states: Any) -> Any:
    """The output (T, N, D*H) and the final states, each (L*D, N, H)."""
    from jax import numpy as jnp

    final = []
    for layer in range(layers):
        y_by_direction = []
        for index, direction in enumerate(directions):
            weights = [params[f"{direction}{layer}_{kind}"] for kind in _KINDS]
            initial = tuple(state[layer * len(directions) + index] for state in states)
            y, last = _scan(mode, unroll, direction == "r", x, weights, initial)
            y_by_direction.append(y)
            final.append(last)
        x = jnp.concatenate(y_by_direction, axis=-1)
    return x, tuple(jnp.stack(state) for state in zip(*final, strict=True))


def _scan(mode: str, unroll: int, reverse: bool, x: Any, weights: Any, initial: Any) -> Any:
    """One layer in one direction."""
    import jax
    from jax import numpy as jnp

    w_x, w_h, b_x, b_h = weights
    one_sum = mode != "gru"  # except in a GRU, both biases are added to the same sum
    inputs = x @ w_x.T + (b_x + b_h if one_sum else b_x)
    w_h = w_h.T

    def step(carry: Any, inputs_t: Any) -> Any:
        recurrent = carry[0] @ w_h
        if mode == "lstm":
            i, f, g, o = jnp.split(inputs_t + recurrent, 4, axis=-1)
            c = jax.nn.sigmoid(f) * carry[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h
        if mode == "gru":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = jnp.split(inputs_t, 3, axis=-1), jnp.split(recurrent + b_h, 3, axis=-1)
            r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
            n = jnp.tanh(x_n + r * h_n)
            h = (1 - z) * n + z * carry[0]
            return (h,), h
        h = (jax.nn.relu if mode == "rnn_relu" else jnp.tanh)(inputs_t + recurrent)
        return (h,), h

    last, y = jax.lax.scan(step, initial, inputs, reverse=reverse, unroll=unroll)
    return y, last
