"""Whether a call runs on our operator, in which form, or on PyTorch's own; what depends on PyTorch's version."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch.autograd import forward_ad

import torch
from fusedrnn.torch import eager as call
from fusedrnn.torch.support import is_compiling
from torch import Tensor

Run = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]

# Bound once: an inference call of a small network takes no longer than a few dozen lookups.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active
_any_autocast = torch._C._is_any_autocast_enabled


def _autocast_on_cpu() -> bool:
    try:
        return torch.is_autocast_enabled("cpu")
    except TypeError:  # before torch 2.4 it took no device
        return bool(torch.is_autocast_cpu_enabled())


def runner() -> Run | None:
    """What runs a call made here and now, if its tensors are plain; None: PyTorch's own implementation."""
    if is_compiling() or _dispatch_modes():
        return _traced_runner()
    if (
        _tracing_state() is not None
        or _transforms_active()
        or forward_ad._current_level >= 0
        or (_any_autocast() and _autocast_on_cpu())
    ):
        return None
    return call.run


def _traced_runner() -> Run | None:
    """The same where something watches the dispatcher: the call must be one operator there."""
    if _transforms_active() or forward_ad._current_level >= 0 or _autocast_on_cpu():
        return None
    if _checks_mutations():
        return None
    from fusedrnn.torch import custom_op as ops

    return ops.run


def _checks_mutations() -> bool:
    """Whether ``torch.export.draft_export`` runs, which takes absent operands of a custom operator for changed ones."""
    if torch.compiler.is_dynamo_compiling():
        return False
    config = sys.modules.get("torch._functorch.config")
    return bool(getattr(config, "fake_tensor_propagate_real_tensors", False))
