"""Tensors whose memory was released, as FSDP does by resizing storages to 0. Kernels would read at address 0."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedrnn.torch.network import Network, Tensors


def check_operands(network: Network, x: Tensor, states: Tensors, weights: Tensors) -> None:
    """Refuse operands of a call whose memory was released.

    Raises:
        RuntimeError: If there is such an operand.
    """
    operands = (x, *states, *weights)
    if _are_in_memory(operands):
        return
    initial, entries = network.state_symbols("{}0"), network.spec.layout.by_layer_direction
    after_resets = [f"reset_states[{number}]" for number in range(len(states) - len(initial))]
    _refuse(["x", *initial[: len(states)], *after_resets, *(entry.torch_name for entry in entries)], operands)


def check_cotangents(network: Network, dy: Tensor | None, dfinal: Tensors) -> None:
    """Refuse cotangents whose memory was released.

    Raises:
        RuntimeError: If there is such a cotangent.
    """
    cotangents = (dy, *dfinal)
    if not _are_in_memory(cotangents):
        final = network.state_symbols("d{}_n")
        others = [f"dall_states[{number}]" for number in range(len(dfinal) - len(final))]
        _refuse(["dy", *final, *others], cotangents)


def check_weights(weights: Tensors) -> None:
    """Refuse weights that a call has saved and whose memory was released before its backward.

    Raises:
        RuntimeError: If there is such a weight.
    """
    for weight in weights:
        if weight is not None and weight.untyped_storage().nbytes() < weight.nbytes:
            raise RuntimeError("the memory of a weight was released between forward and backward")


def _are_in_memory(tensors: Tensors) -> bool:
    return all([tensor is None or tensor.data_ptr() or not tensor.numel() for tensor in tensors])


def _refuse(names: Sequence[str], tensors: Tensors) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if not _are_in_memory((tensor,)) and tensor is not None:
            raise RuntimeError(f"{name} must have {tensor.nbytes} bytes of memory; got none, because it was released")
