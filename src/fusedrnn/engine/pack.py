"""Weights in the order in which the kernels stream them, packed again only when they have changed."""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.codegen import packing
from fusedrnn.codegen.fingerprint import PART
from fusedrnn.codegen.target import Target
from fusedrnn.constants import is_constant
from fusedrnn.engine import machine
from fusedrnn.engine.geometry import Geometry, lines
from fusedrnn.engine.locks import Lock
from fusedrnn.engine.parts import Part
from fusedrnn.engine.threads import Team
from fusedrnn.engine.workspace import Lease, Pool, Workspaces
from fusedrnn.layout import Kind
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
# Different parameter vectors that one op keeps packed at a time.
_MOST_KEPT = 4
# Sets of parameters that have an owner, such as the modules of a deep network.
_MOST_OWNED = 256
BEGIN, COPY = PART.index["begin"], PART.index["copy"]
# Bytes worth a job for the gang.
_WORTH_A_JOB = 1 << 19


@dataclass(frozen=True)
class PackedPass:
    """Where one layer's and direction's packed weights and biases begin; the last three are for backward.

    Of a cell of several stages each has those of the first stage's gates, then those of the next one's, each stage
    beginning with a new panel; in ``x_back`` all gates' rows follow one another in every panel.
    """

    x_weights: int
    h_weights: int
    projection: int
    peepholes: int
    x_bias: int
    h_bias: int
    x_back: int
    h_back: int
    projection_back: int


@dataclass(frozen=True)
class PackedLayout:
    """Where everything is in a packed buffer: what forward needs first, the same with or without what backward needs.

    Attributes:
        passes: Each pass's parts.
        back: What backward needs; inference ends here.
        flat: A copy of the parameters.
        size: Bytes of it all.
    """

    passes: tuple[PackedPass, ...]
    back: int
    flat: int
    size: int


@dataclass(eq=False)
class Packed:
    """All packed weights of some parameters, and what tells whether they still are theirs.

    Its memory is its own for as long as anyone holds it: a reserve, say, whose parameters have changed since.

    Attributes:
        lease: The memory.
        source: The array that holds the parameters, if nobody can ever write to it.
        parts: Where the parameters are, as :func:`fusedrnn.engine.machine.fingerprint` wants it.
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
class Placed:
    """Parameters by address: as they lie, for a call so short that to pack them would take longer, or packed.

    Attributes:
        matrices: Where each lies, in the order of ``ParameterLayout.by_pass``; 0 for zeros.
        lease: Memory of their own, if what becomes of the given one must not matter.
        address: Where they begin if they are packed.
    """

    matrices: tuple[int, ...]
    lease: Lease | None = None
    address: int = 0


class Packer:
    """Packs a spec's parameters and keeps the result until they change. Safe under threads.

    Args:
        spec: What runs.
        target: The instruction set.
        geometry: How its weights fill panels.
        idle: What else to let go of when the last owner of parameters has gone.
    """

    def __init__(
        self, spec: RNNSpec, target: Target, geometry: Geometry, idle: Sequence[Pool | Workspaces]
    ) -> None:
        self._pool = Pool(_MOST_KEPT)
        self._idle = (self._pool, *idle)
        self._spec, self._target, self._geometry = spec, target, geometry
        self._kept: OrderedDict[tuple[int, ...], Packed] = OrderedDict()
        self._owned: OrderedDict[tuple[int, ...], Packed] = OrderedDict()
        self._lock = Lock()
        self._entries = [
            [spec.layout.entry(layer, direction, kind) for kind in spec.layout.kinds]
            for layer in range(spec.num_layers)
            for direction in range(spec.num_directions)
        ]
        self.offsets = [entry.offset * geometry.item for entry in spec.layout.by_pass]
        self._sizes = [entry.size * geometry.item for entry in spec.layout.by_pass]
        # Of a flat vector that begins at 0, and copied to 0.
        self._parts = np.array([(at, size, at) for at, size in zip(self.offsets, self._sizes, strict=True)], np.int64)
        self.nowhere = (0,) * len(self.offsets)
        self._shape, self._dtype = (spec.layout.size,), np.dtype(spec.dtype)
        self._last: Packed | None = None
        self.layout = self._laid_out()
        self._tasks = {training: self._all_tasks(training) for training in (False, True)}

    def fits(self, params: Array) -> bool:
        """Whether this array is a vector that can be packed as it is."""
        flags = params.flags
        return params.dtype == self._dtype and params.shape == self._shape and flags.c_contiguous and flags.aligned

    def copied_vector(self, params: Array) -> Placed:
        """A copy of the flat parameters, as they lie."""
        lease = self._pool.lease(params.nbytes)
        lease.buffer[: params.nbytes] = params.view(np.uint8)
        return Placed(self.addresses(lease.address), lease)

    def addresses(self, begin: int) -> tuple[int, ...]:
        """Where each parameter of a flat vector is, in the order of ``ParameterLayout.by_pass``; 0 if the vector is."""
        return tuple([begin + offset for offset in self.offsets]) if begin else self.nowhere

    def packed_vector(self, params: Array, training: bool, team: Team) -> Packed:
        """The packed form of the flat parameters as they are now, in training with what backward needs.

        A frozen array is known by its identity; any other is fingerprinted at every call.
        """
        last = self._last
        if last is not None and last.source is params and (last.training or not training):
            return last
        addresses = self.addresses(params.ctypes.data)
        constant = params if is_constant(params) else None
        found = self._looked_up(self._kept, _MOST_KEPT, addresses, training, team, constant)
        self._last = None if constant is None else found
        return found

    def packed(self, addresses: tuple[int, ...], training: bool, team: Team, owner: object) -> Packed:
        """The packed form of the parameters that lie at these addresses, in the order of ``ParameterLayout.by_pass``.

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
        known: OrderedDict[tuple[int, ...], Packed],
        most: int,
        addresses: tuple[int, ...],
        training: bool,
        team: Team,
        constant: Array | None,
    ) -> Packed:
        with self._lock:
            # A call from a signal handler may come in between anywhere: nothing is taken to be there still.
            found = known.pop(addresses, None)
            if found is not None and training and not found.training:
                found = None
            same = found is not None and constant is not None and found.source is constant
            if found is None or (not same and found.fingerprint != machine.fingerprint(found.parts)):
                found = None  # so that its memory can serve again
                found = self._pack(addresses, training, team, constant)
            known[addresses] = found
            while len(known) > most:
                known.popitem(last=False)
            return found

    def _pack(self, addresses: tuple[int, ...], training: bool, team: Team, constant: Array | None) -> Packed:
        layout = self.layout
        size = self._spec.layout.size * self._geometry.item
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
        fingerprint = machine.fingerprint(parts)
        self._run(self._tasks[training], lease.address, flat, team, 2 * size)
        parts[:, COPY] = 0
        return Packed(lease, constant, parts, fingerprint, training, self.nowhere)

    def _laid_out(self) -> PackedLayout:
        g, spec = self._geometry, self._spec
        forward, backward = [], []
        for number in range(spec.num_layers * spec.num_directions):
            features = spec.layer_input_size(number // spec.num_directions)
            columns = g.columns * g.panel_bytes
            recurrent = sum(g.columns_of(part) * g.operand_size(part) for part in g.gate_parts) * g.panel_bytes
            projection = sum(g.columns_of(part) for part in g.projections) * spec.hidden_size * g.panel_bytes
            vectors = g.vector_panels * g.panel_bytes
            forward.append([features * columns, recurrent, projection, vectors, columns, columns])
            back = [g.panels_of(features) * g.depth]
            back.append(sum(g.panels_of(g.operand_size(part)) * g.depth_of(part) for part in g.gate_parts))
            back.append(sum(g.panels_of(spec.hidden_size) * g.depth_of(part) for part in g.projections))
            backward.append([rows * g.panel_bytes for rows in back])
        sizes = [size for part in (forward, backward) for one in part for size in one]
        *places, end = (0, *accumulate(lines(size) for size in sizes))
        ahead, after = len(forward[0]), len(backward[0])
        behind = ahead * len(forward)
        return PackedLayout(
            tuple(
                PackedPass(
                    *places[ahead * n : ahead * (n + 1)], *places[behind + after * n : behind + after * (n + 1)]
                )
                for n in range(len(forward))
            ),
            back=places[behind],
            flat=end,
            size=end + lines(self._spec.layout.size * g.item),
        )

    def _all_tasks(self, training: bool) -> Array:
        """What is to be packed from where in the flat copy to where."""
        tasks: list[tuple[int, ...]] = []
        for entries, into in zip(self._entries, self.layout.passes, strict=True):
            at = {entry.kind: entry.offset * self._geometry.item for entry in entries}
            features = entries[0].shape[1]
            tasks += self._forward_tasks(at, into, features)
            if training:
                tasks += self._backward_tasks(at, into, features)
        return np.array(tasks, np.int64)

    def _rows(self, part: Part) -> tuple[int, int, int]:
        """A stage's gates, the units of each, and their vectors."""
        size = self._geometry.size_of(part)
        return part.gates, size, self._geometry.vectors_of(size)

    def _forward_tasks(self, at: Mapping[Kind, int], into: PackedPass, features: int) -> list[tuple[int, ...]]:
        g, hidden = self._geometry, self._spec.hidden_size
        tasks: list[tuple[int, ...]] = []
        column, recurrent = 0, into.h_weights
        for part in g.gate_parts:
            panels, k, own = g.columns_of(part), g.operand_size(part), (*self._rows(part), 0)
            x_row, h_row, bias = (part.before * hidden * size * g.item for size in (features, k, 1))
            beside = column * g.panel_bytes
            x_into = into.x_weights + features * beside
            together: tuple[Kind, ...] = ("i2h_bias", "h2h_bias") if part.stage.merged else ("i2h_bias",)
            tasks += [
                (packing.FORWARD, at["i2h_weight"] + x_row, 0, features, panels, x_into, *own),
                (packing.FORWARD, at["h2h_weight"] + h_row, 0, k, panels, recurrent, *own),
                self._bias(at, together, bias, panels, into.x_bias + beside, own),
                self._bias(at, ("h2h_bias",), bias, panels, into.h_bias + beside, own),
            ]
            column, recurrent = column + panels, recurrent + k * panels * g.panel_bytes
        for part in g.projections:
            own = (*self._rows(part), 0)
            source = at["h2r_weight"], 0, hidden, g.columns_of(part)
            tasks.append((packing.FORWARD, *source, into.projection, *own))
        if g.vectors:
            own = g.vectors, hidden, g.unit_vectors, 0
            tasks.append((packing.FORWARD, at["peephole_weight"], 0, 1, g.vector_panels, into.peepholes, *own))
        return tasks

    @staticmethod
    def _bias(
        at: Mapping[Kind, int], kinds: tuple[Kind, ...], offset: int, panels: int, into: int, own: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The sum of the biases that are there."""
        there = [at[kind] + offset for kind in kinds if kind in at]
        kind = (packing.ZEROS, packing.FORWARD, packing.SUM)[len(there)]
        source, also = (*there, 0, 0)[:2]
        return kind, source, also, 1, panels, into, *own

    def _backward_tasks(self, at: Mapping[Kind, int], into: PackedPass, features: int) -> list[tuple[int, ...]]:
        g, hidden = self._geometry, self._spec.hidden_size
        tasks: list[tuple[int, ...]] = []
        row, recurrent = 0, into.h_back
        for part in g.gate_parts:
            k, depth = g.operand_size(part), g.depth_of(part)
            x_row, h_row = (part.before * hidden * size * g.item for size in (features, k))
            x_panels, h_panels = g.panels_of(features), g.panels_of(k)
            begin = into.x_back + row * g.panel_bytes
            tasks += [
                (packing.BACKWARD, at["i2h_weight"] + x_row, 0, features, x_panels, begin, *self._rows(part), g.depth),
                (packing.BACKWARD, at["h2h_weight"] + h_row, 0, k, h_panels, recurrent, *self._rows(part), depth),
            ]
            row, recurrent = row + depth, recurrent + h_panels * depth * g.panel_bytes
        for part in g.projections:
            source = at["h2r_weight"], 0, hidden, g.panels_of(hidden)
            tasks.append((packing.BACKWARD, *source, into.projection_back, *self._rows(part), g.depth_of(part)))
        return tasks

    def _run(self, tasks: Array, packed: int, flat: int, team: Team, size: int) -> None:
        job = machine.packing(self._spec.dtype, self._target)
        for members in (team.threads if size > _WORTH_A_JOB else 1, 1):
            call = (ctypes.c_int64 * len(packing.CALL.names))(tasks.ctypes.data, len(tasks), members, flat, packed)
            if members == 1:
                job(ctypes.addressof(call), 0)
                break
            if team.run(job, ctypes.addressof(call), members):
                break
