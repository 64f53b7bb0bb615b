"""Weights in the order in which the kernels stream them, packed again only when they have changed.

Columns of the packed matrices are (vector of units, gate, lane); panels of a few vectors hold them for one k after the
other, zeros where units or vectors are missing at the end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engine import machine
from fusedrnn.engine.locks import Lock
from fusedrnn.engine.plan import Geometry
from fusedrnn.engine.workspace import aligned_empty
from fusedrnn.spec import Kind, Parameter, RNNSpec

Array = NDArray[Any]
# Different parameter vectors that one op keeps packed at a time.
_MOST_KEPT = 4
_KINDS: tuple[Kind, ...] = ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias")


@dataclass(frozen=True)
class PackedPass:
    """The addresses of one layer's and direction's packed weights and biases."""

    x_weights: int
    h_weights: int
    x_bias: int
    h_bias: int


@dataclass(frozen=True)
class Packed:
    """All packed weights of a parameter vector, and what tells whether they still are its."""

    passes: tuple[PackedPass, ...]
    buffers: tuple[Array, ...]
    source: Array | None
    fingerprint: bytes


class Packer:
    """Packs a spec's parameters and keeps the result until they change. Safe under threads."""

    def __init__(self, spec: RNNSpec, geometry: Geometry, merged: bool) -> None:
        self._spec, self._geometry, self._merged = spec, geometry, merged
        self._kept: OrderedDict[int, Packed] = OrderedDict()
        self._lock = Lock()
        places = [(entry.offset, entry.size) for entries in self._entries() for entry in entries]
        self._parts = np.array(places, np.int64) * geometry.item

    def packed(self, params: Array) -> Packed:
        """The packed form of the flat parameters as they are now.

        A frozen array is known by its identity; any other is fingerprinted at every call.
        """
        address = params.ctypes.data
        with self._lock:
            kept = self._kept.get(address)
            if kept is not None and kept.source is params:
                self._kept.move_to_end(address)
                return kept
            if kept is None or kept.fingerprint != machine.fingerprint(params, self._parts):
                kept = self._pack(params)
                self._kept[address] = kept
                if len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(address)
            return kept

    def _entries(self) -> Iterator[list[Parameter]]:
        """Each pass's weights and biases, input before state."""
        spec = self._spec
        for layer in range(spec.num_layers):
            for direction in range(spec.num_directions):
                yield [spec.layout.entry(layer, direction, kind) for kind in _KINDS]

    def _pack(self, params: Array) -> Packed:
        passes: list[PackedPass] = []
        buffers: list[Array] = []
        fingerprint: list[bytes] = []
        for entries in self._entries():
            # What is packed is what is fingerprinted, whatever another thread writes meanwhile.
            own = []
            for entry in entries:
                copy = params[entry.offset : entry.offset + entry.size].reshape(entry.shape).copy()
                fingerprint.append(machine.fingerprint(copy))
                own.append(self._panels(copy) if copy.ndim == 2 else copy)
            x_weight, h_weight, x_bias, h_bias = own
            x_start = self._panels((x_bias + h_bias if self._merged else x_bias)[:, None])
            packed = (x_weight, h_weight, x_start, self._panels(h_bias[:, None]))
            buffers += packed
            passes.append(PackedPass(*(part.ctypes.data for part in packed)))
        return Packed(tuple(passes), tuple(buffers), params if _is_constant(params) else None, b"".join(fingerprint))

    def _panels(self, weight: Array) -> Array:
        """Rows (G·H, K) as panels (panels, K, vectors, lanes)."""
        g = self._geometry
        gates, width, depth = g.blocking.gates, g.blocking.panel_vectors, weight.shape[1]
        lanes = g.vector_bytes // g.item
        hidden = weight.shape[0] // gates
        out = aligned_empty((g.panels, depth, width, lanes), weight.dtype)
        rows = weight.reshape(gates, hidden, depth)
        for column in range(g.panels * width):
            unit, gate = divmod(column, gates)
            first = unit * lanes
            count = max(0, min(lanes, hidden - first))
            place = out[column // width, :, column % width]
            place[:, :count] = rows[gate, first : first + count].T
            place[:, count:] = 0
        return out


def _is_constant(array: Array) -> bool:
    """Whether the array's memory is a ``bytes`` object's, which no one can ever write to.

    A read-only flag would not do: whoever owns the memory can lift it, write, and set it again.
    """
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, bytes)
