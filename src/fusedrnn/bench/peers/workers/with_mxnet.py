"""MXNet's fused RNN operator, gradients by its autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import mxnet

if TYPE_CHECKING:
    from fusedrnn.bench.peers.workers.protocol import Problem


def facts() -> dict[str, str]:
    """Versions."""
    return {"mxnet": mxnet.__version__, "numpy": np.__version__}


def prepare(problem: Problem) -> tuple[Any, Any]:
    """The call to be timed, and what makes arrays of its result."""
    x, flat = mxnet.nd.array(problem.x, dtype=problem.dtype), mxnet.nd.array(problem.flat, dtype=problem.dtype)
    states = [mxnet.nd.array(state, dtype=problem.dtype) for state in problem.states]
    gradients = (problem.dy, *problem.dstates) if problem.training else ()
    upstream = [mxnet.nd.array(gradient, dtype=problem.dtype) for gradient in gradients]

    def forward() -> Any:
        return mxnet.nd.RNN(
            x,
            flat,
            *states,
            state_size=problem.hidden_size,
            num_layers=problem.layers,
            mode=problem.mode,
            bidirectional=problem.bidirectional,
            state_outputs=True,
        )

    def infer() -> Any:
        made = forward()
        mxnet.nd.waitall()
        return made

    given = [x, flat, *states]

    def train() -> Any:
        with mxnet.autograd.record():
            made = forward()
        mxnet.autograd.backward(made, upstream)
        mxnet.nd.waitall()
        return made

    def arrays(made: Any) -> dict[str, Any]:
        y, *final = (output.asnumpy() for output in made)
        found = problem.outputs(y, final)
        if problem.training:
            dx, dflat, *dstates = (array.grad.asnumpy() for array in given)
            found.update(problem.gradients(dx, dstates, problem.cut(dflat)))
        return found

    if problem.training:
        for array in given:
            array.attach_grad()
    return train if problem.training else infer, arrays
