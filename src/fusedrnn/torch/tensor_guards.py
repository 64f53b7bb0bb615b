"""The guards by which machine code checks tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrnn.engines.cpu.tensor_call import TensorGuard, describe_function

DESCRIBE = describe_function(Tensor)
"""The address of the C function by which machine code reads tensors; 0 if this version of torch has none."""


def guard_of(tensor: Tensor, symbol: str | None) -> TensorGuard:
    """The guard for tensors with the shape and strides of this one. Kernels read them at ``symbol``, if at all."""
    return TensorGuard(tensor, symbol, tensor.shape, tensor.stride())


def as_new(template: Tensor) -> Tensor:
    """A tensor with the shape and strides of new tensors that are made like a template, without memory."""
    return torch.empty(template.shape, device="meta")
