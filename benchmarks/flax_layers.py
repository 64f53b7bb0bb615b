"""The layers of a workload in flax, which needs a newer Python than the operator needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx

from fusedrnn.testing.cases import Case

_CELLS: dict[str, Callable[..., Any]] = {
    "lstm": nnx.OptimizedLSTMCell,
    "gru": nnx.GRUCell,
    "rnn_tanh": nnx.SimpleCell,
    "rnn_relu": partial(nnx.SimpleCell, activation_fn=jax.nn.relu),
}


class Stack(nnx.Module):
    """The layers of a case, time-major."""

    def __init__(self, case: Case, mode: str) -> None:
        rngs = nnx.Rngs(0)
        directions = 1 + case.bidirectional
        layers = []
        for layer in range(case.layers):
            inputs = directions * case.H if layer else case.I
            ways = [nnx.RNN(_CELLS[mode](inputs, case.H, rngs=rngs), time_major=True) for _ in range(directions)]
            layers.append(nnx.Bidirectional(*ways, time_major=True) if case.bidirectional else ways[0])
        self.layers = nnx.List(layers)

    def __call__(self, x: Any) -> Any:
        """The output (T, N, D·H)."""
        for layer in self.layers:
            x = layer(x)
        return x


def split(model: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    """A pure function of (x, params) that runs a model, and its parameters."""
    graph, state = nnx.split(model)
    params, rest = nnx.split_state(state, nnx.Param, ...)
    return lambda x, params: nnx.merge(graph, params, rest, copy=True)(x), params
