"""JAX: a scan over the cell under jit, the inputs' GEMM of all steps ahead; gradients by vjp in the same program."""

from __future__ import annotations

import importlib
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fusedrnn.bench.peers.workers.protocol import Problem

fastest = importlib.import_module("fastest").fastest

_UNROLLS = (1, 2, 4)
"""Steps in one iteration of the compiled loop: all are tried, the fastest is kept."""

_KINDS = ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias")


def facts() -> dict[str, str]:
    """Versions."""
    import jax

    return {"jax": jax.__version__}


def prepare(problem: Problem) -> tuple[Any, Any]:
    """The call to be timed, and what makes arrays of its result."""
    if hasattr(os, "sched_setaffinity"):  # XLA makes as many threads as there are processors to run on
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: problem.threads])
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", problem.dtype == "float64")
    x = jax.numpy.asarray(problem.x)
    params = {name: jax.numpy.asarray(array) for name, array in problem.params.items()}
    states = tuple(jax.numpy.asarray(state) for state in problem.states)
    upstream = tuple(jax.numpy.asarray(array) for array in (problem.dy, *problem.dstates) if array is not None)

    def calling(unroll: int) -> Any:
        forward = partial(_forward, problem.mode, problem.layers, problem.directions, unroll)

        def train(x: Any, params: Any, states: Any) -> Any:
            made, pull = jax.vjp(forward, x, params, states)
            return made, pull((upstream[0], upstream[1:]))

        run = jax.jit(train if problem.training else forward)
        return lambda: jax.block_until_ready(run(x, params, states))

    def arrays(result: Any) -> dict[str, Any]:
        (y, final), gradients = result if problem.training else (result, None)
        found = problem.outputs(np.asarray(y), [np.asarray(state) for state in final])
        if gradients:
            dx, dparams, dstates = jax.tree_util.tree_map(np.asarray, gradients)
            found.update(problem.gradients(dx, dstates, dparams))
        return found

    return fastest([calling(unroll) for unroll in _UNROLLS]), arrays


def _forward(mode: str, layers: int, directions: str, unroll: int, x: Any, params: Any, states: Any) -> Any:
    """The output (T, N, D*H) and the final states, each (L*D, N, H)."""
    from jax import numpy as jnp

    final = []
    for layer in range(layers):
        ways = []
        for way, direction in enumerate(directions):
            weights = [params[f"{direction}{layer}_{kind}"] for kind in _KINDS]
            first = tuple(state[layer * len(directions) + way] for state in states)
            y, last = _scan(mode, unroll, direction == "r", x, weights, first)
            ways.append(y)
            final.append(last)
        x = jnp.concatenate(ways, axis=-1)
    return x, tuple(jnp.stack(each) for each in zip(*final, strict=True))


def _scan(mode: str, unroll: int, reverse: bool, x: Any, weights: Any, first: Any) -> Any:
    """One layer in one direction."""
    import jax
    from jax import numpy as jnp

    w_x, w_h, b_x, b_h = weights
    merged = mode != "gru"  # elsewhere both biases are added to the same sum
    inputs = x @ w_x.T + (b_x + b_h if merged else b_x)
    w_h = w_h.T

    def step(carry: Any, given: Any) -> Any:
        recurrent = carry[0] @ w_h
        if mode == "lstm":
            i, f, g, o = jnp.split(given + recurrent, 4, axis=-1)
            c = jax.nn.sigmoid(f) * carry[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h
        if mode == "gru":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = jnp.split(given, 3, axis=-1), jnp.split(recurrent + b_h, 3, axis=-1)
            r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
            n = jnp.tanh(x_n + r * h_n)
            h = (1 - z) * n + z * carry[0]
            return (h,), h
        h = (jax.nn.relu if mode == "rnn_relu" else jnp.tanh)(given + recurrent)
        return (h,), h

    last, y = jax.lax.scan(step, first, inputs, reverse=reverse, unroll=unroll)
    return y, last
