"""The contenders, ways to run a workload that are checked and timed alike; and the two phases of a comparison.

A maker builds a contender from a workload. A contender runs batches of any number of steps. It returns a function that
converts the results to NumPy and to our parameter layout, outside of the timed call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle

import numpy as np

import fusedrnn
from fusedrnn.arrays import Array
from fusedrnn.bench.data import (
    FUSED,
    IN_TORCH,
    NON_FUSED,
    TORCH,
    UNPACKED,
    Batch,
    Contender,
    GetResults,
    Maker,
    Workload,
    gradient_results,
    outputs,
)
from fusedrnn.bench.torch_contenders import torch_nn, train_torch_nn
from fusedrnn.engines.reference import backward as reference_backward
from fusedrnn.engines.reference import forward as reference_forward
from fusedrnn.spec import RNNSpec


def non_fused(work: Workload) -> Contender:
    """The network unrolled cell by cell in NumPy: in each cell and step, a BLAS GEMM for the input and one for h."""

    def run(batch: Batch) -> GetResults:
        y, states = reference_forward.forward(work.spec, batch.x, work.params, lengths=batch.lengths)
        return lambda: outputs(work.spec, y, states)

    return run


def fused(work: Workload, backend: str | None = None) -> Contender:
    """The operator, on the engine ``backend`` if one is named, with frozen parameters as in model serving.

    Raises:
        NotImplementedError: If the engine declines.
    """
    op, params = fusedrnn.RNNOp(work.spec, backend), fusedrnn.frozen(work.params)

    def run(batch: Batch) -> GetResults:
        y, states, _ = op.forward(batch.x, params)
        return lambda: outputs(work.spec, y, states)

    return run


def train_non_fused(work: Workload) -> Contender:
    """Forward and backward cell by cell in NumPy."""
    spec = work.spec

    def run(batch: Batch) -> GetResults:
        y, states, tape = reference_forward.train(spec, batch.x, work.params, batch.states, batch.lengths)
        dx, dparams, dstates = reference_backward.backward(spec, tape, batch.dy, batch.dstates)
        return lambda: outputs(spec, y, states) | gradient_results(spec, dx, dparams, dstates)

    return run


def train_fused(work: Workload, backend: str | None = None) -> Contender:
    """The operator as in a training loop: new parameters at every call, gradients into the same arrays.

    Raises:
        NotImplementedError: If the engine named ``backend`` declines.
    """
    spec = work.spec
    op = fusedrnn.RNNOp(spec, backend).compile(training=True)
    params = work.params.copy()
    update = _small_update(spec, params)
    seed = 0 if spec.drops else None  # the reference has the same masks; without masks, calls have no seed
    dparams = np.empty_like(params)

    @cache
    def grad_buffers(steps: int) -> tuple[Array, Array, tuple[Array, ...]]:
        dstates = tuple(np.empty(shape, spec.dtype) for shape in spec.state_shape(work.case.N))
        return np.empty_like(work.x[:steps]), dparams, dstates

    def run(batch: Batch) -> GetResults:
        update()
        y, states, reserve = op.forward(batch.x, params, batch.states, training=True, seed=seed)
        dx, _, dstates = out = grad_buffers(len(batch.x))
        op.backward(batch.dy, batch.dstates, reserve, out=out)
        return lambda: outputs(spec, y, states) | gradient_results(spec, dx, dparams, dstates)

    return run


def _small_update(spec: RNNSpec, params: Array) -> Callable[[], None]:
    """A function that changes ``params`` like an optimizer, so that every weight is packed again.

    It moves the first element of every weight and bias up by one unit in the last place, and down again at the next
    call. This is too little to change a result beyond the tolerance.
    """
    first_elements = np.array([entry.offset for entry in spec.layout])
    before = params[first_elements]
    values = cycle((np.nextafter(before, np.inf, dtype=params.dtype), before))

    def update() -> None:
        params[first_elements] = next(values)

    return update


@dataclass(frozen=True)
class Phase:
    """A phase, inference or training: its name, whether it computes gradients, and a maker for each contender."""

    name: str
    training: bool
    makers: Mapping[str, Maker]

    def on_engine(self, name: str) -> Maker:
        """The maker for the operator on the engine with that name."""
        return partial(train_fused if self.training else fused, backend=name)


def _phase(name: str, training: bool, non_fused: Maker, fused: Maker, torch: Callable[..., Contender]) -> Phase:
    in_torch: Maker = partial(torch, accelerated=True)
    ours = {FUSED: fused, IN_TORCH: in_torch, UNPACKED: in_torch}
    return Phase(name, training, {NON_FUSED: non_fused, TORCH: torch, **ours})


PHASES: dict[str, Phase] = {
    "inference": _phase("inference", False, non_fused, fused, torch_nn),
    "training": _phase("training", True, train_non_fused, train_fused, train_torch_nn),
}
"""Inference is the forward pass. Training is forward and all gradients, without an optimizer, as on MXNet's page."""
