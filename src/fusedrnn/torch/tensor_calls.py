"""Calls of the operator on plain CPU tensors by pointer, without autograd and without torch's dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from fusedrnn.engines.interface import NULL, GradPointers, StridedPtr
from fusedrnn.runtime.thread_pool import ThreadTeam
from fusedrnn.torch.network import CallShape, Network, Results, Tensors, check_trainable
from fusedrnn.torch.openmp import team

# The kernels read reserves and packed weights with aligned vector loads.
_ALIGNMENT = 64

P = ParamSpec("P")
Result = TypeVar("Result")


def _torch_memory_errors(function: Callable[P, Result]) -> Callable[P, Result]:
    """Turn MemoryError into the RuntimeError of PyTorch's allocator: tools that reduce the batch look for its text."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **options: P.kwargs) -> Result:
        try:
            return function(*args, **options)
        except MemoryError as error:
            message = f"DefaultCPUAllocator: can't allocate memory for a recurrent layer: {error}"
            raise RuntimeError(message) from error

    return wrapped


class SavedForBackward(NamedTuple):
    """What a training call saves for its backward.

    Attributes:
        reserve: Bytes.
        weights: One tensor with the bytes of the packed weights, or the matrices themselves with None for biases.
            Tensors of their own, whatever happens to the parameters.
        info: The engine's description of the reserve.
        under_autocast: Whether the operands that autocast converts may change before backward.
    """

    reserve: Tensor
    weights: list[Tensor | None]
    info: Any
    under_autocast: bool = False

    @property
    def packed(self) -> bool:
        """Whether the weights are packed."""
        return len(self.weights) == 1


TrainingResults = tuple[Tensor, tuple[Tensor, ...], SavedForBackward]


@_torch_memory_errors
def infer(shape: CallShape, x: Tensor, states: Tensors | None, weights: Tensors) -> Results:
    """The output and the final states; saves nothing."""
    threads = team()
    return _run(shape, x, states, _engine_weights(shape, weights, False, threads), threads)


@_torch_memory_errors
def train(shape: CallShape, x: Tensor, states: Tensors | None, weights: Tensors, seed: int) -> TrainingResults:
    """The output, the final states, and what :func:`backward` needs.

    Raises:
        RuntimeError: If the format of operands is for inference only.
    """
    check_trainable(shape.network.spec)
    threads = team()
    engine_weights = _engine_weights(shape, weights, True, threads)
    info, lease = shape.network.engine.allocate_reserve(shape.steps, shape.batch, shape.varlen, "gates", seed)
    saved = SavedForBackward(_as_tensor(lease, info.layout.size), _saved_weights(engine_weights, weights), info)
    y, final = _run(shape, x, states, engine_weights, threads, info, lease.address)
    return y, final, saved


def _run(
    shape: CallShape, x: Tensor, states: Tensors | None, engine_weights: Any, threads: ThreadTeam,
    info: Any = None, reserve: int = 0,
) -> Results:  # fmt: skip
    """The output and the final states. With ``info``, in training, fills the reserve at that address."""
    network = shape.network
    x, initial = _with_unit_stride(x), _contiguous(states)
    y = shape.new(x, network.output_size)
    final = network.new_states(x, shape.batch)
    network.engine.run(
        shape.steps, shape.batch, engine_weights, _strided_pointer(network, x), _state_pointers(initial),
        _strided_pointer(network, y), _state_pointers(final),
        varlen=shape.varlen, residuals=info, reserve=reserve, team=threads,
    )  # fmt: skip
    return y, final


@_torch_memory_errors
def saved_for(shape: CallShape, reserve: Tensor, weights: Tensors, seed: int) -> SavedForBackward:
    """What :func:`train` saved, rebuilt from the reserve and the arguments of the call."""
    engine_weights = _engine_weights(shape, weights, True, team())
    info, _ = shape.network.engine.allocate_reserve(shape.steps, shape.batch, shape.varlen, "gates", seed)
    return SavedForBackward(reserve, _saved_weights(engine_weights, weights), info)


@_torch_memory_errors
def backward(
    shape: CallShape, saved: SavedForBackward, dy: Tensor | None, dfinal: Tensors, needs_grad: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, each initial state and each weight, in this order; None where ``needs_grad`` is False.

    A cotangent of None is zero.

    Raises:
        RuntimeError: If the memory of a weight was released.
    """
    network = shape.network
    num_states, like, engine = network.num_states, network.like, network.engine
    reserve = _aligned(saved.reserve)
    dx = shape.new(like, network.spec.input_size) if needs_grad[0] else None
    dstates = network.new_states(like, shape.batch) if True in needs_grad[1 : 1 + num_states] else ()
    dweights = [
        like.new_empty(weight_shape) if needed else None
        for weight_shape, needed in zip(network.weight_shapes, needs_grad[1 + num_states :], strict=True)
    ]
    packed = saved.weights[0]
    if packed is not None and saved.packed:
        packed = _aligned(packed)
        engine_weights = engine.weights_at(packed=packed.data_ptr())
    else:
        engine_weights = engine.weights_at(_pointers_of_existing(saved.weights))
    dy = None if dy is None else _with_unit_stride(dy)
    dfinal = _contiguous(dfinal)
    engine.run_backward(
        saved.info, reserve.data_ptr(), engine_weights, _strided_pointer(network, dy), _state_pointers(dfinal),
        GradPointers(_strided_pointer(network, dx), _pointers(dweights), _state_pointers(dstates)), team(),
    )  # fmt: skip
    grads = [dx, *(dstates or (None,) * num_states), *dweights]
    return [grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)]


def _engine_weights(shape: CallShape, weights: Tensors, training: bool, threads: ThreadTeam) -> Any:
    # Packed weights live as long as the storage, not the tensor: torch.utils.swap_tensors refuses tensors with weak
    # references.
    owner: Any = weights[0].untyped_storage()  # type: ignore[union-attr]
    return shape.network.engine.weights(shape.steps, shape.batch, _pointers(weights), training, threads, owner)


def _saved_weights(engine_weights: Any, weights: Tensors) -> list[Tensor | None]:
    if engine_weights.address:
        return [_as_tensor(engine_weights.lease, len(engine_weights.lease.buffer))]
    return [None if weight is None or weight.dim() == 1 else weight.detach() for weight in weights]


def _pointers_of_existing(weights: Tensors) -> tuple[int, ...]:
    for weight in weights:
        if weight is not None and weight.untyped_storage().nbytes() < weight.nbytes:
            raise RuntimeError("the memory of a weight was released between forward and backward")
    return _pointers(weights)


def _aligned(memory: Tensor) -> Tensor:
    """The bytes, copied if a hook on saved tensors has moved them to an unaligned address."""
    if not memory.data_ptr() % _ALIGNMENT:
        return memory
    buffer = torch.empty(len(memory) + _ALIGNMENT, dtype=torch.uint8)
    return buffer[-buffer.data_ptr() % _ALIGNMENT :][: len(memory)].copy_(memory)


def _pointers(tensors: Tensors) -> tuple[int, ...]:
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def _state_pointers(states: Tensors) -> tuple[int, int]:
    """The pointers of h and c; 0 for a missing one."""
    if not states:
        return 0, 0
    h, c = (*states, None)[:2]
    return 0 if h is None else h.data_ptr(), 0 if c is None else c.data_ptr()


def _strided_pointer(network: Network, x: Tensor | None) -> StridedPtr:
    if x is None:
        return NULL
    strides = x.stride()
    return x.data_ptr(), strides[-3] * network.item if len(strides) == 3 else 0, strides[-2] * network.item


def _with_unit_stride(x: Tensor) -> Tensor:
    """The tensor, copied if the stride of its last axis is not 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(states: Tensors | None) -> Tensors:
    if states is None:
        return ()
    return [state if state is None or state.is_contiguous() else state.contiguous() for state in states]


def _as_tensor(lease: Any, size: int) -> Tensor:
    """Leased memory as a tensor, which returns the lease when it is freed."""
    memory = torch.from_numpy(np.asarray(lease))
    return memory if len(memory) == size else memory[:size]
