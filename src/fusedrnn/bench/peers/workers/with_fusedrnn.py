"""Another revision of fusedrnn, by its public operator."""

from __future__ import annotations

import importlib
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fusedrnn.bench.peers.workers.protocol import Problem

# By name: it is the revision that PYTHONPATH leads to.
fusedrnn = importlib.import_module("fusedrnn")


def facts() -> dict[str, str]:
    """Where it was found."""
    return {"fusedrnn": str(fusedrnn.__file__)}


def prepare(problem: Problem) -> tuple[Any, Any]:
    """The call to be timed, and what makes arrays of its result."""
    fusedrnn.set_num_threads(problem.threads)
    spec = fusedrnn.RNNSpec(
        problem.mode,
        problem.input_size,
        problem.hidden_size,
        problem.layers,
        problem.bidirectional,
        dtype=problem.dtype,
    )
    op, x, params, states = fusedrnn.RNNOp(spec), problem.x, problem.flat, tuple(problem.states)
    if not problem.training:
        frozen = fusedrnn.frozen(params)
        return lambda: op.forward(x, frozen), lambda made: problem.outputs(made[0], made[1])
    places = np.array([at for _, at, _ in problem.layout])
    before = params[places]
    values = cycle((np.nextafter(before, np.inf, dtype=params.dtype), before))
    dx, dparams, dstates = np.empty_like(x), np.empty_like(params), tuple(np.empty_like(state) for state in states)
    dy, upstream = problem.dy, tuple(problem.dstates)

    def train() -> Any:
        params[places] = next(values)  # as an optimizer would, so that every weight must be packed again
        y, final, reserve = op.forward(x, params, states, training=True)
        op.backward(dy, upstream, reserve, out=(dx, dparams, dstates))
        return y, final

    def arrays(made: Any) -> dict[str, Any]:
        return {**problem.outputs(*made), **problem.gradients(dx, dstates, problem.cut(dparams))}

    return train, arrays
