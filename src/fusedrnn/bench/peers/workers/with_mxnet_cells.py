"""MXNet's cells unrolled over all steps and hybridized, with memory and shapes that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from mxnet.gluon import HybridBlock, rnn

import mxnet

if TYPE_CHECKING:
    from fusedrnn.bench.peers.workers.protocol import Problem


def facts() -> dict[str, str]:
    """Versions."""
    return {"mxnet": mxnet.__version__, "numpy": np.__version__}


class Network(HybridBlock):  # type: ignore[misc]
    """All layers, over as many steps as the problem has."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(prefix="")
        self._problem = problem
        self.layers = []
        for layer in range(problem.layers):
            size = problem.input_size if layer == 0 else len(problem.directions) * problem.hidden_size
            cells = [_cell(problem, f"{way}{layer}_", size) for way in problem.directions]
            both = rnn.BidirectionalCell(*cells) if len(cells) == 2 else cells[0]
            self.register_child(both, f"layer{layer}")
            self.layers.append(both)

    def hybrid_forward(self, F: Any, x: Any, *states: Any) -> Any:
        """The output and the final states: h, c of each layer and direction."""
        problem, final = self._problem, []
        each = len(problem.directions) * len(problem.state_names)
        for layer, cell in enumerate(self.layers):
            given = list(states[layer * each : (layer + 1) * each])
            x, last = cell.unroll(len(problem.x), x, given, layout="TNC", merge_outputs=True)
            final += last
        return (x, *final)


def prepare(problem: Problem) -> tuple[Any, Any]:
    """The call to be timed, and what makes arrays of its result."""
    network = Network(problem)
    network.initialize()
    for name, parameter in network.collect_params().items():
        parameter.set_data(mxnet.nd.array(problem.params[name], dtype=problem.dtype))
    network.hybridize(static_alloc=True, static_shape=True)
    x = mxnet.nd.array(problem.x, dtype=problem.dtype)
    states = _one_by_one(problem, problem.states)

    def infer() -> Any:
        made = network(x, *states)
        mxnet.nd.waitall()
        return made

    if not problem.training:
        return infer, lambda made: problem.outputs(made[0].asnumpy(), _by_name(problem, made[1:]))

    upstream = [mxnet.nd.array(problem.dy, dtype=problem.dtype), *_one_by_one(problem, problem.dstates)]
    for array in (x, *states):
        array.attach_grad()

    def train() -> Any:
        with mxnet.autograd.record():
            made = network(x, *states)
        mxnet.autograd.backward(list(made), upstream)
        mxnet.nd.waitall()
        return made

    def arrays(made: Any) -> dict[str, Any]:
        found = problem.outputs(made[0].asnumpy(), _by_name(problem, made[1:]))
        dparams = {name: parameter.grad().asnumpy() for name, parameter in network.collect_params().items()}
        dstates = _by_name(problem, [state.grad for state in states])
        found.update(problem.gradients(x.grad.asnumpy(), dstates, dparams))
        return found

    return train, arrays


def _cell(problem: Problem, prefix: str, input_size: int) -> Any:
    kind = {"lstm": rnn.LSTMCell, "gru": rnn.GRUCell}.get(problem.mode, rnn.RNNCell)
    options = {"activation": problem.mode[4:]} if kind is rnn.RNNCell else {}
    return kind(problem.hidden_size, input_size=input_size, prefix=prefix, **options)


def _one_by_one(problem: Problem, states: list[Any]) -> list[Any]:
    """From states (L*D, N, H) to h and c of each layer and direction in turn."""
    rows = range(len(states[0]))
    return [mxnet.nd.array(state[row], dtype=problem.dtype) for row in rows for state in states]


def _by_name(problem: Problem, states: Any) -> list[Any]:
    """Each state (L*D, N, H), from h and c of each layer and direction in turn."""
    count = len(problem.state_names)
    return [np.stack([state.asnumpy() for state in states[name::count]]) for name in range(count)]
