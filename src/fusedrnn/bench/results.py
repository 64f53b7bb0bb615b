"""Names of the contenders, and the arrays that they compute, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from fusedrnn.bench.data import Batch, Workload
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
Results = dict[str, Array]
GetResults = Callable[[], Results]
"""Converts what a call computed to NumPy, after the call was timed."""
Contender = Callable[[Batch], GetResults]
"""Runs a batch. Only this call is timed."""
Maker = Callable[[Workload], Contender]

NON_FUSED, FUSED, TORCH = "non-fused", "fused", "torch.nn"
IN_TORCH = "fused in torch"
UNPACKED = "fused in torch, unpacked"
"""The accelerated module on sequences that all have T steps, compared with a packed batch."""
OURS = (FUSED, IN_TORCH, UNPACKED)


def outputs(spec: RNNSpec, y: Array, states: tuple[Array, ...]) -> Results:
    """The results of a forward pass."""
    return {"y": y, **{f"{name}_n": state for name, state in zip(spec.state_names, states, strict=True)}}


def gradient_results(spec: RNNSpec, dx: Array, dparams: Array, dstates: tuple[Array, ...]) -> Results:
    """The results of a backward pass; ``dparams`` is in the layout of ``spec``."""
    dh0_dc0 = {f"d{name}0": gradient for name, gradient in zip(spec.state_names, dstates, strict=True)}
    return {"dx": dx, "dparams": dparams, **dh0_dc0}
