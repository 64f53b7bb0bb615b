"""The kernel that packs weights into panels, the order in which GEMMs stream them.

A panel holds a few vectors of columns of a matrix, row after row. Padding at the end of rows and columns is zero.
"""

from __future__ import annotations

from typing import NamedTuple

from fusedrnn.jit.builder import Function, Module, Value
from fusedrnn.jit.loader import Job, function, load, load_once
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors

PACK_TRANSPOSED, PACK, PACK_SUM, PACK_ZEROS = range(4)
"""Kinds of tasks, for a source matrix (gates·units, K):

- ``PACK_TRANSPOSED``: rows are k, columns are (unit vector, gate, lane): B of forward GEMMs.
- ``PACK``: rows are (unit vector, gate, lane), columns are k: B of backward GEMMs.
- ``PACK_SUM``: the sum of two bias vectors, as ``PACK_TRANSPOSED`` packs a matrix of one column.
- ``PACK_ZEROS``: zeros, for biases that do not exist.
"""


class PackTask(NamedTuple):
    """A matrix to pack.

    Attributes:
        kind: How to pack.
        source, source2: Offsets in the flat parameters; ``source2`` is the second bias of a sum.
        k: Columns of the source.
        panels: Panels to write.
        dest: Offset in the packed weights.
        gates, units, unit_vecs: Rows of the source: gates of so many units each, which so many vectors hold.
        panel_rows: Rows of a panel, for ``PACK``: those of several sources may follow one another in it.
    """

    kind: int
    source: int
    source2: int
    k: int
    panels: int
    dest: int
    gates: int
    units: int
    unit_vecs: int
    panel_rows: int = 0


CALL = Struct("tasks", "num_tasks", "num_threads", "flat", "packed")
TASK = Struct(*PackTask._fields)


@load_once(32)
def load_pack(dtype: str, target: Target) -> Job:
    """The job that packs weights of a float type."""
    return function(load(f"packing_{dtype}", target, build_pack, dtype, target), "pack", 2)


def build_pack(dtype: str, target: Target) -> Module:
    """The module of ``pack(call, thread)``."""
    module = Module(f"packing_{dtype}")
    kinds = PACK_TRANSPOSED, PACK, PACK_SUM, PACK_ZEROS
    emitters = [emitter(module, target, dtype).emit() for emitter in (_Transposed, _Plain, _Sum, _Zeros)]
    f = Function(module, "pack", ["call", "thread"], exported=True)
    call, thread = f.arguments
    c = CALL.read(f, call)
    with f.if_(thread < c.num_threads), f.loop(0, c.num_tasks) as number:
        task = c.tasks + number * TASK.size
        for emitted in f.switch(TASK.read(f, task).kind, dict(zip(kinds, emitters, strict=True))):
            f.call(emitted, call, thread, task)
    f.ret()
    return module


class _PackEmitter:
    """Emits a function of (call, thread, task), which packs the thread's part of a task."""

    def __init__(self, module: Module, target: Target, dtype: str) -> None:
        self.f = f = Function(module, type(self).__name__.strip("_").lower(), ["call", "thread", "task"])
        call, self.thread, task = f.arguments
        self.c, self.t = CALL.read(f, call), TASK.read(f, task)
        self.source, self.dest = self.c.flat + self.t.source, self.c.packed + self.t.dest
        self.v = Vectors(f, target, dtype)
        self.panel_vectors = target.tile[1]
        self.panel_bytes = self.panel_vectors * self.v.bytes

    def share(self, count: Value) -> tuple[Value, Value]:
        """The first item of this thread's share, and the end."""
        return count * self.thread // self.c.num_threads, count * (self.thread + 1) // self.c.num_threads

    def units_in(self, unit_vec: Value) -> Value:
        """Units that exist of a unit vector."""
        left = (self.t.units - unit_vec * self.v.lanes).at_most(self.v.lanes)
        return (left > 0).select(left, 0)

    def source_row(self, gate: Value, unit_vec: Value) -> Value:
        """The first row of the source that a vector of columns holds."""
        return gate * self.t.units + unit_vec * self.v.lanes


class _Transposed(_PackEmitter):
    def emit(self) -> Function:
        """Loop over panels and their vectors of columns, then over all rows k."""
        f, t, v = self.f, self.t, self.v
        row_bytes = t.k * v.item
        with f.loop(*self.share(t.panels)) as panel, f.loop(0, self.panel_vectors) as vector:
            col_vec = panel * self.panel_vectors + vector
            unit_vec, gate = col_vec // t.gates, col_vec % t.gates
            source = self.source + self.source_row(gate, unit_vec) * row_bytes
            dest = self.dest + (panel * t.k * self.panel_vectors + vector) * v.bytes
            count = self.units_in(unit_vec)
            with f.if_else(count.equals(v.lanes)) as (whole, tail):
                with whole:
                    self._transpose(source, row_bytes, dest)
                with tail, f.loop(0, t.k) as k:
                    at = dest + k * self.panel_bytes
                    v.store(v.const(0.0), at)
                    with f.loop(0, count) as lane:
                        scalar = f.load(source + lane * row_bytes + k * v.item, v.format.scalar, v.item)
                        f.store(scalar, at + lane * v.item, v.item)
        f.ret()
        return f

    def _transpose(self, source: Value, row_bytes: Value, dest: Value) -> None:
        """Transpose as many rows of the source as a vector has lanes."""
        f, t, v = self.f, self.t, self.v
        rows = [source + row_bytes * lane for lane in range(v.lanes)]
        whole_squares = t.k - t.k % v.lanes
        with f.loop(0, whole_squares, v.lanes) as first_k:
            for offset, column in enumerate(v.transpose_square([row + first_k * v.item for row in rows])):
                v.store(column, dest + (first_k + offset) * self.panel_bytes)
        with f.loop(whole_squares, t.k) as k:
            v.store(v.gather([row + k * v.item for row in rows]), dest + k * self.panel_bytes)


class _Sum(_PackEmitter):
    def emit(self) -> Function:
        """Loop over panels and their vectors."""
        f, t, v = self.f, self.t, self.v
        source2 = self.c.flat + t.source2
        with f.loop(*self.share(t.panels)) as panel, f.loop(0, self.panel_vectors) as vector:
            col_vec = panel * self.panel_vectors + vector
            unit_vec, gate = col_vec // t.gates, col_vec % t.gates
            count, at = self.units_in(unit_vec), self.source_row(gate, unit_vec) * v.item
            total = v.load_masked(self.source + at, count) + v.load_masked(source2 + at, count)
            v.store(total, self.dest + col_vec * v.bytes)
        f.ret()
        return f


class _Zeros(_PackEmitter):
    def emit(self) -> Function:
        """Loop over the vectors of all panels."""
        f, v = self.f, self.v
        first, end = self.share(self.t.panels)
        with f.loop(first * self.panel_vectors, end * self.panel_vectors) as col_vec:
            v.store(v.const(0.0), self.dest + col_vec * v.bytes)
        f.ret()
        return f


class _Plain(_PackEmitter):
    def emit(self) -> Function:
        """Loop over the rows of the source, each of which all panels share."""
        f, t, v = self.f, self.t, self.v
        with f.loop(*self.share(t.unit_vecs)) as unit_vec, f.loop(0, t.gates) as gate, f.loop(0, v.lanes) as lane:
            dest = self.dest + ((unit_vec * t.gates + gate) * v.lanes + lane) * self.panel_bytes
            with f.if_else(lane < self.units_in(unit_vec)) as (exists, padding):
                with exists:
                    self._row(self.source + (self.source_row(gate, unit_vec) + lane) * t.k * v.item, dest)
                with padding, f.loop(0, t.panels) as panel, f.loop(0, self.panel_vectors) as vector:
                    v.store(v.const(0.0), self._vector_address(dest, panel, vector))
        f.ret()
        return f

    def _vector_address(self, dest: Value, panel: Value, vector: Value | int) -> Value:
        """The destination of a vector of a row."""
        return dest + (panel * self.t.panel_rows * self.panel_vectors + vector) * self.v.bytes

    def _row(self, source: Value, dest: Value) -> None:
        f, t, v = self.f, self.t, self.v
        panel_features = self.panel_vectors * v.lanes
        whole_panels = t.k // panel_features
        with f.loop(0, whole_panels) as panel:
            for vector in range(self.panel_vectors):
                value = v.load(source + (panel * panel_features + vector * v.lanes) * v.item, v.item)
                v.store(value, self._vector_address(dest, panel, vector))
        with f.if_(whole_panels < t.panels):
            for vector in range(self.panel_vectors):
                feature = whole_panels * panel_features + vector * v.lanes
                value = v.load_masked(source + feature * v.item, t.k - feature)
                v.store(value, self._vector_address(dest, whole_panels, vector))
