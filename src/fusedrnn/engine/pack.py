"""Weights in the order in which the kernels stream them, packed again only when they have changed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.codegen import packing
from fusedrnn.codegen.target import Target
from fusedrnn.engine import machine
from fusedrnn.engine.locks import Lock
from fusedrnn.engine.plan import Geometry, lines
from fusedrnn.engine.template import At, Template
from fusedrnn.engine.threads import borrow_gang, get_num_threads
from fusedrnn.engine.workspace import Lease, Pool
from fusedrnn.spec import Kind, RNNSpec

Array = NDArray[Any]
# Different parameter vectors that one op keeps packed at a time.
_MOST_KEPT = 4
_KINDS: tuple[Kind, ...] = ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias")
# Bytes worth a job for the gang.
_WORTH_A_JOB = 1 << 20


@dataclass(frozen=True)
class PackedPass:
    """Where one layer's and direction's packed weights and biases begin; the last two are for backward."""

    x_weights: int
    h_weights: int
    x_bias: int
    h_bias: int
    x_back: int
    h_back: int


@dataclass(frozen=True)
class PackedLayout:
    """Where everything is in a packed buffer: what forward needs first, the same with or without what backward needs.

    Attributes:
        passes: Each pass's parts.
        starts: For each pass, the sum of its biases as it is before packing.
        back: What backward needs; inference ends here.
        flat: A copy of the parameters.
        size: Bytes of it all.
    """

    passes: tuple[PackedPass, ...]
    starts: tuple[int, ...]
    back: int
    flat: int
    size: int


@dataclass(frozen=True)
class Packed:
    """All packed weights of a parameter vector, and what tells whether they still are its.

    Its memory is its own for as long as anyone holds it: a reserve, say, whose parameters have changed since.
    """

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
        self._pool = Pool(_MOST_KEPT)
        self._entries = [
            [spec.layout.entry(layer, direction, kind) for kind in _KINDS]
            for layer in range(spec.num_layers)
            for direction in range(spec.num_directions)
        ]
        places = [(entry.offset, entry.size) for entries in self._entries for entry in entries]
        self._parts = np.array(places, np.int64) * geometry.item
        self.layout = self._laid_out()
        self._tasks = {training: Template(packing.TASK, self._all_tasks(training)) for training in (False, True)}

    def packed(self, params: Array, training: bool = False) -> Packed:
        """The packed form of the flat parameters as they are now, in training with what backward needs.

        A frozen array is known by its identity; any other is fingerprinted at every call.
        """
        address = params.ctypes.data
        with self._lock:
            # A call from a signal handler may come in between anywhere: nothing is taken to be there still.
            kept = self._kept.pop(address, None)
            if kept is not None and training and not kept.training:
                kept = None
            known = kept is not None and kept.source is params
            if kept is None or (not known and kept.fingerprint != machine.fingerprint(params, self._parts)):
                kept = None  # so that its memory can serve again
                kept = self._pack(params, training)
            self._kept[address] = kept
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            return kept

    def _pack(self, params: Array, training: bool) -> Packed:
        layout, g = self.layout, self._geometry
        # A training loop packs at every step: its copy of the parameters is worth keeping the memory.
        lease = self._pool.lease(layout.size if training else layout.back)
        own = lease.buffer[layout.flat : layout.flat + params.nbytes].view(params.dtype) if training else None
        # What is packed is what is fingerprinted, whatever another thread writes meanwhile.
        own = np.empty_like(params) if own is None else own
        np.copyto(own, params)
        fingerprint = machine.fingerprint(own, self._parts)
        for start, (*_, one, other) in zip(layout.starts, self._entries, strict=True):
            into = lease.buffer[start : start + one.size * g.item].view(params.dtype)
            x_bias, h_bias = (own[entry.offset : entry.offset + entry.size] for entry in (one, other))
            if self._merged:
                np.add(x_bias, h_bias, out=into)
            else:
                np.copyto(into, x_bias)
        self._run(self._tasks[training].fill({"packed": lease.address, "flat": own.ctypes.data}), 2 * params.nbytes)
        return Packed(lease, params if _is_constant(params) else None, fingerprint, training)

    def _laid_out(self) -> PackedLayout:
        g = self._geometry
        depth = g.unit_vectors * g.blocking.gates * (g.vector_bytes // g.item)
        forward, backward, starts = [], [], []
        for entries in self._entries:
            columns = [entry.shape[1] for entry in entries[:2]]
            forward.append([g.panels * k * g.panel_bytes for k in (*columns, 1, 1)])
            backward.append([g.panels_of(k) * depth * g.panel_bytes for k in columns])
            starts.append([entries[2].size * g.item])
        sizes = [size for part in (forward, starts, backward) for one in part for size in one]
        *places, end = (0, *accumulate(lines(size) for size in sizes))
        passes = len(self._entries)
        behind = 5 * passes
        return PackedLayout(
            tuple(
                PackedPass(*places[4 * n : 4 * n + 4], *places[behind + 2 * n : behind + 2 * n + 2])
                for n in range(passes)
            ),
            tuple(places[4 * passes : behind]),
            back=places[behind],
            flat=end,
            size=end + lines(self._spec.layout.size * g.item),
        )

    def _all_tasks(self, training: bool) -> list[dict[str, int | At]]:
        """What is to be packed from where to where."""
        g = self._geometry
        tasks: list[dict[str, int | At]] = []
        for entries, into, start in zip(self._entries, self.layout.passes, self.layout.starts, strict=True):
            x_weight, h_weight, _, h_bias = (At("flat", entry.offset * g.item) for entry in entries)
            features, hidden = (entry.shape[1] for entry in entries[:2])
            sources = (x_weight, h_weight, At("packed", start), h_bias)
            places = (into.x_weights, into.h_weights, into.x_bias, into.h_bias)
            for source, columns, place in zip(sources, (features, hidden, 1, 1), places, strict=True):
                tasks.append(_task(packing.FORWARD, source, columns, g.panels, place))
            if training:
                for source, columns, place in (
                    (x_weight, features, into.x_back), (h_weight, hidden, into.h_back),
                ):  # fmt: skip
                    tasks.append(_task(packing.BACKWARD, source, columns, g.panels_of(columns), place))
        return tasks

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


def _task(kind: int, source: At, columns: int, panels: int, into: int) -> dict[str, int | At]:
    return {"kind": kind, "source": source, "columns": columns, "panels": panels, "into": At("packed", into)}


def _is_constant(array: Array) -> bool:
    """Whether the array's memory is a ``bytes`` object's, which no one can ever write to.

    A read-only flag would not do: whoever owns the memory can lift it, write, and set it again.
    """
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, bytes)
