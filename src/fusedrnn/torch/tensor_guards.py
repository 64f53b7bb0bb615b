"""What machine code compares tensors with."""

from __future__ import annotations

from torch import Tensor

from fusedrnn.engines.cpu.tensor_call import TensorGuard, describe_function

DESCRIBE = describe_function(Tensor)
"""The address of the C function by which machine code reads tensors; 0 if this torch has none."""


def guard_of(tensor: Tensor, symbol: str) -> TensorGuard:
    """The guard of tensors of that shape and those strides."""
    return TensorGuard(tensor, symbol, tensor.shape, tensor.stride())
