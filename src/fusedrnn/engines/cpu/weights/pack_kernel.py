"""Weights into the order in which the kernels stream them, as a job that a pool shares.

``FORWARD`` packs a matrix (gates·units, K) into panels whose columns are (vector of units, gate, lane), for one k after
the other. ``BACKWARD`` packs it transposed: panels of a few vectors of its K columns, for one (vector of units, gate,
lane) after the other. ``SUM`` packs the sum of two bias vectors as ``FORWARD`` packs one. ``ZEROS`` is for what is not
there. Zeros stand where units or columns are missing at the end.
"""

from __future__ import annotations

from fusedrnn.jit.builder import Function, Module, Value
from fusedrnn.jit.loader import Job, function, load, load_once
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors

CALL = Struct("tasks", "count", "members", "flat", "packed")
TASK = Struct("kind", "source", "also", "columns", "panels", "into", "gates", "hidden", "units", "depth")
"""What to pack, and what to add to it: bytes behind ``flat``; where to: bytes behind ``packed``. Its rows are so many
gates, each of so many units, in so many vectors. ``depth`` is the rows of a panel for backward, which may be those of
several matrices."""
FORWARD, BACKWARD, SUM, ZEROS = 0, 1, 2, 3


@load_once(32)
def load_pack(dtype: str, target: Target) -> Job:
    """The job that packs weights of a float type."""
    return function(load(f"packing_{dtype}", target, build_packing, dtype, target), "pack", 2)


def build_packing(dtype: str, target: Target) -> Module:
    """The module of ``pack(call, member)``."""
    module = Module(f"packing_{dtype}")
    tasks = [kind(module, target, dtype).emit() for kind in (_Forward, _Backward, _Sum, _Zeros)]
    f = Function(module, "pack", ["call", "member"], exported=True)
    call, member = f.arguments
    c = CALL.read(f, call)
    with f.if_(member < c.members), f.loop(0, c.count) as number:
        task = c.tasks + number * TASK.size
        with f.switch(TASK.read(f, task).kind, (FORWARD, BACKWARD, SUM, ZEROS)) as cases:
            for function, case in zip(tasks, cases, strict=True):
                with case:
                    f.call(function, call, member, task)
    f.ret()
    return module


class _Packing:
    """A function of (call, member, task) under construction."""

    def __init__(self, module: Module, target: Target, dtype: str) -> None:
        self.f = f = Function(module, type(self).__name__.strip("_").lower(), ["call", "member", "task"])
        call, self.member, task = f.arguments
        self.c, self.t = CALL.read(f, call), TASK.read(f, task)
        self.source, self.into = self.c.flat + self.t.source, self.c.packed + self.t.into
        self.v = Vectors(f, target, dtype)
        self.width = target.tile[1]

    def share(self, count: Value) -> tuple[Value, Value]:
        """The first and the last of this member's part."""
        return count * self.member // self.c.members, count * (self.member + 1) // self.c.members

    def real_units(self, unit: Value) -> Value:
        """Units in a vector of them; none past the end."""
        left = (self.t.hidden - unit * self.v.lanes).at_most(self.v.lanes)
        return (left > 0).select(left, 0)


class _Forward(_Packing):
    def emit(self) -> Function:
        """Panel by panel, vector by vector of columns, over all k."""
        f, t, v = self.f, self.t, self.v
        first, last = self.share(t.panels)
        row_bytes = t.columns * v.item
        with f.loop(first, last) as panel, f.loop(0, self.width) as number:
            column = panel * self.width + number
            unit, gate = column // t.gates, column % t.gates
            source = self.source + (gate * t.hidden + unit * v.lanes) * row_bytes
            into = self.into + (panel * t.columns * self.width + number) * v.bytes
            count = self.real_units(unit)
            with f.if_else(count.equals(v.lanes)) as (whole, part):
                with whole:
                    self._turned(source, row_bytes, into)
                with part, f.loop(0, t.columns) as k:
                    at = into + k * (self.width * v.bytes)
                    v.store(v.const(0.0), at)
                    with f.loop(0, count) as lane:
                        scalar = f.load(source + lane * row_bytes + k * v.item, v.format.scalar, v.item)
                        f.store(scalar, at + lane * v.item, v.item)
        f.ret()
        return f

    def _turned(self, source: Value, row_bytes: Value, into: Value) -> None:
        """As many rows as there are lanes, side by side for one k after the other."""
        f, t, v = self.f, self.t, self.v
        step = self.width * v.bytes
        rows = [source + row_bytes * lane for lane in range(v.lanes)]
        even = t.columns - t.columns % v.lanes
        with f.loop(0, even, v.lanes) as k:
            for ahead, vector in enumerate(v.transpose_square([row + k * v.item for row in rows])):
                v.store(vector, into + (k + ahead) * step)
        with f.loop(even, t.columns) as k:
            v.store(v.gather([row + k * v.item for row in rows]), into + k * step)


class _Sum(_Packing):
    def emit(self) -> Function:
        """Panel by panel, vector by vector."""
        f, t, v = self.f, self.t, self.v
        first, last = self.share(t.panels)
        also = self.c.flat + t.also
        with f.loop(first, last) as panel, f.loop(0, self.width) as number:
            column = panel * self.width + number
            unit, gate = column // t.gates, column % t.gates
            count, at = self.real_units(unit), (gate * t.hidden + unit * v.lanes) * v.item
            total = v.load_masked(self.source + at, count) + v.load_masked(also + at, count)
            v.store(total, self.into + column * v.bytes)
        f.ret()
        return f


class _Zeros(_Packing):
    def emit(self) -> Function:
        """Panel by panel."""
        f, v = self.f, self.v
        first, last = self.share(self.t.panels)
        with f.loop(first * self.width, last * self.width) as column:
            v.store(v.const(0.0), self.into + column * v.bytes)
        f.ret()
        return f


class _Backward(_Packing):
    def emit(self) -> Function:
        """Row by row, each cut into the panels."""
        f, t, v = self.f, self.t, self.v
        first, last = self.share(t.units)
        depth = t.depth
        with f.loop(first, last) as unit, f.loop(0, t.gates) as gate, f.loop(0, v.lanes) as lane:
            into = self.into + ((unit * t.gates + gate) * v.lanes + lane) * (self.width * v.bytes)
            with f.if_else(lane < self.real_units(unit)) as (real, absent):
                with real:
                    source = self.source + (gate * t.hidden + unit * v.lanes + lane) * t.columns * v.item
                    self._row(source, into, depth)
                with absent, f.loop(0, t.panels) as panel, f.loop(0, self.width) as number:
                    v.store(v.const(0.0), into + (panel * depth * self.width + number) * v.bytes)
        f.ret()
        return f

    def _row(self, source: Value, into: Value, depth: Value) -> None:
        f, t, v = self.f, self.t, self.v
        panel_features = self.width * v.lanes
        whole = t.columns // panel_features
        with f.loop(0, whole) as panel:
            for number in range(self.width):
                value = v.load(source + (panel * panel_features + number * v.lanes) * v.item, v.item)
                v.store(value, into + (panel * depth * self.width + number) * v.bytes)
        with f.if_(whole < t.panels):
            for number in range(self.width):
                feature = whole * panel_features + number * v.lanes
                value = v.load_masked(source + feature * v.item, t.columns - feature)
                v.store(value, into + (whole * depth * self.width + number) * v.bytes)
