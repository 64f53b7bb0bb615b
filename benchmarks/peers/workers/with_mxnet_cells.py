"""MXNet's cells unrolled over all steps and hybridized, with static memory and shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mxnet
import numpy as np
from mxnet.gluon import HybridBlock, rnn

if TYPE_CHECKING:
    from benchmarks.peers.workers.protocol import Workload


def facts() -> dict[str, str]:
    """Versions."""
    return {"mxnet": mxnet.__version__, "numpy": np.__version__}


class Network(HybridBlock):  # type: ignore[misc]
    """All layers, unrolled over all steps."""

    def __init__(self, work: Workload) -> None:
        super().__init__(prefix="")
        self._work = work
        self.layers = []
        for layer in range(work.layers):
            size = work.input_size if layer == 0 else len(work.directions) * work.hidden_size
            cells = [_cell(work, f"{direction}{layer}_", size) for direction in work.directions]
            cell = rnn.BidirectionalCell(*cells) if len(cells) == 2 else cells[0]
            self.register_child(cell, f"layer{layer}")
            self.layers.append(cell)

    def hybrid_forward(self, F: Any, x: Any, *states: Any) -> Any:
        """The output and the final states: h, c of each layer and direction."""
        work, final = self._work, []
        per_layer = len(work.directions) * len(work.state_names)
        for layer, cell in enumerate(self.layers):
            initial = list(states[layer * per_layer : (layer + 1) * per_layer])
            x, last = cell.unroll(len(work.x), x, initial, layout="TNC", merge_outputs=True)
            final += last
        return (x, *final)


def prepare(work: Workload) -> tuple[Any, Any]:
    """The call to time, and a function that converts its result to arrays."""
    network = Network(work)
    network.initialize()
    for name, parameter in network.collect_params().items():
        parameter.set_data(mxnet.nd.array(work.params[name], dtype=work.dtype))
    network.hybridize(static_alloc=True, static_shape=True)
    x = mxnet.nd.array(work.x, dtype=work.dtype)
    states = _flat_states(work, work.states)

    def infer() -> Any:
        result = network(x, *states)
        mxnet.nd.waitall()
        return result

    if not work.training:
        return infer, lambda result: work.outputs(result[0].asnumpy(), _by_name(work, result[1:]))

    upstream = [mxnet.nd.array(work.dy, dtype=work.dtype), *_flat_states(work, work.dstates)]
    for array in (x, *states):
        array.attach_grad()

    def train() -> Any:
        with mxnet.autograd.record():
            result = network(x, *states)
        mxnet.autograd.backward(list(result), upstream)
        mxnet.nd.waitall()
        return result

    def arrays(result: Any) -> dict[str, Any]:
        results = work.outputs(result[0].asnumpy(), _by_name(work, result[1:]))
        dparams = {name: parameter.grad().asnumpy() for name, parameter in network.collect_params().items()}
        dstates = _by_name(work, [state.grad for state in states])
        results.update(work.gradients(x.grad.asnumpy(), dstates, dparams))
        return results

    return train, arrays


def _cell(work: Workload, prefix: str, input_size: int) -> Any:
    kind = {"lstm": rnn.LSTMCell, "gru": rnn.GRUCell}.get(work.mode, rnn.RNNCell)
    options = {"activation": work.mode[4:]} if kind is rnn.RNNCell else {}
    return kind(work.hidden_size, input_size=input_size, prefix=prefix, **options)


def _flat_states(work: Workload, states: list[Any]) -> list[Any]:
    """States (L*D, N, H) as h and c of each layer and direction."""
    rows = range(len(states[0]))
    return [mxnet.nd.array(state[row], dtype=work.dtype) for row in rows for state in states]


def _by_name(work: Workload, states: Any) -> list[Any]:
    """Each state as (L*D, N, H), from h and c of each layer and direction."""
    count = len(work.state_names)
    return [np.stack([state.asnumpy() for state in states[name::count]]) for name in range(count)]
