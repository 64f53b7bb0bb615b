"""What contenders are and give: their names, and the arrays they computed, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from fusedrnn.bench.data import Batch, Workload
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
Results = dict[str, Array]
Computed = Callable[[], Results]
Contender = Callable[[Batch], Computed]
Maker = Callable[[Workload], Contender]

NON_FUSED, FUSED, TORCH = "non-fused", "fused", "torch.nn"
IN_TORCH = "fused in torch"
UNPACKED = "fused in torch, unpacked"
"""The same beside a packed batch, on sequences that all have T steps."""


def outputs(spec: RNNSpec, y: Array, states: tuple[Array, ...]) -> Results:
    """What a forward pass gives."""
    return {"y": y, **{f"{name}_n": state for name, state in zip(spec.state_names, states, strict=True)}}


def gradients(spec: RNNSpec, dx: Array, dparams: Array, dstates: tuple[Array, ...]) -> Results:
    """What a backward pass gives, the parameters' in our layout."""
    initial = {f"d{name}0": gradient for name, gradient in zip(spec.state_names, dstates, strict=True)}
    return {"dx": dx, "dparams": dparams, **initial}
