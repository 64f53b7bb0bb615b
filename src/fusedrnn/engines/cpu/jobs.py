"""The compiled jobs of a cell: inference, training, which is forward that saves for backward, and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fusedrnn.cell.cells import Variant
from fusedrnn.engines.cpu.kernels.backward import build_backward
from fusedrnn.engines.cpu.kernels.common_kernels import build_common, build_common_training
from fusedrnn.engines.cpu.kernels.forward import build_forward
from fusedrnn.engines.cpu.kernels.training import build_training
from fusedrnn.engines.cpu.launch.call_kernel import load_bind, load_guarded_call
from fusedrnn.engines.cpu.plan.sizes import Phase
from fusedrnn.engines.cpu.reserve_layout import ReserveLayout
from fusedrnn.engines.cpu.weights.pack_kernel import load_pack
from fusedrnn.jit.builder import Module
from fusedrnn.jit.loader import Job, fetch, function, load, load_once
from fusedrnn.jit.target import Target
from fusedrnn.runtime.fingerprint import load_fingerprint
from fusedrnn.runtime.thread_pool import load_pool
from fusedrnn.spec import RNNSpec


class Problem(NamedTuple):
    """What a plan depends on besides the spec and the threads.

    Attributes:
        phase: What the call computes.
        steps, batch: T and N.
        layout: The layout of a training call's reserve.
        packed: Whether the weights are packed, as those of a short call need not be.
    """

    phase: Phase
    steps: int
    batch: int
    layout: ReserveLayout | None
    packed: bool


_COMMON = {"common": build_common, "common_training": build_common_training}
# What emits each job, the function to call, and the common modules whose functions it calls.
_JOBS: dict[Phase, tuple[Callable[..., Module], str, tuple[str, ...]]] = {
    "inference": (build_forward, "forward", ("common",)),
    "training": (build_training, "forward", ("common", "common_training")),
    "backward": (build_backward, "backward", ("common", "common_training")),
}


@load_once(64)
def _common(name: str, compute: str, target: Target) -> bytes:
    return fetch(f"{name}_{compute}", target, _COMMON[name], compute, target)


@load_once(128)
def load_job(phase: Phase, variant: Variant, compute: str, target: Target) -> Job:
    """A job of a cell, a format of operands and a target."""
    build, entry, common = _JOBS[phase]
    links = [_common(module, compute, target) for module in common]
    code = load(f"{phase}_{variant.slug}_{compute}", target, build, variant, compute, target, links=links)
    return function(code, entry, 2)


def load_for_calls(phase: Phase, spec: RNNSpec, target: Target) -> Job:
    """A job of a spec, with everything else that any call of it needs, so that no later call compiles."""
    load_bind()
    load_fingerprint()
    load_guarded_call()
    load_pool()
    load_pack(spec.operand_format, target)
    return load_job(phase, spec.variant, spec.operand_format, target)
