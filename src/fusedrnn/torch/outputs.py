"""Results in the shape that torch.nn returns: tensors of their own, not views, since detach_ refuses views."""

from __future__ import annotations

from fusedrnn.torch import eager as call
from fusedrnn.torch.eligibility import Run
from fusedrnn.torch.support import is_compiling
from torch import Tensor, squeeze_copy, transpose_copy


def batch_first(y: Tensor, run: Run) -> Tensor:
    """The output (N, T, features) of a call by ``run``, from (T, N, features)."""
    if run is call.run:
        return y.transpose_(0, 1)
    # A compiler replaces in-place changes by views anyway; modes may keep what the operator returned (selective
    # checkpoints do) and refuse it once it has changed.
    return y.transpose(0, 1) if is_compiling() else transpose_copy(y, 0, 1)


def one_step(state: Tensor, run: Run) -> Tensor:
    """The state (N, size) of a call by ``run``, from (1, N, size)."""
    if run is call.run:
        return state.squeeze_(0)
    return state.squeeze(0) if is_compiling() else squeeze_copy(state, 0)
