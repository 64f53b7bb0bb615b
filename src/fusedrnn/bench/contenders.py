"""Who is compared: ways to run a workload, each checked and timed alike, and the phases they are compared in.

A contender is made from a workload and called with data (t, N, I) of any number of steps. It returns everything it
computed as arrays by name, in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedrnn
from fusedrnn import reference
from fusedrnn.bench.data import Workload

Array = NDArray[Any]
Contender = Callable[[Array], dict[str, Array]]
Maker = Callable[[Workload], Contender]

NON_FUSED, FUSED, TORCH = "non-fused", "fused", "torch.nn"


def non_fused(work: Workload) -> Contender:
    """The network unrolled cell by cell in NumPy: one BLAS GEMM for input and one for state in each cell and step."""

    def run(x: Array) -> dict[str, Array]:
        y, states = reference.forward(work.spec, x, work.params)
        return _named(work, y, states)

    return run


def fused(work: Workload) -> Contender:
    """This package's operator, its own for each workload, so that it goes with it."""
    op = fusedrnn.RNNOp(work.spec)

    def run(x: Array) -> dict[str, Array]:
        y, states, _ = op.forward(x, work.params)
        return _named(work, y, states)

    return run


def torch_nn(work: Workload) -> Contender:
    """PyTorch's module in inference mode, on as many threads as ours."""
    import torch

    spec = work.spec
    torch.set_num_threads(fusedrnn.get_num_threads())
    kind: Any = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(spec.mode, torch.nn.RNN)
    options: dict[str, Any] = {} if kind is not torch.nn.RNN else {"nonlinearity": spec.mode.removeprefix("rnn_")}
    module = kind(
        spec.input_size,
        spec.hidden_size,
        spec.num_layers,
        bidirectional=spec.bidirectional,
        dtype=getattr(torch, spec.dtype),
        **options,
    ).eval()
    weights = spec.layout.unpack(work.params, names="torch")
    module.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()})

    def run(x: Array) -> dict[str, Array]:
        with torch.inference_mode():
            y, states = module(torch.from_numpy(x))
        states = states if isinstance(states, tuple) else (states,)
        return _named(work, y.numpy(), tuple(state.numpy() for state in states))

    return run


def _named(work: Workload, y: Array, states: tuple[Array, ...]) -> dict[str, Array]:
    return {"y": y, **{f"{name}_n": state for name, state in zip(work.spec.state_names, states, strict=True)}}


@dataclass(frozen=True)
class Phase:
    """What is run of a network: its name, whether its work is that of training, and who can run it."""

    name: str
    training: bool
    makers: Mapping[str, Maker]


PHASES: dict[str, Phase] = {
    "inference": Phase("inference", False, {NON_FUSED: non_fused, FUSED: fused, TORCH: torch_nn}),
}
PLANNED = ("training",)
"""Phases that have a name and no contenders yet."""


def phase_named(name: str) -> Phase:
    """The phase of that name.

    Raises:
        NotImplementedError: If it is planned only.
        ValueError: If there is none.
    """
    if name in PLANNED:
        raise NotImplementedError(f"phase {name!r} is not built yet; built: {', '.join(PHASES)}")
    if name not in PHASES:
        raise ValueError(f"unknown phase {name!r}; valid: {', '.join(PHASES)}")
    return PHASES[name]
