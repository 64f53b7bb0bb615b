"""Caches parameters in the layouts that primitives need, until the parameters change."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fusedrnn.arrays import Array
from fusedrnn.engines.onednn.arrays import ArrayLayout, Arrays
from fusedrnn.engines.onednn.library import UNIMPLEMENTED, Library, OneDNNError
from fusedrnn.engines.onednn.param_layout import ParamLayout, Stack
from fusedrnn.engines.onednn.primitives import BIAS, Descriptor, Reorder, Stream
from fusedrnn.frozen_array import is_frozen
from fusedrnn.locks import Lock
from fusedrnn.runtime.buffers import BufferPool, Lease, aligned_empty, round_up_to_cache_line
from fusedrnn.runtime.fingerprint import MEMORY_RANGE, fingerprint_of

_BEGIN, _COPY = MEMORY_RANGE.index["begin"], MEMORY_RANGE.index["copy"]


class _TwoReorders:
    """A reorder through a contiguous array: some versions convert only contiguous weights to blocked layouts."""

    def __init__(self, library: Library, source: Descriptor, dims: tuple[int, ...], target: Descriptor) -> None:
        self._contiguous = Descriptor.strided(library, dims)
        self._first = Reorder(library, source, self._contiguous)
        self._second = Reorder(library, self._contiguous, target)

    def copy(self, stream: Stream, source: int, target: int) -> None:
        """Copy from address ``source`` to address ``target``."""
        contiguous = aligned_empty((self._contiguous.nbytes,), np.uint8)
        self._first.copy(stream, source, contiguous.ctypes.data)
        self._second.copy(stream, contiguous.ctypes.data, target)
        stream.wait()


@dataclass(frozen=True, eq=False)
class Conversion:
    """How a stack's weights are brought to a layout; ``reorder`` is None if they have it in the flat vector already."""

    stack: Stack
    argument: int
    target: Descriptor
    reorder: Reorder | _TwoReorders | None


@dataclass
class Weights:
    """A copy of the parameters. Its content never changes; converted weights are added.

    Attributes:
        source: The frozen array that was copied; None if it was not frozen.
        fingerprint: Fingerprint of the content.
        arrays: The flat vector ``params``, with gates in oneDNN's order, and each stack's bias, ``bias0`` and so on.
        converted: The address and the memory of weights in the layouts requested so far.
    """

    source: Array | None
    fingerprint: bytes
    arrays: Arrays
    converted: dict[Conversion, tuple[int, Lease | Arrays]] = field(default_factory=dict)


class WeightCache:
    """Copies parameters and caches the last copy. Thread-safe."""

    def __init__(self, layout: ParamLayout) -> None:
        self._layout = layout
        # One copy of the parameters, and two layouts of each argument: for forward and for backward.
        self._pool = BufferPool(1 + 2 * len(layout.stacks) * len(layout.weights))
        self._lock = Lock()
        self._last: Weights | None = None
        self._conversions: list[Conversion] = []
        self._arrays = ArrayLayout()
        self._arrays.add("params", layout.spec.layout.size)
        for index, stack in enumerate(layout.stacks):
            self._arrays.add(f"bias{index}", *layout.dims(stack, BIAS))

    def at(self, params: Array) -> Weights:
        """The current parameters: a frozen array is recognized by identity, any other by its fingerprint."""
        frozen = is_frozen(params)
        with self._lock:
            last = self._last
            if last is not None and frozen and last.source is params:
                return last
            if last is None or fingerprint_of(self._ranges(params)) != last.fingerprint:
                self._last = last = None  # the pool can reuse its memory
                last = self._copy(params)
            last.source = params if frozen else None
            self._last = last
            return last

    def _ranges(self, params: Array, copy: int = 0) -> NDArray[np.int64]:
        """The ranges of the parameters in memory, to be copied to address ``copy``; 0 for no copy."""
        ranges: NDArray[np.int64] = self._layout.ranges.copy()
        ranges[:, _BEGIN] += params.ctypes.data
        ranges[:, _COPY] = ranges[:, _COPY] + copy if copy else 0
        return ranges

    def _copy(self, params: Array) -> Weights:
        arrays = Arrays(self._arrays, self._pool)
        # Fingerprint while copying: another thread may write to the parameters meanwhile.
        fingerprint = fingerprint_of(self._ranges(params, copy=arrays.addresses["params"]))
        for index, stack in enumerate(self._layout.stacks):
            self._layout.read_bias(stack, arrays["params"], arrays[f"bias{index}"])
        return Weights(None, fingerprint, arrays)

    def conversion(self, stack: Stack, argument: int, target: Descriptor) -> Conversion:
        """The conversion of a stack's weights to a layout; the same object for the same layout."""
        with self._lock:
            for conversion in self._conversions:
                if (conversion.stack, conversion.argument) == (stack, argument) and conversion.target.equals(target):
                    return conversion
            layout, source = self._layout, self._layout.descriptor(stack, argument)
            reorder: Reorder | _TwoReorders | None = None
            if not source.equals(target):
                try:
                    reorder = Reorder(layout.library, source, target)
                except OneDNNError as error:
                    if error.status != UNIMPLEMENTED:
                        raise
                    reorder = _TwoReorders(layout.library, source, layout.dims(stack, argument), target)
            self._conversions.append(Conversion(stack, argument, target, reorder))
            return self._conversions[-1]

    def addresses(self, weights: Weights, conversions: list[Conversion], stream: Stream) -> dict[int, int]:
        """The addresses of converted weights, by argument."""
        addresses = {}
        with self._lock:
            for conversion in conversions:
                if conversion not in weights.converted:
                    weights.converted[conversion] = self._convert(weights, conversion, stream)
                addresses[conversion.argument] = weights.converted[conversion][0]
        return addresses

    def _convert(self, weights: Weights, conversion: Conversion, stream: Stream) -> tuple[int, Lease | Arrays]:
        source = weights.arrays.addresses["params"] + self._layout.offset(conversion.stack, conversion.argument)
        if conversion.reorder is None:
            return source, weights.arrays
        lease = self._pool.lease(round_up_to_cache_line(conversion.target.nbytes))
        conversion.reorder.copy(stream, source, lease.address)
        stream.wait()
        return lease.address, lease
