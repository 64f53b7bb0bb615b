"""Weights in the order in which the kernels stream them, packed again only when they have changed."""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.kernels.tiling import Tiling
from fusedrnn.engines.cpu.weights import pack_kernel as packing
from fusedrnn.engines.cpu.weights.layout import PackedLayout, packing_tasks
from fusedrnn.frozen_array import is_frozen
from fusedrnn.jit.target import Target
from fusedrnn.locks import Lock
from fusedrnn.runtime.buffers import BufferPool, Lease, Workspaces
from fusedrnn.runtime.fingerprint import MEMORY_RANGE, fingerprint_of
from fusedrnn.runtime.thread_pool import ThreadTeam
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
# Different parameter vectors that one op keeps packed at a time.
_MOST_KEPT = 4
# Sets of parameters that have an owner, such as the modules of a deep network.
_MOST_OWNED = 256
BEGIN, COPY = MEMORY_RANGE.index["begin"], MEMORY_RANGE.index["copy"]
# Bytes worth a job for the pool.
_WORTH_A_JOB = 1 << 19


@dataclass(eq=False)
class PackedWeights:
    """All packed weights of some parameters, and what tells whether they still are theirs.

    Its memory is its own for as long as anyone holds it: a reserve, say, whose parameters have changed since.

    Attributes:
        lease: The memory.
        source: The array that holds the parameters, if nobody can ever write to it.
        parts: Where the parameters are, as :func:`fusedrnn.runtime.fingerprint.fingerprint_of` wants it.
        fingerprint: What their content was.
        training: Whether what backward needs is there too.
        matrices: A 0 for each parameter: they are not needed as they lie.
        owner: With what it shall be forgotten, if there is such a thing.
    """

    lease: Lease
    source: Array | None
    parts: Array
    fingerprint: bytes
    training: bool
    matrices: tuple[int, ...]
    owner: weakref.ref[Any] | None = None

    @property
    def address(self) -> int:
        """Where they begin."""
        return self.lease.address


@dataclass(frozen=True, eq=False)
class WeightPointers:
    """Parameters by address: as they lie, for a call so short that to pack them would take longer, or packed.

    Attributes:
        matrices: Where each lies, in ``by_layer_direction`` order; 0 for zeros.
        lease: Memory of their own, if what becomes of the given one must not matter.
        address: Where they begin if they are packed.
    """

    matrices: tuple[int, ...]
    lease: Lease | None = None
    address: int = 0


class WeightCache:
    """Packs a spec's parameters and keeps the result until they change. Safe under threads.

    Args:
        spec: What runs.
        target: The instruction set.
        tiling: How its weights fill panels.
        idle: What else to let go of when the last owner of parameters has gone.
    """

    def __init__(
        self, spec: RNNSpec, target: Target, tiling: Tiling, idle: Sequence[BufferPool | Workspaces]
    ) -> None:
        self._pool = BufferPool(_MOST_KEPT)
        self._idle = (self._pool, *idle)
        self._spec, self._target, self._tiling = spec, target, tiling
        self._kept: OrderedDict[tuple[int, ...], PackedWeights] = OrderedDict()
        self._owned: OrderedDict[tuple[int, ...], PackedWeights] = OrderedDict()
        self._lock = Lock()
        self.offsets = [entry.offset * tiling.item for entry in spec.layout.by_layer_direction]
        self._sizes = [entry.size * tiling.item for entry in spec.layout.by_layer_direction]
        # Of a flat vector that begins at 0, and copied to 0.
        self._parts = np.array([(at, size, at) for at, size in zip(self.offsets, self._sizes, strict=True)], np.int64)
        self.nowhere = (0,) * len(self.offsets)
        self._shape, self._dtype = (spec.layout.size,), np.dtype(spec.dtype)
        self._last: PackedWeights | None = None
        self.layout = PackedLayout.of(spec, tiling)
        self._tasks = {training: packing_tasks(spec, tiling, self.layout, training) for training in (False, True)}

    def fits(self, params: Array) -> bool:
        """Whether this array is a vector that can be packed as it is."""
        flags = params.flags
        return params.dtype == self._dtype and params.shape == self._shape and flags.c_contiguous and flags.aligned

    def copied_vector(self, params: Array) -> WeightPointers:
        """A copy of the flat parameters, as they lie."""
        lease = self._pool.lease(params.nbytes)
        lease.buffer[: params.nbytes] = params.view(np.uint8)
        return WeightPointers(self.addresses(lease.address), lease)

    def addresses(self, begin: int) -> tuple[int, ...]:
        """Where each parameter of a flat vector is, in ``by_layer_direction`` order; 0 if the vector is."""
        return tuple([begin + offset for offset in self.offsets]) if begin else self.nowhere

    def packed_vector(self, params: Array, training: bool, team: ThreadTeam) -> PackedWeights:
        """The packed form of the flat parameters as they are now, in training with what backward needs.

        A frozen array is known by its identity; any other is fingerprinted at every call.
        """
        last = self._last
        if last is not None and last.source is params and (last.training or not training):
            return last
        addresses = self.addresses(params.ctypes.data)
        constant = params if is_frozen(params) else None
        found = self._looked_up(self._kept, _MOST_KEPT, addresses, training, team, constant)
        self._last = None if constant is None else found
        return found

    def packed(self, addresses: tuple[int, ...], training: bool, team: ThreadTeam, owner: object) -> PackedWeights:
        """The packed form of the parameters that lie at these addresses, in ``by_layer_direction`` order.

        0 stands for a parameter that is all zeros. What is packed is forgotten when its owner goes.
        """
        owned = self._owned
        packed = self._looked_up(owned, _MOST_OWNED, addresses, training, team, None)
        if packed.owner is None or packed.owner() is not owner:
            idle = self._idle

            def forget(_: object) -> None:
                # The garbage collector may come from anywhere: steps that are atomic, no lock.
                owned.pop(addresses, None)
                if not owned:
                    for pool in idle:
                        pool.clear()

            packed.owner = weakref.ref(owner, forget)
        return packed

    def _looked_up(
        self,
        known: OrderedDict[tuple[int, ...], PackedWeights],
        most: int,
        addresses: tuple[int, ...],
        training: bool,
        team: ThreadTeam,
        constant: Array | None,
    ) -> PackedWeights:
        with self._lock:
            # A call from a signal handler may come in between anywhere: nothing is taken to be there still.
            found = known.pop(addresses, None)
            if found is not None and training and not found.training:
                found = None
            same = found is not None and constant is not None and found.source is constant
            if found is None or (not same and found.fingerprint != fingerprint_of(found.parts)):
                found = None  # so that its memory can serve again
                found = self._pack(addresses, training, team, constant)
            known[addresses] = found
            while len(known) > most:
                known.popitem(last=False)
            return found

    def _pack(
        self, addresses: tuple[int, ...], training: bool, team: ThreadTeam, constant: Array | None
    ) -> PackedWeights:
        layout = self.layout
        size = self._spec.layout.size * self._tiling.item
        # A training loop packs at every step: its copy of the parameters is worth keeping the memory.
        lease = self._pool.lease(layout.size if training else layout.back)
        own = lease.buffer[layout.flat :] if training else np.empty(size, np.uint8)
        flat = own.ctypes.data
        # What is packed is what is fingerprinted, whatever another thread writes meanwhile.
        parts = self._parts.copy()
        parts[:, COPY] += flat
        parts[:, BEGIN] = addresses
        if 0 in addresses:
            for begin, (_, length, copy) in zip(addresses, parts, strict=True):
                if not begin:
                    ctypes.memset(int(copy), 0, int(length))
            parts = parts[parts[:, BEGIN] != 0]
        fingerprint = fingerprint_of(parts)
        self._run(self._tasks[training], lease.address, flat, team, 2 * size)
        parts[:, COPY] = 0
        return PackedWeights(lease, constant, parts, fingerprint, training, self.nowhere)

    def _run(self, tasks: Array, packed: int, flat: int, team: ThreadTeam, size: int) -> None:
        job = packing.load_pack(self._spec.dtype, self._target)
        for members in (team.threads if size > _WORTH_A_JOB else 1, 1):
            call = (ctypes.c_int64 * len(packing.CALL.names))(tasks.ctypes.data, len(tasks), members, flat, packed)
            if members == 1:
                job(ctypes.addressof(call), 0)
                break
            if team.run(job, ctypes.addressof(call), members):
                break
