"""The planned call for a problem: its kernel arguments for threads that sleep, for threads that spin, and for one."""

from __future__ import annotations

from typing import NamedTuple

from fusedrnn.engines.cpu.jobs import JobName
from fusedrnn.engines.cpu.launch.kernel_args import KernelArgs, PlannedJob
from fusedrnn.engines.cpu.launch.struct_fields import lay_out_args
from fusedrnn.engines.cpu.plan.plans import make_plan
from fusedrnn.engines.cpu.reserve_layout import ReserveLayout
from fusedrnn.engines.cpu.tuning import Tuning
from fusedrnn.engines.cpu.weights.cache import WeightCache
from fusedrnn.jit.loader import Job


class Problem(NamedTuple):
    """What a plan depends on besides the spec and the threads.

    Attributes:
        job: What the call computes.
        steps, batch: T and N.
        layout: The layout of a training call's reserve.
        packed: Whether the weights are packed, as those of a short call need not be.
    """

    job: JobName
    steps: int
    batch: int
    layout: ReserveLayout | None
    packed: bool


class PlannedCall(PlannedJob[KernelArgs]):
    """The kernel arguments for a problem, and the panels of the weights that it reads.

    With ``directions_apart`` the output of inference is (T, D, N, S), not (T, N, D·S).
    """

    def __init__(
        self, weights: WeightCache, tuning: Tuning, problem: Problem, job: Job, threads: int,
        directions_apart: bool = False,
    ) -> None:  # fmt: skip
        self.tiling, self.problem, self._directions_apart = weights.tiling, problem, directions_apart
        self._weights, self._tuning = weights.layout.layer_dirs, tuning
        super().__init__(problem.job, job, threads)

    def _plan(self, threads: int, spinning: bool = False) -> KernelArgs:
        name, steps, batch, layout, packed = self.problem
        spec = self.tiling.spec
        plan = make_plan(
            spec, self.tiling.target, steps, batch, threads, "inference" if name == "forward" else name,
            recompute=layout is not None and layout.save == "states", spinning=spinning, packed=packed,
            tuning=self._tuning,
        )  # fmt: skip
        return lay_out_args(spec, plan, self._weights, layout, self._directions_apart)
