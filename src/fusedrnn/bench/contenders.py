"""Who is compared: ways to run a workload, each checked and timed alike, and the phases they are compared in.

A contender is made from a workload and called with batches of it, of any number of steps. What it returns is called
in turn for the arrays that were computed, by name: nobody's conversions to NumPy and to our layout are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedrnn
from fusedrnn import reference, reference_training
from fusedrnn.bench.data import Batch, Workload
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
Results = dict[str, Array]
Computed = Callable[[], Results]
Contender = Callable[[Batch], Computed]
Maker = Callable[[Workload], Contender]

NON_FUSED, FUSED, TORCH = "non-fused", "fused", "torch.nn"


def non_fused(work: Workload) -> Contender:
    """The network unrolled cell by cell in NumPy: one BLAS GEMM for input and one for state in each cell and step."""

    def run(batch: Batch) -> Computed:
        y, states = reference.forward(work.spec, batch.x, work.params)
        return lambda: _outputs(work.spec, y, states)

    return run


def fused(work: Workload) -> Contender:
    """This package's operator, its own for each workload, so that it goes with it."""
    op = fusedrnn.RNNOp(work.spec)

    def run(batch: Batch) -> Computed:
        y, states, _ = op.forward(batch.x, work.params)
        return lambda: _outputs(work.spec, y, states)

    return run


def torch_nn(work: Workload) -> Contender:
    """PyTorch's module in inference mode, on as many threads as ours."""
    import torch

    module = _torch_module(work).eval()

    def run(batch: Batch) -> Computed:
        with torch.inference_mode():
            y, states = module(torch.from_numpy(batch.x))
        return lambda: _outputs(work.spec, y.numpy(), tuple(state.numpy() for state in _tuple(states)))

    return run


def train_non_fused(work: Workload) -> Contender:
    """Forward and backward cell by cell in NumPy."""
    spec = work.spec

    def run(batch: Batch) -> Computed:
        y, states, tape = reference_training.train(spec, batch.x, work.params, batch.states)
        dx, dparams, dstates = reference_training.backward(spec, tape, batch.dy, batch.dstates)
        return lambda: _outputs(spec, y, states) | _gradients(spec, dx, dparams, dstates)

    return run


def train_fused(work: Workload) -> Contender:
    """This package's operator as in a training loop: new parameters at every call, the same arrays for gradients."""
    spec = work.spec
    op = fusedrnn.RNNOp(spec)
    params = work.params.copy()
    update = _small_update(spec, params)
    dparams = np.empty_like(params)
    into: dict[int, tuple[Array, tuple[Array, ...]]] = {}

    def run(batch: Batch) -> Computed:
        update()
        y, states, reserve = op.forward(batch.x, params, batch.states, training=True)
        steps = len(batch.x)
        if steps not in into:
            into[steps] = np.empty_like(batch.x), tuple(np.empty_like(state) for state in batch.states)
        dx, dstates = into[steps]
        op.backward(batch.dy, batch.dstates, reserve, out=(dx, dparams, dstates))
        return lambda: _outputs(spec, y, states) | _gradients(spec, dx, dparams, dstates)

    return run


def train_torch_nn(work: Workload) -> Contender:
    """PyTorch's module in training mode, all gradients in one call of autograd, nothing to add them to."""
    import torch

    spec = work.spec
    module = _torch_module(work).train()
    weights = dict(module.named_parameters())

    def run(batch: Batch) -> Computed:
        x, *initial = (torch.from_numpy(array).requires_grad_() for array in (batch.x, *batch.states))
        y, states = module(x, tuple(initial) if len(initial) > 1 else initial[0])
        outputs = (y, *_tuple(states))
        upstream = [torch.from_numpy(array) for array in (batch.dy, *batch.dstates)]
        found = torch.autograd.grad(outputs, [x, *initial, *weights.values()], upstream)

        def computed() -> Results:
            y, *states = (output.detach().numpy() for output in outputs)
            dx, *rest = (gradient.numpy() for gradient in found)
            dstates, dweights = rest[: len(initial)], rest[len(initial) :]
            dparams = spec.layout.pack(dict(zip(weights, dweights, strict=True)), names="torch")
            return _outputs(spec, y, tuple(states)) | _gradients(spec, dx, dparams, tuple(dstates))

        return computed

    return run


def _torch_module(work: Workload) -> Any:
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
    )
    weights = spec.layout.unpack(work.params, names="torch")
    module.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()})
    return module


def _small_update(spec: RNNSpec, params: Array) -> Callable[[], None]:
    """What changes ``params`` as an optimizer would, so that an op must pack every weight again, and no result does.

    The first element of every weight and bias goes up by a unit in the last place, at the next call down again.
    """
    places = np.array([entry.offset for entry in spec.layout])
    before = params[places]
    values = cycle((np.nextafter(before, np.inf, dtype=params.dtype), before))

    def update() -> None:
        params[places] = next(values)

    return update


def _tuple(states: Any) -> tuple[Any, ...]:
    return states if isinstance(states, tuple) else (states,)


def _outputs(spec: RNNSpec, y: Array, states: tuple[Array, ...]) -> Results:
    return {"y": y, **{f"{name}_n": state for name, state in zip(spec.state_names, states, strict=True)}}


def _gradients(spec: RNNSpec, dx: Array, dparams: Array, dstates: tuple[Array, ...]) -> Results:
    initial = {f"d{name}0": gradient for name, gradient in zip(spec.state_names, dstates, strict=True)}
    return {"dx": dx, "dparams": dparams, **initial}


@dataclass(frozen=True)
class Phase:
    """What is run of a network: its name, whether its work is that of training, and who can run it."""

    name: str
    training: bool
    makers: Mapping[str, Maker]


PHASES: dict[str, Phase] = {
    "inference": Phase("inference", False, {NON_FUSED: non_fused, FUSED: fused, TORCH: torch_nn}),
    "training": Phase("training", True, {NON_FUSED: train_non_fused, FUSED: train_fused, TORCH: train_torch_nn}),
}
"""Inference is the forward pass; training is that and all gradients, as on MXNet's page, without an optimizer."""


def phase_named(name: str) -> Phase:
    """The phase of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in PHASES:
        raise ValueError(f"unknown phase {name!r}; valid: {', '.join(PHASES)}")
    return PHASES[name]
