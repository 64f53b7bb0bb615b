"""Packed weights, packed again only when the parameters have changed."""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu import tuning as tunings
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.engines.cpu.weights.layout import PackedLayout
from fusedrnn.engines.cpu.weights.pack_kernel import CALL, load_pack
from fusedrnn.engines.cpu.weights.quantize import quantized
from fusedrnn.frozen_array import is_frozen
from fusedrnn.locks import Lock
from fusedrnn.quantized_params import QuantizedParams
from fusedrnn.runtime.buffers import BufferPool, Lease, ScratchPool
from fusedrnn.runtime.fingerprint import ScatteredVector
from fusedrnn.runtime.thread_pool import ThreadTeam, pool_team

Frozen = Array | QuantizedParams


@dataclass(eq=False)
class PackedWeights:
    """The packed weights of some parameters, and how to tell whether the parameters have changed since.

    Whoever holds it owns the memory: a reserve keeps the weights of its forward call, even if the parameters change or
    are freed.

    Attributes:
        lease: The memory of the packed weights.
        source: The parameters if they are frozen.
        vector: Where the parameters are; None for quantized parameters.
        fingerprint: The fingerprint of the parameters.
        training: Whether weights for backward are included.
        matrices: Zeros: a call with packed weights does not use the addresses of unpacked parameters.
        owner: The object, such as a module; when it is garbage-collected, the weights are dropped.
        versions: The versions of the parameters, if their owner counts changes.
    """

    lease: Lease
    source: Frozen | None
    vector: ScatteredVector | None
    fingerprint: bytes
    training: bool
    matrices: tuple[int, ...]
    owner: weakref.ref[Any] | None = None
    versions: Sequence[int] | None = None

    @property
    def address(self) -> int:
        """The address of the packed weights."""
        return self.lease.address


@dataclass(frozen=True, eq=False)
class WeightAddresses:
    """Parameters by address, unpacked or packed.

    Attributes:
        matrices: Address of each unpacked parameter, in ``by_layer_direction`` order; 0 for zeros.
        lease: The memory of a copy, if later changes of the parameters must have no effect.
        address: The address of packed weights; 0 if they are unpacked.
    """

    matrices: tuple[int, ...]
    lease: Lease | None = None
    address: int = 0


class WeightCache:
    """Packs the parameters of a spec and keeps the result until they change. Thread-safe.

    Args:
        tiling: The panels of the weights.
        idle: Pools to clear when the last owner of parameters is gone.

    Attributes:
        tiling: The panels of the weights.
        layout: Where each matrix is.
        offsets: Where each parameter is in a flat vector, in bytes.
        nowhere: An address of 0 for each parameter.
    """

    def __init__(self, tiling: Tiling, idle: Sequence[BufferPool | ScratchPool]) -> None:
        self._tuning = tuning = tunings.current()
        self._pool = BufferPool(tuning.max_packed_vectors)
        self._idle = (self._pool, *idle)
        self.tiling, spec = tiling, tiling.spec
        self._vectors: OrderedDict[tuple[int, ...], PackedWeights] = OrderedDict()
        self._owned: OrderedDict[tuple[int, ...], PackedWeights] = OrderedDict()
        self._lock = Lock()
        self.offsets = [entry.offset * tiling.item for entry in spec.layout.by_layer_direction]
        sizes = [entry.size * tiling.item for entry in spec.layout.by_layer_direction]
        # For a flat vector at address 0 that is copied to address 0.
        self._parts = np.array([self.offsets, sizes, self.offsets], np.int64).T.copy()
        self.nowhere = (0,) * len(self.offsets)
        self._shape, self._dtype = (spec.layout.size,), np.dtype(spec.dtype)
        self._last: PackedWeights | None = None
        self.layout = PackedLayout.of(tiling)

    @property
    def num_packed(self) -> int:
        """Parameter sets that are kept packed."""
        return len(self._vectors) + len(self._owned)

    def fits(self, params: Array) -> bool:
        """Whether an array is a parameter vector that needs no conversion."""
        flags = params.flags
        return params.dtype == self._dtype and params.shape == self._shape and flags.c_contiguous and flags.aligned

    def copied_vector(self, params: Array) -> WeightAddresses:
        """An unpacked copy of a flat parameter vector."""
        lease = self._pool.lease(params.nbytes)
        lease.buffer[: params.nbytes] = params.view(np.uint8)
        return WeightAddresses(self.addresses(lease.address), lease)

    def addresses(self, begin: int) -> tuple[int, ...]:
        """The address of each parameter of a flat vector, in ``by_layer_direction`` order; zeros for 0."""
        return tuple([begin + offset for offset in self.offsets]) if begin else self.nowhere

    def packed_vector(self, params: Frozen, training: bool, team: ThreadTeam) -> PackedWeights:
        """The packed weights of a flat parameter vector or of quantized parameters; in ``training`` for backward too.

        Frozen parameters are recognized by their identity; others are fingerprinted at every call.
        """
        last = self._last
        if last is not None and last.source is params and (last.training or not training):
            return last
        # The entry keeps quantized parameters alive, so that no other object can get their identity.
        if isinstance(params, QuantizedParams):
            addresses: tuple[int, ...] = (id(params),)
        else:
            addresses = self.addresses(params.ctypes.data)
        frozen = params if is_frozen(params) else None
        packed = self._get(self._vectors, self._tuning.max_packed_vectors, addresses, training, team, frozen)
        self._last = None if frozen is None else packed
        return packed

    def packed(
        self, addresses: tuple[int, ...], training: bool, team: ThreadTeam, owner: object,
        versions: Sequence[int] | None = None,
    ) -> PackedWeights:  # fmt: skip
        """The packed weights of the parameters at these addresses, in ``by_layer_direction`` order.

        Address 0 stands for a parameter that is all zeros. The packed weights are dropped with their owner. Parameters
        with other ``versions`` have changed; those with the same ones may have changed too, without being counted.
        """
        owned = self._owned
        packed = self._get(owned, self._tuning.max_packed_owners, addresses, training, team, None, versions)
        if versions is not None:
            packed.versions = versions
        if packed.owner is None or packed.owner() is not owner:
            idle = self._idle

            def forget(_: object) -> None:
                # The garbage collector may call it anywhere, so it takes no lock: each step is atomic.
                owned.pop(addresses, None)
                if not owned:
                    for pool in idle:
                        pool.clear()

            packed.owner = weakref.ref(owner, forget)
        return packed

    def _get(
        self,
        cache: OrderedDict[tuple[int, ...], PackedWeights],
        max_entries: int,
        addresses: tuple[int, ...],
        training: bool,
        team: ThreadTeam,
        frozen: Frozen | None,
        versions: Sequence[int] | None = None,
    ) -> PackedWeights:
        """The entry of a cache, packed anew if it is missing or out of date."""
        with self._lock:
            # A call in a signal handler may change the cache at any point.
            packed = cache.pop(addresses, None)
            if packed is None or not self._is_valid(packed, training, frozen, versions):
                vector = None if packed is None else packed.vector
                packed = None  # so that its memory can be reused
                packed = self._pack(addresses, vector, training, team, frozen)
            cache[addresses] = packed
            while len(cache) > max_entries:
                cache.popitem(last=False)
            return packed

    @staticmethod
    def _is_valid(
        packed: PackedWeights, training: bool, frozen: Frozen | None, versions: Sequence[int] | None
    ) -> bool:
        if training and not packed.training:
            return False
        if versions is not None and packed.versions is not None and versions != packed.versions:
            return False  # without reading the parameters
        if frozen is not None and packed.source is frozen:
            return True
        return packed.vector is not None and packed.fingerprint == packed.vector.fingerprint()

    def _pack(
        self, addresses: tuple[int, ...], vector: ScatteredVector | None, training: bool, team: ThreadTeam,
        frozen: Frozen | None,
    ) -> PackedWeights:  # fmt: skip
        if isinstance(frozen, QuantizedParams):
            return self._pack_quantized(frozen, team)
        layout = self.layout
        size = self._shape[0] * self.tiling.item
        # A training loop packs at every step, so it keeps the memory for its copy of the parameters.
        lease = self._pool.lease(layout.size if training else layout.backward_offset)
        copy = lease.buffer[layout.flat_offset :] if training else np.empty(size, np.uint8)
        flat = lease.address + layout.flat_offset if training else copy.ctypes.data
        vector = vector or ScatteredVector(self._parts, addresses)
        fingerprint = vector.copy_to(flat)
        if self.tiling.scale_offsets:
            copy = quantized(self.tiling, copy)
            flat = copy.ctypes.data
        self._run(layout.tasks if training else layout.forward_tasks, lease.address, flat, team, 2 * size)
        return PackedWeights(lease, frozen, vector, fingerprint, training, self.nowhere)

    def pack_quantized_into(self, packed: int, params: Array) -> None:
        """Quantize a flat parameter vector, given as bytes, and pack it for inference at an address, on this thread."""
        source = quantized(self.tiling, params)
        self._run(self.layout.forward_tasks, packed, source.ctypes.data, pool_team(1), source.nbytes)

    def _pack_quantized(self, params: QuantizedParams, team: ThreadTeam) -> PackedWeights:
        lease = self._pool.lease(self.layout.backward_offset)
        source = quantized(self.tiling, params)
        self._run(self.layout.forward_tasks, lease.address, source.ctypes.data, team, source.nbytes)
        return PackedWeights(lease, params, None, b"", False, self.nowhere)

    def _run(self, tasks: Array, packed: int, flat: int, team: ThreadTeam, size: int) -> None:
        """Run the packing job on several threads, or on this one if it is small or the others are busy."""
        job = load_pack(self.tiling.spec.operand_format, self.tiling.target)
        for threads in (team.threads if size > self._tuning.parallel_pack_bytes else 1, 1):
            call = (ctypes.c_int64 * len(CALL.names))(tasks.ctypes.data, len(tasks), threads, flat, packed)
            address = ctypes.addressof(call)
            if threads == 1:
                job(address, 0)
                break
            if team.run(job, address, threads):
                break
