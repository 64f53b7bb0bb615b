"""The kernel that packs weights into panels, the order in which GEMMs stream them.

A panel holds a few vectors of columns of a matrix, group of rows after group of rows: see
:mod:`fusedrnn.engines.cpu.kernels.products`. Padding at the end of rows and columns is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from fusedrnn.engines.cpu.kernels.panel_packing import emit_pack_columns, store_row_slots
from fusedrnn.engines.cpu.kernels.products import STORAGE, products_of
from fusedrnn.jit.builder import Function, Module, Value
from fusedrnn.jit.loader import Job, function, load, load_once
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors

PACK_TRANSPOSED, PACK, PACK_SUM, PACK_ZEROS, PACK_VECTOR = range(5)
"""Kinds of tasks, for a source matrix (gates·units, K):

- ``PACK_TRANSPOSED``: rows are k, columns are (unit vector, gate, lane): B of forward GEMMs.
- ``PACK``: rows are (unit vector, gate, lane), columns are k: B of backward GEMMs.
- ``PACK_VECTOR``: one bias vector or some parameters of a cell, as a matrix of one column; it is never rounded.
- ``PACK_SUM``: the sum of two such vectors.
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
        gates, units, unit_vecs: Rows of the source: so many gates of so many units each, which fill so many vectors.
        panel_rows: Rows of a panel, for ``PACK``: rows of several sources may follow one another in a panel.
        gate_units: Rows from one gate to the next, if these are more than ``units``; else 0.
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
    gate_units: int = 0


CALL = Struct("tasks", "num_tasks", "num_threads", "flat", "packed")
TASK = Struct(*PackTask._fields)


@load_once(32)
def load_pack(compute: str, target: Target) -> Job:
    """The job that packs weights for GEMMs on operands of that format."""
    return function(load(f"packing_{compute}", target, build_pack, compute, target), "pack", 2)


def build_pack(compute: str, target: Target) -> Module:
    """The module of ``pack(call, thread)``."""
    module = Module(f"packing_{compute}")
    kinds = PACK_TRANSPOSED, PACK, PACK_SUM, PACK_ZEROS, PACK_VECTOR
    emitters = [emitter(module, target, compute).emit() for emitter in (_Transposed, _Plain, _Sum, _Zeros, _Vector)]
    f = Function(module, "pack", ["call", "thread"], exported=True)
    call, thread = f.arguments
    c = CALL.read(f, call)
    with f.if_(thread < c.num_threads), f.loop(0, c.num_tasks) as number:
        task = c.tasks + number * TASK.size
        for emitted in f.switch(TASK.read(f, task).kind, dict(zip(kinds, emitters, strict=True))):
            f.call(emitted, call, thread, task)
    f.ret()
    return module


class Columns(NamedTuple):
    """A vector of columns of a panel."""

    panel: Value
    vector: Value  # its place in the panel
    col_vec: Value
    source_row: Value  # the first row of the source that it holds
    num_units: Value  # how many of its rows exist


class _PackEmitter:
    """Emits a function of (call, thread, task), which packs the thread's part of a task."""

    def __init__(self, module: Module, target: Target, compute: str) -> None:
        self.f = f = Function(module, type(self).__name__.strip("_").lower(), ["call", "thread", "task"])
        call, self.thread, task = f.arguments
        self.c, self.t = CALL.read(f, call), TASK.read(f, task)
        self.source, self.dest = self.c.flat + self.t.source, self.c.packed + self.t.dest
        self.v = Vectors(f, target, STORAGE[compute])
        self.products = products_of(compute, self.v)
        self.group, self.slot_bytes = self.products.group, self.products.b_bytes
        self.panel_vectors = target.tile[1]

    def share(self, count: Value) -> tuple[Value, Value]:
        """The first item of this thread's share, and the end."""
        return count * self.thread // self.c.num_threads, count * (self.thread + 1) // self.c.num_threads

    @contextmanager
    def columns(self) -> Iterator[Columns]:
        """Loop over the vectors of columns of this thread's panels."""
        f, t = self.f, self.t
        with f.loop(*self.share(t.panels)) as panel, f.loop(0, self.panel_vectors) as vector:
            col_vec = panel * self.panel_vectors + vector
            unit_vec, gate = col_vec // t.gates, col_vec % t.gates
            yield Columns(panel, vector, col_vec, self.source_row(gate, unit_vec), self.units_in(unit_vec))

    def units_in(self, unit_vec: Value) -> Value:
        """How many units of a unit vector exist."""
        left = (self.t.units - unit_vec * self.v.lanes).at_most(self.v.lanes)
        return (left > 0).select(left, 0)

    def source_row(self, gate: Value, unit_vec: Value) -> Value:
        """The first row of the source that a vector of columns holds."""
        t = self.t
        return gate * t.gate_units.is_zero.select(t.units, t.gate_units) + unit_vec * self.v.lanes


class _Transposed(_PackEmitter):
    def __init__(self, module: Module, target: Target, compute: str) -> None:
        self._pack_columns = emit_pack_columns(module, target, compute)
        super().__init__(module, target, compute)

    def emit(self) -> Function:
        """Loop over panels and their vectors of columns, each with all groups of rows k."""
        f, t, v = self.f, self.t, self.v
        groups = (t.k + (self.group - 1)) // self.group + self.products.head
        with self.columns() as columns:
            source = self.source + columns.source_row * t.k * v.item
            dest = self.dest + (columns.panel * groups * self.panel_vectors + columns.vector) * self.slot_bytes
            f.call(self._pack_columns, source, t.k * v.item, t.k, dest, columns.num_units)
        f.ret()
        return f


class _Vector(_PackEmitter):
    def emit(self) -> Function:
        """Loop over panels and their vectors."""
        v = self.v
        with self.columns() as columns:
            values = self.values(columns.source_row * v.item, columns.num_units)
            v.store(values, self.dest + columns.col_vec * v.bytes)
        self.f.ret()
        return self.f

    def values(self, offset: Value, count: Value) -> Value:
        """A vector of so many values."""
        return self.v.load_masked(self.source + offset, count)


class _Sum(_Vector):
    def values(self, offset: Value, count: Value) -> Value:
        """A vector of so many sums."""
        return super().values(offset, count) + self.v.load_masked(self.c.flat + self.t.source2 + offset, count)


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
        """Loop over the groups of rows of the source, each of which all panels share."""
        f, t, v = self.f, self.t, self.v
        with (
            f.loop(*self.share(t.unit_vecs)) as unit_vec,
            f.loop(0, t.gates) as gate,
            f.loop(0, v.lanes, self.group) as lane,
        ):
            group = ((unit_vec * t.gates + gate) * v.lanes + lane) // self.group
            dest = self.dest + group * (self.panel_vectors * self.slot_bytes)
            first_row = self.source + (self.source_row(gate, unit_vec) + lane) * t.k * v.item
            rows = [first_row + t.k * number * v.item for number in range(self.group)]
            rows_left = self.units_in(unit_vec) - lane
            with f.if_else(rows_left >= self.group) as (whole, tail):
                with whole:
                    whole_panels = t.k // (self.panel_vectors * v.lanes)
                    self._panels(rows, dest, (f.constant(0), whole_panels))
                    self._panels(rows, dest, (whole_panels, t.panels), [t.k] * self.group)
                with tail:
                    sizes = [(rows_left > number).select(t.k, 0) for number in range(self.group)]
                    self._panels(rows, dest, (f.constant(0), t.panels), sizes)
        f.ret()
        return f

    def _panels(
        self, rows: Sequence[Value], dest: Value, panels: tuple[Value, Value], sizes: Sequence[Value] | None = None
    ) -> None:
        """Pack the rows' features of some panels: all of them exist, or as many of each row as ``sizes`` says."""
        t, v = self.t, self.v
        with self.f.loop(*panels) as panel:
            feature = panel * self.panel_vectors * v.lanes
            from_feature = [row + feature * v.item for row in rows]
            into = dest + panel * (t.panel_rows // self.group) * self.panel_vectors * self.slot_bytes
            left = None if sizes is None else [size - feature for size in sizes]
            store_row_slots(v, self.products, from_feature, into, self.panel_vectors, left)
