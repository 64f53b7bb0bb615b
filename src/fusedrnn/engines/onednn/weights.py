"""Caches parameters in the layouts that primitives need, until the parameters change."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.onednn.library import UNIMPLEMENTED, Library, OneDNNError
from fusedrnn.engines.onednn.param_layout import Layout
from fusedrnn.engines.onednn.primitives import BIAS, Descriptor, Reorder, Stream
from fusedrnn.frozen_array import is_frozen
from fusedrnn.locks import Lock
from fusedrnn.runtime.buffers import BufferPool, Lease
from fusedrnn.runtime.fingerprint import MEMORY_RANGE, fingerprint_of

Array = NDArray[Any]
_LINE = 64
_ITEM = 4
_BEGIN, _COPY = MEMORY_RANGE.index["begin"], MEMORY_RANGE.index["copy"]


def lines(size: int) -> int:
    """Bytes rounded up to whole cache lines."""
    return -(-size // _LINE) * _LINE


def floats(lease: Lease, begin: int, shape: tuple[int, ...]) -> Array:
    """An array in a lease, which holds on to it."""
    raw: Array = np.asarray(lease)
    return raw[begin : begin + prod(shape) * _ITEM].view(np.float32).reshape(shape)


@dataclass
class Form:
    """One argument's weights in one layout."""

    stack: int
    argument: int
    descriptor: Descriptor
    address: int
    lease: Lease | None


@dataclass
class Weights:
    """A copy of the parameters. Its content never changes; forms are added.

    Attributes:
        source: The frozen array that was copied; None if it was not frozen.
        fingerprint: Fingerprint of the content.
        lease: The flat vector, with gates in oneDNN's order, followed by the biases.
        biases: The address of each stack's bias.
        forms: The weights in each layout requested so far.
    """

    source: Array | None
    fingerprint: bytes
    lease: Lease
    biases: tuple[int, ...]
    forms: list[Form] = field(default_factory=list)


class Detour:
    """A reorder through contiguous memory: some versions convert only contiguous weights to blocked layouts.

    Args:
        library: The library.
        before: The source layout.
        between: The contiguous layout.
        after: The target layout.

    Attributes:
        scratch: Bytes of scratch it needs.
    """

    def __init__(self, library: Library, before: Descriptor, between: Descriptor, after: Descriptor) -> None:
        self._first, self._second = Reorder(library, before, between), Reorder(library, between, after)
        self._between_bytes = lines(between.nbytes)
        self.scratch = self._between_bytes + max(self._first.scratch, self._second.scratch)

    def __call__(self, stream: int, source: int, target: int, scratch: int) -> None:
        """Copy from address ``source`` to address ``target``."""
        self._first(stream, source, scratch, scratch + self._between_bytes)
        self._second(stream, scratch, target, scratch + self._between_bytes)


class WeightCache:
    """Copies parameters and caches the last copy. Thread-safe.

    Args:
        library: The library.
        layout: The layout of the parameters.
        size: Elements of the flat vector.
    """

    def __init__(self, library: Library, layout: Layout, size: int) -> None:
        self._library, self._layout = library, layout
        # One copy of the parameters, and a form of each argument for forward and for backward.
        self._pool = BufferPool(1 + 2 * len(layout.stacks) * len(layout.arguments))
        self._lock = Lock()
        self._last: Weights | None = None
        self._reorders: list[tuple[int, int, Descriptor, Reorder | Detour]] = []
        self._size = size
        shapes = [layout.dims(stack, BIAS) for stack in layout.stacks]
        places = accumulate((lines(prod(shape) * _ITEM) for shape in shapes), initial=lines(size * _ITEM))
        *begins, self._bytes = places
        self._biases = list(zip(begins, shapes, strict=True))

    def at(self, params: Array) -> Weights:
        """The current parameters: a frozen array is recognized by identity, any other by its fingerprint."""
        frozen = is_frozen(params)
        with self._lock:
            last = self._last
            if last is not None and frozen and last.source is params:
                return last
            if last is None or fingerprint_of(self._parts(params)) != last.fingerprint:
                self._last = last = None  # the pool can reuse its memory
                last = self._make(params)
            last.source = params if frozen else None
            self._last = last
            return last

    def _parts(self, params: Array) -> NDArray[np.int64]:
        parts: NDArray[np.int64] = self._layout.parts.copy()
        parts[:, _BEGIN] += params.ctypes.data
        parts[:, _COPY] = 0
        return parts

    def _make(self, params: Array) -> Weights:
        lease = self._pool.lease(self._bytes)
        # Fingerprint while copying: another thread may write to the parameters meanwhile.
        parts = self._parts(params)
        parts[:, _COPY] = self._layout.parts[:, _COPY] + lease.address
        fingerprint = fingerprint_of(parts)
        onednn_params = floats(lease, 0, (self._size,))
        for stack, (begin, shape) in zip(self._layout.stacks, self._biases, strict=True):
            self._layout.fill_bias(stack, onednn_params, floats(lease, begin, shape))
        return Weights(None, fingerprint, lease, tuple(lease.address + begin for begin, _ in self._biases))

    def address(self, weights: Weights, stack: int, argument: int, descriptor: Descriptor, stream: Stream) -> int:
        """The address of an argument's weights in the described layout."""
        with self._lock:
            for form in weights.forms:
                if form.stack == stack and form.argument == argument and form.descriptor.equals(descriptor):
                    return form.address
            form = self._make_form(weights, stack, argument, descriptor, stream)
            weights.forms.append(form)
            return form.address

    def _make_form(self, weights: Weights, stack: int, argument: int, descriptor: Descriptor, stream: Stream) -> Form:
        source = weights.lease.address + self._layout.offset(self._layout.stacks[stack], argument)
        in_place = self._layout.in_place(self._layout.stacks[stack], argument)
        if in_place.equals(descriptor):
            return Form(stack, argument, descriptor, source, None)
        reorder = self._reorder(stack, argument, in_place, descriptor)
        lease = self._pool.lease(lines(descriptor.nbytes) + lines(reorder.scratch))
        reorder(stream.handle, source, lease.address, lease.address + lines(descriptor.nbytes))
        stream.wait()
        return Form(stack, argument, descriptor, lease.address, lease)

    def _reorder(self, stack: int, argument: int, before: Descriptor, after: Descriptor) -> Reorder | Detour:
        for cached_stack, cached_argument, descriptor, reorder in self._reorders:
            if cached_stack == stack and cached_argument == argument and descriptor.equals(after):
                return reorder
        reorder = self._make_reorder(stack, argument, before, after)
        self._reorders.append((stack, argument, after, reorder))
        return reorder

    def _make_reorder(self, stack: int, argument: int, before: Descriptor, after: Descriptor) -> Reorder | Detour:
        try:
            return Reorder(self._library, before, after)
        except OneDNNError as error:
            if error.status != UNIMPLEMENTED:
                raise
            dims = self._layout.dims(self._layout.stacks[stack], argument)
            return Detour(self._library, before, Descriptor.plain(self._library, *dims), after)
