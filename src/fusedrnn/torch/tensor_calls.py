"""Tensors to addresses: the operator's calls on plain CPU tensors, without a graph and without the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import torch
from fusedrnn.engines.interface import NULL, GradPointers, PointerEngine, StridedPtr
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.runtime.thread_pool import ThreadTeam
from fusedrnn.spec import RNNSpec
from fusedrnn.torch import saving
from fusedrnn.torch.memory import torch_errors
from fusedrnn.torch.openmp import team
from torch import Tensor

# Networks that are kept at hand, known by the very object that describes them.
_MOST_NETWORKS = 256
# Patterns of operands with gradients, of one network, for which is known what to save.
_MOST_PATTERNS = 64
# What vectors in a reserve are aligned to.
_ALIGNMENT = 64
# Tensors to make others after; not made with a network, which may be asked for where tensors are fakes.
with torch.inference_mode(False):
    _LIKE = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}

Weights = Sequence[Tensor | None]
States = Sequence[Tensor | None]


class Network:
    """A spec and what runs it.

    Attributes:
        spec: The spec.
        engine: Its engine.
        dtype: That of its tensors.
        item: Bytes of an element.
        sizes: Features of a cell's states.
        states: How many these are.
        rows: L·D.
        features: D·S.
        shapes: Those of the weights, in order.
        like: A tensor of their kind, to make others after.
    """

    _known: dict[int, Network] = {}  # noqa: RUF012 -- of the class, by intention

    def __init__(self, spec: RNNSpec) -> None:
        self.spec = spec
        self.engine: PointerEngine = RNNOp.get(spec).by_address()
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.item = self.dtype.itemsize
        self.sizes = [spec.size_of(name) for name in spec.state_names]
        self.states = len(self.sizes)
        self.rows = spec.num_layers * spec.num_directions
        self.features = spec.output_size
        self.shapes = [entry.shape for entry in spec.layout.by_layer_direction]
        self.like = _LIKE[self.dtype]
        self._saved: dict[tuple[tuple[bool, ...], bool], tuple[bool, ...]] = {}

    @classmethod
    def of(cls, spec: RNNSpec) -> Network:
        """The network of that spec: the same one for the same object."""
        found = cls._known.get(id(spec))
        if found is None:
            if len(cls._known) >= _MOST_NETWORKS:
                cls._known.clear()
            found = cls._known[id(spec)] = cls(spec)
        return found

    def saved_operands(self, needed: tuple[bool, ...], several_steps: bool) -> tuple[bool, ...]:
        """:func:`fusedrnn.torch.saving.saved_operands` of the spec, kept for the next call."""
        saved = self._saved.get((needed, several_steps))
        if saved is None:
            if len(self._saved) >= _MOST_PATTERNS:
                self._saved.clear()
            saved = self._saved[needed, several_steps] = saving.saved_operands(self.spec, needed, several_steps)
        return saved

    def new_states(self, x: Tensor, batch: int) -> tuple[Tensor, ...]:
        """New tensors (L·D, N, size) for the states, of the kind of ``x``."""
        return tuple([x.new_empty((self.rows, batch, size)) for size in self.sizes])


class Problem:
    """The shape of one call.

    Args:
        network: What runs.
        x: Input (T, N, I), or (rows, I) with ``batch_sizes``.
        lengths: Valid steps of each sequence, int64 (N,); None for T everywhere.
        batch_sizes: Of a packed sequence, int64 (T,).
    """

    __slots__ = ("batch", "shape", "steps", "varlen")

    def __init__(self, network: Network, x: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> None:
        self.varlen: Any = None
        if batch_sizes is not None:
            sizes = batch_sizes.numpy()
            self.steps, self.batch = len(sizes), int(sizes[0])
            self.varlen = network.engine.varlen_packed(sizes)
            self.shape: tuple[int, ...] = (x.shape[0],)
        else:
            self.steps, self.batch, _ = x.shape
            self.shape = self.steps, self.batch
            if lengths is not None:
                self.varlen = network.engine.varlen(lengths.numpy().astype(np.int64), self.steps)

    def new(self, x: Tensor, features: int) -> Tensor:
        """A new tensor for so many features of each step, of the kind of ``x``, zeros in padding."""
        padded = self.varlen is not None and self.varlen.row_offsets is None
        return (x.new_zeros if padded else x.new_empty)((*self.shape, features))


@torch_errors
def infer(
    network: Network, problem: Problem, x: Tensor, states: States | None, weights: Weights
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output and the final states, nothing kept."""
    crew = team()
    return _run(network, problem, x, states, _weights(network, problem, weights, False, crew), crew)


class Kept(NamedTuple):
    """What a call in training keeps for its backward.

    Attributes:
        reserve: Bytes.
        weights: The bytes of packed ones, or the matrices as they are, apart from what becomes of parameters.
        record: What the engine must know beside them.
    """

    reserve: Tensor
    weights: list[Tensor | None]
    record: Any

    @property
    def packed(self) -> bool:
        """Whether the weights are the bytes of packed ones, not matrices."""
        return len(self.weights) == 1


@torch_errors
def train(
    network: Network, problem: Problem, x: Tensor, states: States | None, weights: Weights, seed: int
) -> tuple[Tensor, tuple[Tensor, ...], Kept]:
    """The same, with what :func:`gradients` needs."""
    crew = team()
    packed = _weights(network, problem, weights, True, crew)
    record, lease = network.engine.allocate_reserve(problem.steps, problem.batch, problem.varlen, "gates", seed)
    kept = Kept(_bytes(lease, record.layout.size), _held(packed, weights), record)
    y, final = _run(network, problem, x, states, packed, crew, record, lease.address)
    return y, final, kept


def _run(
    network: Network,
    problem: Problem,
    x: Tensor,
    states: States | None,
    packed: Any,
    crew: ThreadTeam,
    record: Any = None,
    reserve: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output and the final states; in training, with a record of what to keep, the reserve filled."""
    x, initial = _readable(x), _contiguous(states)
    y = problem.new(x, network.features)
    final = network.new_states(x, problem.batch)
    network.engine.run(
        problem.steps, problem.batch, packed, _strided(network, x), _addresses(initial),
        _strided(network, y), _addresses(final),
        varlen=problem.varlen, residuals=record, reserve=reserve, team=crew,
    )  # fmt: skip
    return y, final


@torch_errors
def kept_again(network: Network, problem: Problem, reserve: Tensor, weights: Weights, seed: int) -> Kept:
    """What :func:`train` keeps, from no more than the reserve, for a call like that one."""
    packed = _weights(network, problem, weights, True, team())
    record, _ = network.engine.allocate_reserve(problem.steps, problem.batch, problem.varlen, "gates", seed)
    return Kept(reserve, _held(packed, weights), record)


@torch_errors
def gradients(
    network: Network, problem: Problem, kept: Kept, dy: Tensor | None, dfinal: States, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, of each initial state and of each weight, in this order, as far as they are wanted.

    None for what is not wanted; a gradient given as None is zero.

    Raises:
        RuntimeError: If a weight's memory has gone.
    """
    count, like = network.states, network.like
    reserve = _aligned(kept.reserve)
    dx = problem.new(like, network.spec.input_size) if wanted[0] else None
    states = network.new_states(like, problem.batch) if True in wanted[1 : 1 + count] else ()
    params = [
        like.new_empty(shape) if want else None for shape, want in zip(network.shapes, wanted[1 + count :], strict=True)
    ]
    memory = kept.weights[0]
    if memory is not None and kept.packed:
        memory = _aligned(memory)
        weights = network.engine.weights_at(packed=memory.data_ptr())
    else:
        weights = network.engine.weights_at(_there(kept.weights))
    dy = None if dy is None else _readable(dy)
    final = _contiguous(dfinal)
    network.engine.run_backward(
        kept.record,
        reserve.data_ptr(),
        weights,
        _strided(network, dy),
        _addresses(final),
        GradPointers(_strided(network, dx), [0 if p is None else p.data_ptr() for p in params], _addresses(states)),
        team(),
    )
    found = [dx, *(states or (None,) * count), *params]
    return [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]


def _held(packed: Any, weights: Weights) -> list[Tensor | None]:
    """What backward needs of a call's weights, whatever the parameters are given to hold meanwhile."""
    if packed.address:
        return [_bytes(packed.lease, len(packed.lease.buffer))]
    return [None if weight is None or weight.dim() == 1 else weight.detach() for weight in weights]


def _there(weights: Weights) -> tuple[int, ...]:
    for weight in weights:
        if weight is not None and weight.untyped_storage().nbytes() < weight.nbytes:
            raise RuntimeError("the memory of a weight was released between forward and backward")
    return _places(weights)


def _aligned(memory: Tensor) -> Tensor:
    """The bytes, moved if they have been elsewhere and come back to a place that vectors do not begin at."""
    if not memory.data_ptr() % _ALIGNMENT:
        return memory
    into = torch.empty(len(memory) + _ALIGNMENT, dtype=torch.uint8)
    return into[-into.data_ptr() % _ALIGNMENT :][: len(memory)].copy_(memory)


def _places(weights: Weights) -> tuple[int, ...]:
    return tuple([0 if weight is None else weight.data_ptr() for weight in weights])


def _weights(network: Network, problem: Problem, weights: Weights, training: bool, crew: ThreadTeam) -> Any:
    # What is packed goes with the memory, not with the tensor: torch.utils.swap_tensors refuses tensors that somebody
    # refers to weakly.
    owner: Any = weights[0].untyped_storage()  # type: ignore[union-attr]
    return network.engine.weights(problem.steps, problem.batch, _places(weights), training, crew, owner)


def _readable(x: Tensor) -> Tensor:
    """The tensor itself, or a copy if elements of its last axis are not side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(states: States | None) -> States:
    if states is None:
        return ()
    return [state if state is None or state.is_contiguous() else state.contiguous() for state in states]


def _addresses(states: States) -> tuple[int, int]:
    """Where h and c are; 0 for what is not there."""
    if not states:
        return 0, 0
    h, c = (*states, None)[:2]
    return 0 if h is None else h.data_ptr(), 0 if c is None else c.data_ptr()


def _strided(network: Network, x: Tensor | None) -> StridedPtr:
    if x is None:
        return NULL
    strides = x.stride()
    return x.data_ptr(), strides[-3] * network.item if len(strides) == 3 else 0, strides[-2] * network.item


def _bytes(lease: Any, size: int) -> Tensor:
    """A reserve's memory as a tensor: it goes back when the tensor goes."""
    memory = torch.from_numpy(np.asarray(lease))
    return memory if len(memory) == size else memory[:size]
