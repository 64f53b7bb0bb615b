"""Checks of single tensors that operators in torch's registry take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def name_of(names: Sequence[str], more: str, index: int) -> str:
    """The name of an argument: one of these names, or that of an element of the list ``more``, which follows them."""
    return names[index] if index < len(names) else f"{more}[{index - len(names)}]"


def check_tensor(name: str, tensor: Tensor, shape: Sequence[Any], x: Tensor) -> None:
    """Refuse a tensor of another shape, or of another dtype or device than x. In the shape, None matches any size."""
    if not has_shape(tensor, shape) or tensor.dtype is not x.dtype or tensor.device != x.device:
        raise mismatch(name, tensor, shape, x)


def has_shape(tensor: Tensor, shape: Sequence[Any]) -> bool:
    """Whether a tensor has a shape, in which None and symbolic sizes match any size."""
    return tensor.dim() == len(shape) and not any(
        isinstance(size, int) and isinstance(expected, int) and size != expected
        for size, expected in zip(tensor.shape, shape, strict=True)
    )


def mismatch(
    name: str, tensor: Tensor, shape: Sequence[Any], x: Tensor, dtype: torch.dtype | None = None
) -> RuntimeError:
    """The error for a tensor of another shape, or of another dtype or device than x; in the shape, None is N."""
    expected = ", ".join("N" if size is None else str(size) for size in shape)
    return RuntimeError(
        f"{name} must have shape ({expected}), dtype {dtype or x.dtype} and device {x.device}, as x has; "
        f"got shape {shape_of(tensor)}, {tensor.dtype}, {tensor.device}"
    )


def shape_of(tensor: Tensor) -> str:
    """The shape of a tensor, as errors print it."""
    return str(tuple(tensor.shape))
