"""Tensors to addresses: the operator's calls on plain CPU tensors, without a graph and without the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedrnn.addresses import NOWHERE, ByAddress, Strided, Wanted
from fusedrnn.engine.threads import Team
from fusedrnn.operator import RNNOp
from fusedrnn.spec import RNNSpec
from fusedrnn.torch.openmp import team

# Networks that are kept at hand, known by the very object that describes them.
_MOST_NETWORKS = 256
# What vectors in a reserve are aligned to.
_ALIGNMENT = 64

Weights = Sequence[Tensor | None]
States = Sequence[Tensor | None]


class Network:
    """A spec and what runs it.

    Attributes:
        spec: The spec.
        engine: Its engine.
        dtype: That of its tensors.
        item: Bytes of an element.
        states: How many states a cell has.
        rows: L·D.
        features: D·H.
    """

    _known: dict[int, Network] = {}  # noqa: RUF012 -- of the class, by intention

    def __init__(self, spec: RNNSpec) -> None:
        self.spec = spec
        self.engine: ByAddress = RNNOp.get(spec).by_address()
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.item = self.dtype.itemsize
        self.states = len(spec.state_names)
        self.rows = spec.num_layers * spec.num_directions
        self.features = spec.output_size

    @classmethod
    def of(cls, spec: RNNSpec) -> Network:
        """The network of that spec: the same one for the same object."""
        found = cls._known.get(id(spec))
        if found is None:
            if len(cls._known) >= _MOST_NETWORKS:
                cls._known.clear()
            found = cls._known[id(spec)] = cls(spec)
        return found

    def new_states(self, x: Tensor, batch: int) -> tuple[Tensor, ...]:
        """New tensors (L·D, N, H) for the states, of the kind of ``x``."""
        shape = self.rows, batch, self.spec.hidden_size
        return (x.new_empty(shape),) if self.states == 1 else (x.new_empty(shape), x.new_empty(shape))


class Problem:
    """The shape of one call.

    Args:
        network: What runs.
        x: Input (T, N, I), or (rows, I) with ``batch_sizes``.
        lengths: Valid steps of each sequence, int64 (N,); None for T everywhere.
        batch_sizes: Of a packed sequence, int64 (T,).
    """

    __slots__ = ("batch", "ragged", "shape", "steps")

    def __init__(self, network: Network, x: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> None:
        self.ragged: Any = None
        if batch_sizes is not None:
            sizes = batch_sizes.numpy()
            self.steps, self.batch = len(sizes), int(sizes[0])
            self.ragged = network.engine.ragged_packed(sizes)
            self.shape: tuple[int, ...] = (x.shape[0],)
        else:
            self.steps, self.batch, _ = self.shape = x.shape
            self.shape = self.steps, self.batch
            if lengths is not None:
                self.ragged = network.engine.ragged(lengths.numpy().astype(np.int64), self.steps)

    def new(self, x: Tensor, features: int) -> Tensor:
        """A new tensor for so many features of each step, of the kind of ``x``, zeros in padding."""
        padded = self.ragged is not None and self.ragged.firsts is None
        return (x.new_zeros if padded else x.new_empty)((*self.shape, features))


def infer(
    network: Network, problem: Problem, x: Tensor, states: States | None, weights: Weights
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output and the final states, nothing kept."""
    crew = team()
    packed = _weights(network, problem, weights, False, crew)
    x, initial = _readable(x), _contiguous(states)
    y = problem.new(x, network.features)
    final = network.new_states(x, problem.batch)
    network.engine.run(
        problem.steps, problem.batch, packed, _strided(network, x), _addresses(initial),
        _strided(network, y), _addresses(final), ragged=problem.ragged, team=crew,
    )  # fmt: skip
    return y, final


def train(
    network: Network, problem: Problem, x: Tensor, states: States | None, weights: Weights, seed: int
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Any]:
    """The same, with a reserve as bytes and what else :func:`gradients` must know."""
    crew = team()
    packed = _weights(network, problem, weights, True, crew)
    kept, lease = network.engine.keeping(problem.steps, problem.batch, packed, problem.ragged, "gates", seed)
    reserve = _bytes(lease, kept.layout.size)
    x, initial = _readable(x), _contiguous(states)
    y = problem.new(x, network.features)
    final = network.new_states(x, problem.batch)
    network.engine.run(
        problem.steps, problem.batch, packed, _strided(network, x), _addresses(initial),
        _strided(network, y), _addresses(final),
        ragged=problem.ragged, kept=kept, reserve=lease.address, team=crew,
    )  # fmt: skip
    return y, final, reserve, kept


def kept_of(network: Network, problem: Problem, weights: Weights, seed: int) -> Any:
    """What :func:`train` returned last, found out again for a call like that one."""
    packed = _weights(network, problem, weights, True, team())
    return network.engine.keeping(problem.steps, problem.batch, packed, problem.ragged, "gates", seed)[0]


def gradients(
    network: Network,
    problem: Problem,
    kept: Any,
    reserve: Tensor,
    dy: Tensor | None,
    dfinal: States,
    weights: Weights,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, of each initial state and of each weight, in this order, as far as they are wanted.

    They are those of the call that filled the reserve. None for what is not wanted; a gradient given as None is zero.
    """
    count = network.states
    if reserve.data_ptr() % _ALIGNMENT:  # it has been elsewhere in between
        _, lease = network.engine.keeping(problem.steps, problem.batch, kept.packed, problem.ragged)
        reserve = _bytes(lease, kept.layout.size).copy_(reserve)
    kind = weights[0]
    assert kind is not None
    dx = problem.new(kind, network.spec.input_size) if wanted[0] else None
    states = network.new_states(kind, problem.batch) if True in wanted[1 : 1 + count] else ()
    params = [
        torch.empty_like(weight) if want and weight is not None else None
        for weight, want in zip(weights, wanted[1 + count :], strict=True)
    ]
    # Weights that are used where they lie may lie elsewhere now.
    moved = kept.packed.address == 0
    packed = _weights(network, problem, weights, True, team()) if moved else None
    dy = None if dy is None else _readable(dy)
    final = _contiguous(dfinal)
    network.engine.differentiate(
        kept,
        reserve.data_ptr(),
        _strided(network, dy),
        _addresses(final),
        Wanted(_strided(network, dx), [0 if p is None else p.data_ptr() for p in params], _addresses(states)),
        packed,
        team(),
    )
    found = [dx, *(states or (None,) * count), *params]
    return [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]


def _weights(network: Network, problem: Problem, weights: Weights, training: bool, crew: Team) -> Any:
    addresses = tuple([0 if weight is None else weight.data_ptr() for weight in weights])
    return network.engine.weights(problem.steps, problem.batch, addresses, training, crew, weights[0])


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


def _strided(network: Network, x: Tensor | None) -> Strided:
    if x is None:
        return NOWHERE
    strides = x.stride()
    return x.data_ptr(), strides[-3] * network.item if len(strides) == 3 else 0, strides[-2] * network.item


def _bytes(lease: Any, size: int) -> Tensor:
    """A reserve's memory as a tensor: it goes back when the tensor goes."""
    memory = torch.from_numpy(np.asarray(lease))
    return memory if len(memory) == size else memory[:size]
