"""Another revision of fusedrnn, through its public operator."""

from __future__ import annotations

import importlib
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.peers.workers.protocol import Workload

# Imported by name, since linters would check an import against this checkout, but PYTHONPATH points to the revision.
fusedrnn = importlib.import_module("fusedrnn")


def facts() -> dict[str, str]:
    """The path of the imported package."""
    return {"fusedrnn": str(fusedrnn.__file__)}


def prepare(work: Workload) -> tuple[Any, Any]:
    """The call to time, and a function that converts its result to arrays."""
    fusedrnn.set_num_threads(work.threads)
    spec = fusedrnn.RNNSpec(
        work.mode,
        work.input_size,
        work.hidden_size,
        work.layers,
        work.bidirectional,
        dtype=work.dtype,
    )
    op, x, params, states = fusedrnn.RNNOp(spec), work.x, work.flat, tuple(work.states)
    if not work.training:
        frozen = fusedrnn.frozen(params)
        return lambda: op.forward(x, frozen), lambda result: work.outputs(result[0], result[1])
    first_elements = np.array([offset for _, offset, _ in work.layout])
    before = params[first_elements]
    values = cycle((np.nextafter(before, np.inf, dtype=params.dtype), before))
    dx, dparams, dstates = np.empty_like(x), np.empty_like(params), tuple(np.empty_like(state) for state in states)
    dy, upstream = work.dy, tuple(work.dstates)

    def train() -> Any:
        params[first_elements] = next(values)  # like an optimizer, so that every weight is packed again
        y, final, reserve = op.forward(x, params, states, training=True)
        op.backward(dy, upstream, reserve, out=(dx, dparams, dstates))
        return y, final

    def arrays(result: Any) -> dict[str, Any]:
        return {**work.outputs(*result), **work.gradients(dx, dstates, work.cut(dparams))}

    return train, arrays
