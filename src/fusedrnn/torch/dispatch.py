"""Which implementation runs a call: the operator, eagerly or through torch's dispatcher, or PyTorch's own.

Only this module, autocast.py and the modules that patch PyTorch depend on its version.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, squeeze_copy, transpose_copy
from torch.autograd import forward_ad

from fusedrnn.torch import eager
from fusedrnn.torch.eligibility import is_compiling
from fusedrnn.torch.network import Results

Run = Callable[..., Results]

# Bound once: attribute lookups are a large part of a small inference call.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active


def runner() -> Run | None:
    """The function that runs a call on plain tensors now; None for PyTorch's own implementation."""
    if is_compiling() or _dispatch_modes():
        return _traced_runner()
    if _tracing_state() is not None or _transforms_active() or forward_ad._current_level >= 0:
        return None
    return eager.run


def _traced_runner() -> Run | None:
    """The runner while a tracer or a mode watches the dispatcher, so that it sees a single operator."""
    if _transforms_active() or forward_ad._current_level >= 0:
        return None
    # torch.export.draft_export would report the None operands of a custom operator as mutated.
    config = sys.modules.get("torch._functorch.config")
    if not torch.compiler.is_dynamo_compiling() and getattr(config, "fake_tensor_propagate_real_tensors", False):
        return None
    from fusedrnn.torch import custom_op

    return custom_op.run


def is_eager(run: Run) -> bool:
    """Whether a call does not pass through torch's dispatcher."""
    return run is eager.run or run is eager.run_under_autocast


# torch.nn returns tensors that are not views, and detach_ refuses views; so eager calls use in-place operations.
# Compilers would replace these by views anyway. Dispatch modes may save what the operator returned, as selective
# checkpoints do, so it must not change: there we copy.


def batch_first(y: Tensor, run: Run) -> Tensor:
    """The output of a call by ``run``, (T, N, features), as (N, T, features)."""
    if is_eager(run):
        return y.transpose_(0, 1)
    return y.transpose(0, 1) if is_compiling() else transpose_copy(y, 0, 1)


def without_first_axis(state: Tensor, run: Run) -> Tensor:
    """A state of a call by ``run``, (1, N, size), as (N, size)."""
    if is_eager(run):
        return state.squeeze_(0)
    return state.squeeze(0) if is_compiling() else squeeze_copy(state, 0)
