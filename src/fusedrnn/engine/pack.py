"""Weights in the order in which the kernels stream them, packed again only when they have changed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.codegen import packing
from fusedrnn.codegen.target import Target
from fusedrnn.engine import machine
from fusedrnn.engine.locks import Lock
from fusedrnn.engine.plan import Geometry, lines
from fusedrnn.engine.threads import borrow_gang, get_num_threads
from fusedrnn.engine.workspace import Lease, Pool
from fusedrnn.spec import Kind, Parameter, RNNSpec

Array = NDArray[Any]
# Different parameter vectors that one op keeps packed at a time.
_MOST_KEPT = 4
_KINDS: tuple[Kind, ...] = ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias")
# Bytes worth a job for the gang.
_WORTH_A_JOB = 1 << 20


@dataclass(frozen=True)
class PackedPass:
    """The addresses of one layer's and direction's packed weights and biases; the last two are for backward."""

    x_weights: int
    h_weights: int
    x_bias: int
    h_bias: int
    x_back: int
    h_back: int


@dataclass(frozen=True)
class Packed:
    """All packed weights of a parameter vector, and what tells whether they still are its.

    Its memory is its own for as long as anyone holds it: a reserve, say, whose parameters have changed since.
    """

    passes: tuple[PackedPass, ...]
    lease: Lease
    source: Array | None
    fingerprint: bytes
    training: bool


class Packer:
    """Packs a spec's parameters and keeps the result until they change. Safe under threads."""

    def __init__(self, spec: RNNSpec, target: Target, geometry: Geometry, merged: bool) -> None:
        self._spec, self._target, self._geometry, self._merged = spec, target, geometry, merged
        self._kept: OrderedDict[int, Packed] = OrderedDict()
        self._lock = Lock()
        self._pool = Pool()
        self._entries = [
            [spec.layout.entry(layer, direction, kind) for kind in _KINDS]
            for layer in range(spec.num_layers)
            for direction in range(spec.num_directions)
        ]
        places = [(entry.offset, entry.size) for entries in self._entries for entry in entries]
        self._parts = np.array(places, np.int64) * geometry.item

    def packed(self, params: Array, training: bool = False) -> Packed:
        """The packed form of the flat parameters as they are now, in training with what backward needs.

        A frozen array is known by its identity; any other is fingerprinted at every call.
        """
        address = params.ctypes.data
        with self._lock:
            kept = self._kept.get(address)
            if kept is not None and training and not kept.training:
                kept = None
            if kept is not None and kept.source is params:
                self._kept.move_to_end(address)
                return kept
            if kept is None or kept.fingerprint != machine.fingerprint(params, self._parts):
                del kept
                self._kept.pop(address, None)  # so that its memory can serve again
                kept = self._kept[address] = self._pack(params, training)
                if len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(address)
            return kept

    def _pack(self, params: Array, training: bool) -> Packed:
        sizes = [self._sizes(entries, training) for entries in self._entries]
        # A training loop packs at every step: its copy of the parameters is worth keeping the memory.
        flat = lines(params.nbytes) if training else 0
        lease = self._pool.lease(flat + sum(map(sum, sizes)))
        # What is packed is what is fingerprinted, whatever another thread writes meanwhile.
        own = lease.buffer[: params.nbytes].view(params.dtype) if training else np.empty_like(params)
        np.copyto(own, params)
        fingerprint = machine.fingerprint(own, self._parts)
        passes, tasks, kept = [], [], []
        at = lease.address + flat
        for entries, own_sizes in zip(self._entries, sizes, strict=True):
            places = []
            for size in own_sizes:
                places.append(at)
                at += size
            passes.append(PackedPass(*places))
            more, biases = self._tasks(own, entries, places)
            tasks += more
            kept += biases
        self._run(np.array(tasks, np.int64), 2 * params.nbytes)
        del kept
        return Packed(tuple(passes), lease, params if _is_constant(params) else None, fingerprint, training)

    def _sizes(self, entries: list[Parameter], training: bool) -> list[int]:
        """Bytes of each packed part of a pass, in the order of PackedPass."""
        g = self._geometry
        features, hidden = (entry.shape[1] for entry in entries[:2])
        forward = [g.panels * columns * g.panel_bytes for columns in (features, hidden, 1, 1)]
        depth = g.unit_vectors * g.blocking.gates * (g.vector_bytes // g.item)
        backward = [g.panels_of(columns) * depth * g.panel_bytes for columns in (features, hidden)]
        return [lines(size) for size in forward + (backward if training else [0, 0])]

    def _tasks(self, own: Array, entries: list[Parameter], places: list[int]) -> tuple[list[list[int]], list[Array]]:
        """What is to be packed from where to where, and arrays that must live until it has been."""
        g = self._geometry
        x_weight, h_weight, x_bias, h_bias = (own[entry.offset : entry.offset + entry.size] for entry in entries)
        start = x_bias + h_bias if self._merged else x_bias
        features, hidden = (entry.shape[1] for entry in entries[:2])
        sources = ((x_weight, features), (h_weight, hidden), (start, 1), (h_bias, 1))
        tasks = [
            [packing.FORWARD, source.ctypes.data, columns, g.panels, place]
            for (source, columns), place in zip(sources, places, strict=False)
        ]
        if places[4] != places[5]:
            tasks += [
                [packing.BACKWARD, source.ctypes.data, columns, g.panels_of(columns), place]
                for (source, columns), place in zip(sources, places[4:], strict=False)
            ]
        return tasks, [start]

    def _run(self, tasks: Array, size: int) -> None:
        g, spec = self._geometry, self._spec
        job = machine.packing(spec.dtype, self._target)
        with borrow_gang(get_num_threads() if size > _WORTH_A_JOB else 1) as gang:
            members = 1 if gang is None else gang.workers + 1
            call = np.array(
                [tasks.ctypes.data, len(tasks), members, g.blocking.gates, spec.hidden_size, g.unit_vectors], np.int64
            )
            if gang is None:
                job(call.ctypes.data, 0)
            else:
                gang.run(machine.address(job), call.ctypes.data, members)


def _is_constant(array: Array) -> bool:
    """Whether the array's memory is a ``bytes`` object's, which no one can ever write to.

    A read-only flag would not do: whoever owns the memory can lift it, write, and set it again.
    """
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, bytes)
