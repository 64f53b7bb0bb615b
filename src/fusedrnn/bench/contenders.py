"""Who is compared: ways to run a workload, each checked and timed alike, and the phases they are compared in.

A contender is made from a workload and called with batches of it, of any number of steps. What it returns is called
in turn for the arrays that were computed, by name: nobody's conversions to NumPy and to our layout are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np

import fusedrnn
from fusedrnn.bench.computed import (
    FUSED,
    IN_TORCH,
    NON_FUSED,
    TORCH,
    UNPACKED,
    Array,
    Computed,
    Contender,
    Maker,
    gradients,
    outputs,
)
from fusedrnn.bench.data import Batch, Workload
from fusedrnn.bench.torch_modules import fused_in_torch, torch_nn, train_fused_in_torch, train_torch_nn
from fusedrnn.engines.reference import backward as reference_training
from fusedrnn.engines.reference import forward as reference
from fusedrnn.spec import RNNSpec


def non_fused(work: Workload) -> Contender:
    """The network unrolled cell by cell in NumPy: one BLAS GEMM for input and one for state in each cell and step."""

    def run(batch: Batch) -> Computed:
        y, states = reference.forward(work.spec, batch.x, work.params, lengths=batch.lengths)
        return lambda: outputs(work.spec, y, states)

    return run


def fused(work: Workload, backend: str | None = None) -> Contender:
    """This package's operator, its own for each workload, so that it goes with it; on the engine of that name, if any.

    Parameters are frozen, as they are in engines that load a model.

    Raises:
        NotImplementedError: If the engine declines.
    """
    op, params = fusedrnn.RNNOp(work.spec, backend), fusedrnn.frozen(work.params)

    def run(batch: Batch) -> Computed:
        y, states, _ = op.forward(batch.x, params)
        return lambda: outputs(work.spec, y, states)

    return run


def train_non_fused(work: Workload) -> Contender:
    """Forward and backward cell by cell in NumPy."""
    spec = work.spec

    def run(batch: Batch) -> Computed:
        y, states, tape = reference_training.train(spec, batch.x, work.params, batch.states, batch.lengths)
        dx, dparams, dstates = reference_training.backward(spec, tape, batch.dy, batch.dstates)
        return lambda: outputs(spec, y, states) | gradients(spec, dx, dparams, dstates)

    return run


def train_fused(work: Workload, backend: str | None = None) -> Contender:
    """This package's operator as in a training loop: new parameters at every call, the same arrays for gradients.

    Raises:
        NotImplementedError: If the engine of that name declines.
    """
    spec = work.spec
    op = fusedrnn.RNNOp(spec, backend).compile(training=True)
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
        return lambda: outputs(spec, y, states) | gradients(spec, dx, dparams, dstates)

    return run


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


@dataclass(frozen=True)
class Phase:
    """What is run of a network: its name, whether its work is that of training, and who can run it."""

    name: str
    training: bool
    makers: Mapping[str, Maker]

    def on_engine(self, name: str) -> Maker:
        """The operator on the engine of that name."""
        return partial(train_fused if self.training else fused, backend=name)


PHASES: dict[str, Phase] = {
    "inference": Phase(
        "inference",
        False,
        {NON_FUSED: non_fused, FUSED: fused, TORCH: torch_nn, IN_TORCH: fused_in_torch, UNPACKED: fused_in_torch},
    ),
    "training": Phase(
        "training",
        True,
        {
            NON_FUSED: train_non_fused,
            FUSED: train_fused,
            TORCH: train_torch_nn,
            IN_TORCH: train_fused_in_torch,
            UNPACKED: train_fused_in_torch,
        },
    ),
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
