"""MXNet's fused RNN operator, with gradients by its autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mxnet
import numpy as np

if TYPE_CHECKING:
    from benchmarks.peers.workers.protocol import Workload


def facts() -> dict[str, str]:
    """Versions."""
    return {"mxnet": mxnet.__version__, "numpy": np.__version__}


def prepare(work: Workload) -> tuple[Any, Any]:
    """The call to time, and a function that converts its result to arrays."""
    x, flat = mxnet.nd.array(work.x, dtype=work.dtype), mxnet.nd.array(work.flat, dtype=work.dtype)
    states = [mxnet.nd.array(state, dtype=work.dtype) for state in work.states]
    gradients = (work.dy, *work.dstates) if work.training else ()
    upstream = [mxnet.nd.array(gradient, dtype=work.dtype) for gradient in gradients]

    def forward() -> Any:
        return mxnet.nd.RNN(
            x,
            flat,
            *states,
            state_size=work.hidden_size,
            num_layers=work.layers,
            mode=work.mode,
            bidirectional=work.bidirectional,
            state_outputs=True,
        )

    def infer() -> Any:
        result = forward()
        mxnet.nd.waitall()
        return result

    arguments = [x, flat, *states]

    def train() -> Any:
        with mxnet.autograd.record():
            result = forward()
        mxnet.autograd.backward(result, upstream)
        mxnet.nd.waitall()
        return result

    def arrays(result: Any) -> dict[str, Any]:
        y, *final = (output.asnumpy() for output in result)
        results = work.outputs(y, final)
        if work.training:
            dx, dflat, *dstates = (array.grad.asnumpy() for array in arguments)
            results.update(work.gradients(dx, dstates, work.cut(dflat)))
        return results

    if work.training:
        for array in arguments:
            array.attach_grad()
    return train if work.training else infer, arrays
