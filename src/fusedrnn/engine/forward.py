"""The time loop: one job that runs every layer and direction of a network over a whole sequence.

Python decides everything beforehand and hands over records of integers (addresses and byte strides): ``CALL`` for the
call and a ``PASS`` for each layer and direction. A member of the gang owns some directions, some rows and some units
(whole vectors of hidden units with all their gates), and for a chunk of time steps at once multiplies the inputs with
just the weights that it will itself consume. Then, step by step: the recurrent GEMM, the cell's maths, h and c and y
written, and a barrier if other members need the new h.

Rows are in the order of falling lengths, so that those still alive at a step are the first ones, in either direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusedrnn.cells import CELLS
from fusedrnn.codegen.build import Function, Module, Record, Value
from fusedrnn.codegen.epilogue import new_states
from fusedrnn.codegen.sync import BARRIER_BYTES, emit_barrier, emit_wait, flush_denormals
from fusedrnn.codegen.target import Target
from fusedrnn.codegen.tile import emit_gemm
from fusedrnn.codegen.vector import Vectors
from fusedrnn.symbolic import Leaf, TracedCell, merge, trace

CALL = Record(
    "steps", "layers", "directions", "hidden",
    "grid_directions", "grid_rows", "grid_units", "row_starts", "unit_starts", "chunk",
    "order", "alive", "lengths",
    "passes", "barriers", "spins",
    "states", "state_stride", "state_direction", "cell_at",
    "scratch", "scratch_member", "h_rows_at", "gates_at", "gates_stride", "recurrent_at",
)  # fmt: skip
PASS = Record(
    "x", "x_step", "x_row", "k", "y", "y_step", "y_row", "reverse",
    "x_weights", "h_weights", "x_bias", "h_bias", "h0", "c0", "h_n", "c_n",
)  # fmt: skip


@dataclass(frozen=True)
class Blocking:
    """How the gates of a cell lie in panels: the units of a block fill a whole number of panels."""

    gates: int
    panel_vectors: int

    @property
    def block_units(self) -> int:
        """Vectors of units in a block."""
        return math.lcm(self.gates, self.panel_vectors) // self.gates

    @property
    def block_columns(self) -> int:
        """Vectors of gates in a block."""
        return self.block_units * self.gates


def build_forward(mode: str, dtype: str, target: Target) -> Module:
    """The module whose ``forward(call, member)`` is a gang's job."""
    module = Module(f"forward_{mode}_{dtype}")
    barrier = emit_barrier(module, emit_wait(module))
    sequence = _Sequence(module, merge(trace(CELLS[mode])), dtype, target, barrier).emit()
    f = Function(module, "forward", ["call", "member"], exported=True)
    call, member = f.arguments
    c = CALL.read(f, call)
    everyone = c.grid_directions * c.grid_rows * c.grid_units
    with f.if_(member < everyone), flush_denormals(f), f.loop(0, c.layers) as layer:
        with f.loop(member % c.grid_directions, c.directions, c.grid_directions) as direction:
            f.call(sequence, call, member, layer, direction)
        with f.if_(c.grid_directions * c.grid_units > 1):
            f.call(barrier, c.barriers, everyone, c.spins)
    f.done()
    return module


class _Sequence:
    """Emits ``sequence(call, member, layer, direction)``: a member's part of one pass."""

    def __init__(self, module: Module, cell: TracedCell, dtype: str, target: Target, barrier: Function) -> None:
        self.cell, self.barrier = cell, barrier
        self.gemm = emit_gemm(module, target, dtype)
        self.f = Function(module, "sequence", ["call", "member", "layer", "direction"])
        self.v = Vectors(self.f, target, dtype)
        self.panel_vectors = target.tile[1]
        self.blocking = Blocking(len(cell.gates), self.panel_vectors)
        if len(cell.stages) != 1:
            raise NotImplementedError("cells of more than one recurrent GEMM a step")

    def emit(self) -> Function:
        """Emit the function."""
        f = self.f
        call, member, layer, direction = f.arguments
        self.c = c = CALL.read(f, call)
        self.p = PASS.read(f, c.passes + (layer * c.directions + direction) * (8 * len(PASS.names)))
        self._divide(member)
        self._place(member, direction)
        self._enter()
        with f.loop(0, c.steps, c.chunk) as first:
            last = (c.steps < first + c.chunk).select(c.steps, first + c.chunk)
            self._inputs(first, last)
            done = f.var(0)
            with f.loop(first, last) as step:
                time = self._time(step)
                alive = self._alive(time)
                with f.if_(alive > 0):
                    self._step(step, time, alive, done.get())
                    done.set(done.get() + alive)
                    self._meet()
        self._exit()
        f.done()
        return f

    def _divide(self, member: Value) -> None:
        """Which rows and units are this member's."""
        f, c = self.f, self.c
        rest = member // c.grid_directions
        self.row_group, unit_group = rest % c.grid_rows, rest // c.grid_rows
        self.first_row = f.load(c.row_starts + self.row_group * 8)
        self.rows = f.load(c.row_starts + self.row_group * 8 + 8) - self.first_row
        self.first_unit = f.load(c.unit_starts + unit_group * 8)
        self.last_unit = f.load(c.unit_starts + unit_group * 8 + 8)
        self.first_panel = self.first_unit * self.blocking.gates // self.panel_vectors
        group = 1 + (member % c.grid_directions) * c.grid_rows + self.row_group
        self.meeting = c.barriers + group * BARRIER_BYTES

    def _place(self, member: Value, direction: Value) -> None:
        """Where this member's scratch and this direction's states lie."""
        c = self.c
        scratch = c.scratch + member * c.scratch_member
        self.x_rows, self.h_rows = scratch, scratch + c.h_rows_at
        self.gates, self.recurrent = scratch + c.gates_at, scratch + c.recurrent_at
        self.states = c.states + direction * c.state_direction + self.first_row * c.state_stride
        # h lies twice, for even and odd steps: a step reads one while it writes the other.
        self.h_size = c.cell_at / 2
        own = self.first_unit * self.v.bytes
        end = self.last_unit * self.v.lanes
        end = (end > c.hidden).select(c.hidden, end)
        self.own, self.own_bytes = own, end * self.v.item - own

    def _index(self, row: Value) -> Value:
        """The place in the batch of this member's row."""
        f, c = self.f, self.c
        place = f.var(self.first_row + row)
        with f.if_(c.order.compare("!=", 0)):
            place.set(f.load(c.order + place.get() * 8))
        return place.get()

    def _time(self, step: Value) -> Value:
        """The time of a step in this direction."""
        return self.p.reverse.compare("!=", 0).select(self.c.steps - 1 - step, step)

    def _alive(self, time: Value) -> Value:
        """How many of this member's rows have that time."""
        f, c = self.f, self.c
        alive = f.var(self.rows)
        with f.if_(c.alive.compare("!=", 0)):
            alive.set(f.load(c.alive + (self.row_group * c.steps + time) * 8))
        return alive.get()

    def _meet(self) -> None:
        """Wait for the members that share these rows."""
        f, c = self.f, self.c
        with f.if_(c.grid_units > 1):
            f.call(self.barrier, self.meeting, c.grid_units, c.spins)

    def _state_fields(self) -> list[tuple[str, Value, Value]]:
        """For each state: its name, and where the caller's initial and final values go (0 for nowhere)."""
        p = self.p
        ends = {"h": (p.h0, p.h_n), "c": (p.c0, p.c_n)}
        return [(name, *ends[name]) for name in self.cell.states]

    def _state_rows(self, name: str, row: Value) -> Value:
        """This member's row of a state buffer; the even one for h."""
        at = self.states + row * self.c.state_stride
        return at if name == "h" else at + self.c.cell_at

    def _enter(self) -> None:
        """Initial states into the state buffers, and the addresses of h's rows, even steps then odd."""
        f, c = self.f, self.c
        with f.loop(0, self.rows) as row:
            index = self._index(row)
            f.store(self._state_rows("h", row), self.h_rows + row * 8)
            f.store(self._state_rows("h", row) + self.h_size, self.h_rows + (self.rows + row) * 8)
            for name, initial, _ in self._state_fields():
                into = self._state_rows(name, row) + self.own
                with f.if_else(initial.equals(0)) as (absent, given):
                    with absent:
                        f.fill_zero(into, self.own_bytes)
                    with given:
                        f.copy(into, initial + index * c.hidden * self.v.item + self.own, self.own_bytes)
                if name == "h":
                    f.copy(into + self.h_size, into, self.own_bytes)
        self._meet()

    def _exit(self) -> None:
        """Final states to the caller: h from where each row's last step left it."""
        f, c, p = self.f, self.c, self.p
        with f.loop(0, self.rows) as row:
            index = self._index(row)
            steps = f.var(c.steps)
            with f.if_((p.reverse.equals(0)) & c.lengths.compare("!=", 0)):
                steps.set(f.load(c.lengths + (self.first_row + row) * 8))
            for name, _, final in self._state_fields():
                source = self._state_rows(name, row) + self.own
                if name == "h":
                    source = source + (steps.get() & 1) * self.h_size
                f.copy(final + index * c.hidden * self.v.item + self.own, source, self.own_bytes)

    def _inputs(self, first: Value, last: Value) -> None:
        """The input GEMM of a chunk: every live row of its steps against this member's panels."""
        f, p, v = self.f, self.p, self.v
        count = f.var(0)
        with f.loop(first, last) as step:
            time = self._time(step)
            at = p.x + time * p.x_step
            with f.loop(0, self._alive(time)) as row:
                f.store(at + self._index(row) * p.x_row, self.x_rows + count.get() * 8)
                count.set(count.get() + 1)
        width = self.panel_vectors * v.bytes
        with f.if_(count.get() > 0), f.loop(self.first_panel, self._panel_end(self.last_unit)) as panel:
            weights, bias = p.x_weights + panel * p.k * width, p.x_bias + panel * width
            into = self.gates + (panel - self.first_panel) * width
            f.call(self.gemm, count.get(), self.x_rows, weights, p.k, bias, 0, into, self.c.gates_stride)

    def _panel_end(self, unit: Value) -> Value:
        """The first panel past those that hold any gate of the units before this one."""
        return (unit * self.blocking.gates + (self.panel_vectors - 1)) // self.panel_vectors

    def _step(self, step: Value, time: Value, alive: Value, done: Value) -> None:
        """One step: block by block of units, the recurrent GEMM and then the cell's maths on what it gave."""
        f, c, p, v = self.f, self.c, self.p, self.v
        parity = step & 1
        h_rows = self.h_rows + parity * self.rows * 8
        gates = self.gates + done * c.gates_stride
        width = self.panel_vectors * v.bytes
        with f.loop(self.first_unit, self.last_unit, self.blocking.block_units) as unit:
            end = unit + self.blocking.block_units
            end = (end > self.last_unit).select(self.last_unit, end)
            first = unit * self.blocking.gates // self.panel_vectors
            with f.loop(first, self._panel_end(end)) as panel:
                weights = p.h_weights + panel * c.hidden * width
                if self.cell.merged:
                    at = gates + (panel - self.first_panel) * width
                    f.call(self.gemm, alive, h_rows, weights, c.hidden, at, c.gates_stride, at, c.gates_stride)
                else:
                    at = self.recurrent + (panel - first) * width
                    stride = self.blocking.block_columns * v.bytes
                    f.call(self.gemm, alive, h_rows, weights, c.hidden, p.h_bias + panel * width, 0, at, stride)
            with f.loop(0, alive) as row:
                y = p.y + time * p.y_step + self._index(row) * p.y_row
                with f.loop(unit, end) as at:
                    self._cell(row, at, at - unit, parity, gates, y)

    def _cell(self, row: Value, unit: Value, within: Value, parity: Value, gates: Value, y: Value) -> None:
        """The cell's maths on one vector of units of one row."""
        c, v, cell = self.c, self.v, self.cell
        offset = unit * v.bytes
        count = self.blocking.gates
        from_input = gates + row * c.gates_stride + (unit - self.first_unit) * (count * v.bytes)
        from_state = self.recurrent + (row * self.blocking.block_columns + within * count) * v.bytes
        state = {name: self._state_rows(name, row) + offset for name in cell.states}
        before, after = state["h"] + parity * self.h_size, state["h"] + (1 - parity) * self.h_size

        def leaf(which: Leaf) -> Value:
            kind, name = which
            if kind == "state":
                return v.load(before if name == "h" else state[name])
            source = from_state if kind == "h" else from_input
            return v.load(source + cell.gates.index(name) * v.bytes)

        for name, value in zip(cell.states, new_states(v, cell, leaf), strict=True):
            v.store(value, after if name == "h" else state[name])
            if name == "h":
                self._output(value, unit, y + offset)

    def _output(self, value: Value, unit: Value, at: Value) -> None:
        """A vector of y; at the end of a row only those units that exist."""
        left = self.c.hidden - unit * self.v.lanes
        with self.f.if_else(left >= self.v.lanes) as (whole, part):
            with whole:
                self.v.store(value, at, align=self.v.item)
            with part:
                self.v.store_first(value, at, left)

