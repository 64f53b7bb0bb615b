"""Calls of the operator on plain CPU tensors by address, without autograd and without torch's dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from fusedrnn.engines.cpu.state_options import StateOptions
from fusedrnn.engines.interface import NULL, GradAddresses, StridedAddress
from fusedrnn.runtime.thread_pool import ThreadTeam
from fusedrnn.torch.network import CallShape, Network, Results, Tensors, check_trainable, template
from fusedrnn.torch.openmp import team
from fusedrnn.torch.released_memory import check_cotangents, check_operands, check_weights

# The kernels read reserves and packed weights with aligned vector loads.
ALIGNMENT = 64
"""The alignment of the address of a reserve or of packed weights."""
# The most bytes of a reserve for which torch's allocator is fast, since it finds them in the heap.
_SMALL_RESERVE = 64 << 10

Function = TypeVar("Function", bound=Callable[..., Any])


def torch_memory_errors(function: Function) -> Function:
    """Turn MemoryError into the RuntimeError of PyTorch's allocator. Tools that reduce the batch look for its text."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        try:
            return function(*args)
        except MemoryError as error:
            message = f"DefaultCPUAllocator: can't allocate memory for a recurrent layer: {error}"
            raise RuntimeError(message) from error

    return cast(Function, wrapped)


class SavedForBackward(NamedTuple):
    """What a training call saves for its backward.

    Attributes:
        reserve: The reserve, a tensor of bytes.
        weights: One tensor with the bytes of the packed weights, or the matrices themselves with None for biases. They
            are separate tensors, which do not change if a parameter gets other memory.
        call: The call, as the executor describes it.
        under_autocast: Whether the operands that autocast converts may change before backward.
    """

    reserve: Tensor
    weights: list[Tensor | None]
    call: Any
    under_autocast: bool = False

    @property
    def packed(self) -> bool:
        """Whether the weights are packed."""
        return len(self.weights) == 1


TrainingResults = tuple[Any, tuple[Tensor, ...], SavedForBackward]


@torch_memory_errors
def infer(
    shape: CallShape, x: Tensor, states: Tensors | None, weights: Tensors, executor_weights: Any = None
) -> Results:
    """The output and the final states; saves nothing. ``executor_weights`` are in the executor's form, or None.

    Raises:
        RuntimeError: If the memory of an operand was released.
    """
    check_operands(shape.network, x, states or (), weights)
    threads = team()
    return _run(shape, x, states, executor_weights or _executor_weights(shape, weights, False, threads), threads)


@torch_memory_errors
def train(
    shape: CallShape, x: Tensor, states: Tensors | None, weights: Tensors, seed: int, executor_weights: Any = None
) -> TrainingResults:
    """The output, the final states, and what :func:`backward` needs. ``executor_weights`` is as in :func:`infer`.

    Raises:
        RuntimeError: If the format of GEMM operands is for inference only, or the memory of an operand was released.
    """
    check_trainable(shape.network.spec)
    check_operands(shape.network, x, states or (), weights)
    threads = team()
    executor_weights = executor_weights or _executor_weights(shape, weights, True, threads)
    call = shape.network.executor.training_call(
        shape.steps, shape.batch, shape.varlen, "gates", seed, shape.resets
    )
    reserve, address = new_reserve(shape.network.executor, call.layout.size)
    saved = SavedForBackward(reserve, _saved_weights(executor_weights, weights), call)
    y, final = _run(shape, x, states, executor_weights, threads, call, address)
    return y, final, saved


def new_reserve(executor: Any, size: int) -> tuple[Tensor, int]:
    """A tensor of ``size`` bytes, and its address. A large one reuses memory of an earlier one, whose pages exist."""
    if size <= _SMALL_RESERVE:
        reserve = torch.empty_like(template(torch.uint8, (size,)))
        address = reserve.data_ptr()
        if not address % ALIGNMENT:
            return reserve, address
    lease = executor.lease_reserve(size)
    return _as_tensor(lease, size), lease.address


def _run(
    shape: CallShape, x: Tensor, states: Tensors | None, executor_weights: Any, threads: ThreadTeam,
    call: Any = None, reserve: int = 0,
) -> Results:  # fmt: skip
    """The output and the final states. In training, with ``call``, this also fills the reserve at that address."""
    network = shape.network
    x, before = _with_unit_stride(x), contiguous(states or ())
    initial, reset_states = before[: network.num_states], before[network.num_states :]
    final, others = shape.new_states(x), shape.new_all_states(x)
    y = None if shape.is_cell else shape.new(x, network.output_size)
    network.executor.run(
        shape.steps, shape.batch, executor_weights, strided_address(network, x), network.state_addresses(initial),
        ((final[0] if y is None else y).data_ptr(), *shape.output_strides), network.state_addresses(final),
        varlen=shape.varlen, call=call, reserve=reserve, team=threads,
        options=_options(shape, reset_states, others),
    )  # fmt: skip
    return y, (*final, *others)


def _options(shape: CallShape, reset_states: Tensors, all_states: Tensors) -> StateOptions | None:
    """The options of resets and of every state of every step; None if the call has neither."""
    if shape.resets is None and not all_states:
        return None
    before = (0,) * shape.network.spec.output_is_state
    return StateOptions(shape.resets, addresses_of(reset_states), before + addresses_of(all_states))


@torch_memory_errors
def saved_for(shape: CallShape, reserve: Tensor, weights: Tensors, seed: int) -> SavedForBackward:
    """What :func:`train` saved, rebuilt from the reserve and the arguments of the call."""
    executor_weights = _executor_weights(shape, weights, True, team())
    call = shape.network.executor.training_call(
        shape.steps, shape.batch, shape.varlen, "gates", seed, shape.resets
    )
    return SavedForBackward(reserve, _saved_weights(executor_weights, weights), call)


@torch_memory_errors
def backward(
    shape: CallShape, saved: SavedForBackward, dy: Tensor | None, dfinal: Tensors, needs_grad: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, each state and each weight, in this order; None where ``needs_grad`` is False.

    A cotangent of None is zero.

    Raises:
        RuntimeError: If the memory of a weight or of a cotangent was released.
    """
    check_cotangents(shape.network, dy, dfinal)
    network = shape.network
    num_states, like, executor = network.num_states, network.like, network.executor
    first_weight = len(needs_grad) - len(network.weight_shapes)
    reserve = _aligned(saved.reserve)
    dx = shape.new(like, network.spec.input_size) if needs_grad[0] else None
    dstates = shape.new_states(like) if True in needs_grad[1 : 1 + num_states] else ()
    dreset: Tensors = (None,) * (first_weight - 1 - num_states)
    if True in needs_grad[1 + num_states : first_weight]:
        dreset = [like.new_zeros(size) for size in shape.state_shapes]  # zeros, because kernels add to them
    dweights = _new_weight_grads(network, needs_grad[first_weight:])
    packed = saved.weights[0]
    if packed is not None and saved.packed:
        packed = _aligned(packed)
        executor_weights = executor.weights_at(packed=packed.data_ptr())
    else:
        check_weights(saved.weights)
        executor_weights = executor.weights_at(addresses_of(saved.weights))
    dy, dfinal = readable(dy, dfinal)
    dfinal, dothers = dfinal[:num_states], dfinal[num_states:]
    executor.run_backward(
        saved.call, reserve.data_ptr(), executor_weights, strided_address(network, dy), network.state_addresses(dfinal),
        GradAddresses(strided_address(network, dx), addresses_of(dweights), network.state_addresses(dstates)), team(),
        _options(shape, dreset, dothers),
    )  # fmt: skip
    for first, last in network.adjacent_weights:  # callers do not expect shared memory
        dweights[first:last] = [grad if grad is None else grad.clone() for grad in dweights[first:last]]
    grads = [dx, *(dstates or (None,) * num_states), *dreset, *dweights]
    return [grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)]


def _new_weight_grads(network: Network, needs_grad: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the gradients of weights that need one, and of weights whose gradients kernels write next to them."""
    new_empty = network.like.new_empty
    grads = [new_empty(shape) if need else None for shape, need in zip(network.weight_shapes, needs_grad, strict=True)]
    for first, last in network.adjacent_weights:
        if True in needs_grad[first:last]:
            grads[first:last] = new_empty((last - first, *network.weight_shapes[first])).unbind()
    return grads


def _executor_weights(shape: CallShape, weights: Tensors, training: bool, threads: ThreadTeam) -> Any:
    addresses, owner = addresses_of(weights), owner_of(weights)
    return shape.network.executor.weights(shape.steps, shape.batch, addresses, training, threads, owner)


def owner_of(weights: Tensors) -> Any:
    """The object with which the packed weights of these weights are dropped.

    It is a storage rather than a tensor, since torch.utils.swap_tensors refuses tensors that have weak references.
    """
    return weights[0].untyped_storage()  # type: ignore[union-attr]


def _saved_weights(executor_weights: Any, weights: Tensors) -> list[Tensor | None]:
    return [packed_tensor(executor_weights)] if executor_weights.address else own_tensors(weights)


def packed_tensor(packed: Any) -> Tensor:
    """A tensor with the bytes of packed weights."""
    return _as_tensor(packed.lease, len(packed.lease.buffer))


def own_tensors(weights: Tensors) -> list[Tensor | None]:
    """Tensors with the current memory of the matrices, even if a parameter gets other memory later; None for biases."""
    return [None if weight is None or weight.dim() == 1 else weight.detach() for weight in weights]


def restored(memory: Tensor, size: int) -> Tensor:
    """Saved bytes as autograd returns them, made contiguous.

    Raises:
        RuntimeError: If a hook on saved tensors has returned something other than ``size`` bytes on the CPU.
    """
    if memory.dtype is not torch.uint8 or memory.shape != (size,) or not memory.is_cpu:
        raise RuntimeError(
            f"a hook on saved tensors must return the tensor that was saved, shape ({size},), torch.uint8, cpu; "
            f"got shape {tuple(memory.shape)}, {memory.dtype}, {memory.device}"
        )
    return memory.contiguous()


def _aligned(memory: Tensor) -> Tensor:
    """The bytes, copied if a hook on saved tensors has moved them to an unaligned address."""
    if not memory.data_ptr() % ALIGNMENT:
        return memory
    buffer = torch.empty(len(memory) + ALIGNMENT, dtype=torch.uint8, device="cpu")
    return buffer[-buffer.data_ptr() % ALIGNMENT :][: len(memory)].copy_(memory)


def addresses_of(tensors: Tensors) -> tuple[int, ...]:
    """The address of each tensor; 0 for None."""
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def strided_address(network: Network, x: Tensor | None) -> StridedAddress:
    """The address of an input, an output or their gradient, with the bytes between steps and between rows."""
    if x is None:
        return NULL
    strides = x.stride()
    num_axes = len(strides)
    step = strides[0] * network.item if num_axes == 3 else 0
    return x.data_ptr(), step, strides[-2] * network.item if num_axes > 1 else 0


def readable(y: Tensor | None, states: Tensors) -> tuple[Tensor | None, list[Tensor | None]]:
    """Cotangents of an output and of states in a form that the kernels read, copied if necessary."""
    return None if y is None else _with_unit_stride(y), contiguous(states)


def _with_unit_stride(x: Tensor) -> Tensor:
    """The tensor, copied if the stride of its last axis is not 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(tensors: Tensors) -> list[Tensor | None]:
    """The tensors, copied if they are not contiguous; None stays None."""
    return [tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]


def _as_tensor(lease: Any, size: int) -> Tensor:
    """Leased memory as a tensor, which returns the lease when it is freed."""
    memory = torch.from_numpy(np.asarray(lease))
    return memory if len(memory) == size else memory[:size]
