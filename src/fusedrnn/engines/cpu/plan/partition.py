"""How a problem is divided among threads: the possible grids, the cheapest of them, and who has which part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.kernels.stages import is_plain, lowered_cell
from fusedrnn.engines.cpu.kernels.tiling import Tiling
from fusedrnn.engines.cpu.plan.cost import adjusted_cost, predict_cost
from fusedrnn.engines.cpu.plan.sizes import ProblemSize, ThreadGrid, ThreadShare
from fusedrnn.engines.cpu.plan.thread_trials import Forecast
from fusedrnn.engines.cpu.tuning import Tuning
from fusedrnn.jit.sync import PROGRESS_BYTES
from fusedrnn.jit.target import Target
from fusedrnn.spec import RNNSpec

ONE_THREAD = ThreadGrid(1, 1, 1)
_forced_grid: ContextVar[ThreadGrid | None] = ContextVar("fusedrnn_grid", default=None)


class Partition:
    """What the plans of forward and backward have in common.

    Attributes:
        steps, batch: T and N.
        grid: How threads divide the problem.
        chunk: Steps of an input GEMM, in backward of one for dx.
        bounds: By the names of the kernels' fields: the first row or unit vector of each group, and the end.
        fields: Offsets and strides by the names of the kernels' fields. Offsets of regions are relative to a region of
            which there are several, such as a thread's scratch, others to the workspace.
        zeroed_bytes: Bytes at the start of the workspace, for barriers and progress, that must be zero.
        size: Bytes of the workspace.
        forecast: Predicted times; None on one thread or if a grid was forced.
    """

    steps: int
    batch: int
    grid: ThreadGrid
    chunk: int
    forecast: Forecast | None
