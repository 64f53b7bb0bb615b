"""Networks for the tests, and their oracle: one RNNOp after the other."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedrnn import NetworkSpec, RNNOp, RNNSpec, cells

NETWORKS = {
    "sizes": NetworkSpec.stack("lstm", 9, (17, 12, 5)),
    "cells": NetworkSpec([
        RNNSpec("gru", 6, 20, bidirectional=True), RNNSpec(cells.sru, 40, 40), RNNSpec("lstm", 40, 33, 2),
        RNNSpec("rnn_tanh", 33, 4, reverse=True),
    ]),
    "states": NetworkSpec([RNNSpec(cells.slstm, 5, 16), RNNSpec("lstm", 16, 24, projection_size=10),
                           RNNSpec(cells.layer_norm_gru, 10, 18, bidirectional=True)]),
    "drops": NetworkSpec([RNNSpec(cells.zoneout_lstm, 7, 16), RNNSpec("gru", 16, 16, 2, dropout=0.3),
                          RNNSpec(cells.zoneout_lstm, 16, 8)]),
    "residual": NetworkSpec.stack("lstm", 12, (12, 12, 6), dropout=0.25, input_dropout=0.2, residual="identity"),
    "projected": NetworkSpec.stack("gru", 5, (12, 7), dropout=0.25, bidirectional=True, residual="projection"),
    "double": NetworkSpec.stack("gru", 3, (8, 8, 7), dtype="float64", bidirectional=True),
    "bfloat16": NetworkSpec.stack("lstm", 10, (33, 20), compute="bfloat16"),
    "one": NetworkSpec.stack("lstm", 4, (6,)),
}  # fmt: skip


@dataclass(frozen=True)
class NetworkProblem:
    """A network and the arguments of its calls; ``options`` are arguments of forward that may be left out."""

    spec: NetworkSpec
    x: np.ndarray
    params: np.ndarray
    states: Any
    dy: Any
    dstates: Any
    options: dict


def make_network_problem(spec, T, N, options=(), seed=0):
    """A random problem with the options of forward that ``options`` names."""
    rng = np.random.default_rng([seed, T, N, *sorted(map(len, options))])

    def normal(*shape):
        return rng.standard_normal(shape).astype(spec.dtype)

    def states():
        return tuple(tuple(normal(*shape) for shape in layer) for layer in spec.state_shape(N))

    last = spec.layers[-1]
    every = tuple(normal(T, N, size) for size in last.other_state_features)
    dy = normal(T, N, spec.output_size)
    values = {
        "lengths": rng.permutation(np.arange(N) * T // max(1, N - 1)),
        "resets": rng.random((T, N)) < 0.3,
        "reset_states": states(),
        "all_states": True,
        "reserve": "states",
    }
    params = np.concatenate([
        rng.uniform(-1, 1, layer.layout.size) * layer.hidden_size**-0.5 for layer in spec.layers
    ]).astype(spec.dtype)  # fmt: skip
    return NetworkProblem(
        spec, normal(T, N, spec.input_size), params, states(), (dy, *every) if "all_states" in options else dy,
        states(), {name: values[name] for name in options},
    )  # fmt: skip


def run(op, problem, training=True, grad_req="write", out=None, seed=3):
    """(outputs, final states) of a network's op; in training its gradients follow them."""
    options = problem.options if training else {k: v for k, v in problem.options.items() if k != "reserve"}
    if training:
        options = options | {"seed": seed}
    y, final, reserve = op.forward(problem.x, problem.params, problem.states, training=training, **options)
    if not training:
        return y, final
    return y, final, op.backward(problem.dy, problem.dstates, reserve, grad_req=grad_req, out=out)


def chained(problem, backend=None, training=True, seed=3):
    """The same by one RNNOp after the other."""
    spec, options = problem.spec, dict(problem.options)
    ops = [RNNOp(layer, backend) for layer in spec.layers]
    reset_states = options.pop("reset_states", (None,) * len(ops))
    all_states = options.pop("all_states", False)
    if not training:
        options.pop("reserve", None)
    x, finals, reserves = problem.x, [], []
    for index, (op, part) in enumerate(zip(ops, spec.layout.parts, strict=True)):
        more = {"reset_states": reset_states[index], "all_states": all_states and index == len(ops) - 1}
        if training:
            more["seed"] = spec.layer_seeds(seed)[index]
        x, final, reserve = op.forward(
            x, problem.params[part], problem.states[index], training=training, **options, **more
        )
        finals.append(final)
        reserves.append(reserve)
    if not training:
        return x, tuple(finals)
    dx, gradients = problem.dy, []
    for op, reserve, dstates in zip(ops[::-1], reserves[::-1], problem.dstates[::-1], strict=True):
        dx, *others = op.backward(dx, dstates, reserve)
        gradients.append(others)
    dparams, dinitial, *dreset_states = zip(*gradients[::-1], strict=True)
    return x, tuple(finals), (dx, np.concatenate(dparams), dinitial, *dreset_states)


def flat(results):
    """All arrays of nested tuples, in order."""
    if isinstance(results, tuple | list):
        return [array for entry in results for array in flat(entry)]
    return [results]


def assert_same(actual, expected):
    """Check that two results have the same arrays with the same numbers."""
    actual, expected = flat(actual), flat(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
