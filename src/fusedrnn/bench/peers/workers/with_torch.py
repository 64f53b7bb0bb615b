"""PyTorch's own modules: inference mode, or forward and one call of autograd for all gradients."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fusedrnn.bench.peers.workers.protocol import Problem

_NAMES = {"i2h_weight": "weight_ih", "h2h_weight": "weight_hh", "i2h_bias": "bias_ih", "h2h_bias": "bias_hh"}


def facts() -> dict[str, str]:
    """Versions."""
    return {"torch": torch.__version__}


def prepare(problem: Problem) -> tuple[Any, Any]:
    """The call to be timed, and what makes arrays of its result."""
    torch.set_num_threads(problem.threads)
    module = _module(problem)
    x = torch.from_numpy(problem.x)
    if not problem.training:
        module.eval()

        def infer() -> Any:
            with torch.inference_mode():
                return module(x)

        return infer, lambda made: problem.outputs(made[0].numpy(), [state.numpy() for state in _tuple(made[1])])

    module.train()
    x.requires_grad_(True)
    states = [torch.from_numpy(state).requires_grad_(True) for state in problem.states]
    hx = states[0] if len(states) == 1 else tuple(states)
    upstream = [torch.from_numpy(gradient) for gradient in (problem.dy, *problem.dstates)]
    weights = {ours: module.get_parameter(theirs) for ours, theirs in _names(problem).items()}
    update = _small_update(list(weights.values()))

    def train() -> Any:
        update()
        y, final = module(x, hx)
        made = (y, *_tuple(final))
        return made, torch.autograd.grad(made, [x, *states, *weights.values()], upstream)

    def arrays(result: Any) -> dict[str, Any]:
        y, *final = (output.detach().numpy() for output in result[0])
        dx, *rest = (gradient.numpy() for gradient in result[1])
        dparams = dict(zip(weights, rest[len(states) :], strict=True))
        return {**problem.outputs(y, final), **problem.gradients(dx, rest[: len(states)], dparams)}

    return train, arrays


def _module(problem: Problem) -> Any:
    kind: Any = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(problem.mode, torch.nn.RNN)
    options = {"nonlinearity": problem.mode[4:]} if kind is torch.nn.RNN else {}
    module = kind(
        problem.input_size,
        problem.hidden_size,
        problem.layers,
        bidirectional=problem.bidirectional,
        dtype=getattr(torch, problem.dtype),
        **options,
    )
    names = _names(problem)
    module.load_state_dict({names[name]: torch.from_numpy(weight) for name, weight in problem.params.items()})
    return module


def _names(problem: Problem) -> dict[str, str]:
    """Of parameters: from ours to theirs."""
    names = {}
    for name in problem.params:
        place, _, kind = name.partition("_")
        names[name] = f"{_NAMES[kind]}_l{place[1:]}{'_reverse' if place[0] == 'r' else ''}"
    return names


def _small_update(parameters: list[Any]) -> Any:
    """What changes parameters as an optimizer would, so that none may be kept packed, and no result changes.

    The first element of each goes up by a unit in the last place, at the next call down again.
    """
    firsts = [parameter.detach().view(-1)[:1] for parameter in parameters]  # they share its version
    before = [first.clone() for first in firsts]
    after = [torch.nextafter(first, torch.full_like(first, torch.inf)) for first in before]
    values = cycle((after, before))
    return lambda: torch._foreach_copy_(firsts, next(values))


def _tuple(states: Any) -> tuple[Any, ...]:
    return states if isinstance(states, tuple) else (states,)
