"""Which tensors, lengths and batch sizes the operator accepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.arrays import is_masked

DTYPE_NAMES = {torch.float32: "float32", torch.float64: "float64"}
"""The operator's name for each dtype that it takes."""
MODULE_DTYPES = {**DTYPE_NAMES, torch.bfloat16: "float32", torch.float16: "float32"}
"""The dtype in which the operator runs a module, by the dtype of the module's tensors."""
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# Bound once: attribute lookups are a large part of a small inference call.
is_compiling = torch.compiler.is_compiling
_dispatch_keys = torch._C._dispatch_keys


def _cpu_dispatch_keys() -> tuple[Any, Any]:
    """The dispatch keys of a plain CPU tensor and of one created in inference mode."""
    with torch.inference_mode(False):
        plain = torch.empty(0, device="cpu")
    with torch.inference_mode():
        inference = torch.empty(0, device="cpu")
    return _dispatch_keys(plain), _dispatch_keys(inference)


_PLAIN, _INFERENCE = _cpu_dispatch_keys()


def operator_dtype(x: Any) -> torch.dtype | None:
    """The dtype of a tensor that a module can pass to the operator, else None."""
    cls = type(x)
    if cls is not Tensor and cls is not Parameter and not _is_fake(cls):
        return None
    dtype: torch.dtype = x.dtype
    return dtype if dtype in MODULE_DTYPES and is_plain(x, dtype) else None


def weight_dtype(module: Any) -> torch.dtype:
    """The dtype of a module's parameters, or of its first weight if plain tensors have replaced all parameters."""
    weight: Any = next(module.parameters(), None)
    if weight is None:
        weight = getattr(module, "weight_ih" if isinstance(module, RNNCellBase) else "weight_ih_l0")
    dtype: torch.dtype = weight.dtype
    return dtype


def plan_dtype(module: Any) -> torch.dtype:
    """The dtype of a module's weights, or float32 if the operator lacks it, where the dtype does not matter."""
    dtype = weight_dtype(module)
    return dtype if dtype in MODULE_DTYPES else torch.float32


def is_plain(tensor: Any, dtype: torch.dtype) -> bool:
    """Whether a tensor is ordinary CPU memory of this dtype."""
    cls = type(tensor)
    if cls is Tensor or cls is Parameter:
        if tensor.dtype is not dtype:
            return False
        if is_compiling():
            return tensor.device.type == "cpu" and tensor.layout is torch.strided
        # The keys exclude sparse, quantized, lazily negated, wrapped and meta tensors and other devices at once.
        keys = _dispatch_keys(tensor)
        return bool(keys == _PLAIN or keys == _INFERENCE)  # noqa: SIM109 -- hashes cost more
    return _is_fake(cls) and tensor.dtype is dtype and tensor.device.type == "cpu"


def _is_fake(cls: type) -> bool:
    """Whether PyTorch traces with tensors of this class in place of plain ones."""
    return cls.__module__.startswith("torch._subclasses.") and issubclass(cls, Tensor)


def checked_lengths(lengths: Any, x: Any, batch_first: bool) -> Tensor:
    """Lengths as an int64 CPU tensor (N,).

    Raises:
        TypeError: If they are not integers.
        ValueError: If the number of lengths is not N, a length is not in 0..T, or the input cannot have lengths.
    """
    if isinstance(x, PackedSequence):
        raise ValueError("lengths must be None for a PackedSequence, which has its own")
    if not isinstance(x, Tensor) or x.dim() != 3:
        got = f"{x.dim()}-D" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"lengths need batched 3-D input; got {got}")
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    try:
        # An empty list has no dtype; PyTorch would take its default, which is no integer.
        dtype = torch.int64 if isinstance(lengths, (tuple, list)) and not lengths else None
        if not isinstance(lengths, (Tensor, tuple, list)) and is_masked(lengths):  # PyTorch would drop the mask
            raise TypeError
        tensor = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths must be a tensor or a list of integers; got {lengths!r}") from error
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"lengths must be integers; got {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"lengths must be on the CPU; got {tensor.device}")
    if tensor.dim() != 1 or tensor.shape[0] != batch:
        raise ValueError(f"lengths must have shape ({batch},), one for each sequence; got {tuple(tensor.shape)}")
    tensor = tensor.detach().to(torch.int64)
    # While a graph is traced there are no values; the operator checks them when it runs.
    if not torch.compiler.is_compiling() and batch:
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high > steps:
            raise ValueError(f"lengths must be from 0 to {steps}, the steps of input; got {low} to {high}")
    return tensor


def are_batch_sizes(batch_sizes: Any, rows: int) -> bool:
    """Whether batch sizes are valid for that many packed rows; a user can construct any PackedSequence."""
    if type(batch_sizes) is not Tensor or batch_sizes.dtype is not torch.int64 or batch_sizes.dim() != 1:
        return False
    if not batch_sizes.is_cpu or not len(batch_sizes):
        return False
    sizes = batch_sizes.numpy()
    return bool(sizes[-1] > 0 and sizes.sum() == rows and (sizes[1:] <= sizes[:-1]).all())


def packed_batch(batch_sizes: Tensor, sorted_indices: Tensor | None, hx: Any) -> int:
    """N of a packed sequence. In compilation it comes from another tensor's shape: reading a value breaks the graph."""
    if is_compiling():
        if sorted_indices is not None:
            return sorted_indices.shape[0]
        h0 = hx[0] if isinstance(hx, (tuple, list)) and hx else hx
        if isinstance(h0, Tensor) and h0.dim() == 3:
            return h0.shape[1]
    return int(batch_sizes[0])
