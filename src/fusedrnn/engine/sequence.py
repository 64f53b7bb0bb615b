"""What the forward and the backward time loop share: the records they are handed, who owns what, which rows live.

Python decides everything beforehand and hands over records of integers (addresses and byte strides): one for the call
and one for each *pass*, which is a layer in a direction. A member of the gang owns some passes, some rows and some
units (whole vectors of hidden units with all their gates).

Rows are in the order of falling lengths, so that those still alive at a step are the first ones, in either direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fusedrnn.cells import CELLS
from fusedrnn.codegen.build import Fields, Function, Module, Record, Value
from fusedrnn.codegen.sync import BARRIER_BYTES, PROGRESS_BYTES, emit_barrier, emit_reach, emit_wait, tell
from fusedrnn.codegen.target import Target
from fusedrnn.codegen.vector import Vectors
from fusedrnn.derivative import Derivative, differentiate
from fusedrnn.symbolic import TracedCell, merge, trace

SHARED = (
    "steps", "batch", "layers", "directions", "hidden",
    "grid_passes", "grid_rows", "grid_units", "row_starts", "unit_starts", "chunk",
    "order", "alive", "lengths",
    "passes", "barriers", "progress", "spins",
    "record_step", "record_row", "kept_step", "kept_row",
    "threshold", "scale", "seed",
)  # fmt: skip
"""The fields that the records of both loops begin with.

``order``, ``alive`` and ``lengths`` are tables, 0 if every sequence has all steps: the place in the batch of each row;
for each row group, how many of its rows live at each time; the length of each row. ``record`` strides are those of the
states in a reserve, ``kept`` strides those of whatever else it keeps. ``threshold``, ``scale`` (the bits of a float64)
and ``seed`` are dropout's; a threshold of 0 means none. ``grid_passes`` groups run passes side by side: the directions
of a layer, or, where there is one direction, layers, each a chunk of steps behind the one whose results it reads;
``progress`` is how far each layer's row groups have come.
"""

MATRICES = "x_matrix", "h_matrix", "x_vector", "h_vector"
"""A pass's weights and biases as they lie: for a call without packed ones, whose ``x_weights`` is 0."""


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
    def block_panels(self) -> int:
        """Panels in a block."""
        return self.block_columns // self.panel_vectors

    @property
    def block_columns(self) -> int:
        """Vectors of gates in a block."""
        return self.block_units * self.gates


def cell_of(mode: str) -> TracedCell:
    """The cell as kernels compute it."""
    return merge(trace(CELLS[mode]))


def derivative_of(mode: str) -> Derivative:
    """Its derivative."""
    return differentiate(cell_of(mode))


def layers_side_by_side(c: Fields) -> Value:
    """Whether the groups of passes are layers."""
    return (c.grid_passes > 1) & c.directions.equals(1)


def each_pass(
    f: Function, c: Fields, member: Value, run: Callable[[Value, Value], None], after: Callable[[Value], None]
) -> None:
    """Emit ``run(layer, direction)`` for each of a member's passes, layers numbered in the order in which they run.

    Where layers run one by one ``after(layer)`` comes after each.
    """
    first = member % c.grid_passes
    with f.if_else(layers_side_by_side(c)) as (side_by_side, one_by_one):
        with side_by_side, f.loop(first, c.layers, c.grid_passes) as layer:
            run(layer, f.constant(0))
        with one_by_one, f.loop(0, c.layers) as layer:
            with f.loop(first, c.directions, c.grid_passes) as direction:
                run(layer, direction)
            after(layer)


def looked_up(f: Function, table: Value, place: Value, otherwise: Value) -> Value:
    """What a table has at a place, or something else if there is no table."""
    found = f.var(otherwise)
    with f.if_(table.compare("!=", 0)):
        found.set(f.load(table + place * 8))
    return found.get()


def step_at(f: Function, base: Value, step: Value, row: Value, firsts: Value, time: Value) -> Value:
    """Where the rows of a time begin in a sequence: so many steps on, or, packed, behind those of all times before."""
    at = f.var(time * step)
    with f.if_(firsts.compare("!=", 0)):
        at.set(f.load(firsts + time * 8) * row)
    return base + at.get()


@dataclass(frozen=True)
class Program:
    """What is emitted: a module for a cell in a float type on a target; its barrier, and the cell's derivative."""

    module: Module
    dtype: str
    target: Target
    cell: TracedCell
    derivative: Derivative
    barrier: Function
    reach: Function

    @classmethod
    def of(cls, name: str, mode: str, dtype: str, target: Target) -> Program:
        """A new module of that name."""
        module = Module(f"{name}_{mode}_{dtype}")
        wait = emit_wait(module)
        meeting = emit_barrier(module, wait), emit_reach(module, wait)
        return cls(module, dtype, target, cell_of(mode), derivative_of(mode), *meeting)


class Pass:
    """A function under construction, ``name(call, member, layer, direction, *more)``: a member's part of one pass."""

    def __init__(
        self, program: Program, name: str, records: tuple[Record, Record], more: tuple[str, ...] = ()
    ) -> None:
        self.cell, self.derivative = program.cell, program.derivative
        self.barrier, self.reach = program.barrier, program.reach
        self.f = f = Function(program.module, name, ["call", "member", "layer", "direction", *more])
        self.v = Vectors(f, program.target, program.dtype)
        self.panel_vectors = program.target.tile[1]
        self.panel_bytes = self.panel_vectors * self.v.bytes
        self.blocking = Blocking(len(program.cell.gates), self.panel_vectors)
        call, self.member, self.layer, self.direction = f.arguments[:4]
        self.c = c = records[0].read(f, call)
        number = self.layer * c.directions + self.direction
        self.p = records[1].read(f, c.passes + number * (8 * len(records[1].names)))
        self.is_unpacked = self.p.x_weights.equals(0)
        self._divide()

    def _divide(self) -> None:
        """Which rows and units are this member's."""
        f, c = self.f, self.c
        self.turn = self.member % c.grid_passes
        # What passes that run side by side must not share: directions, or layers of one.
        self.slot = c.directions.equals(1).select(self.turn, self.direction)
        rest = self.member // c.grid_passes
        self.row_group, self.unit_group = rest % c.grid_rows, rest // c.grid_rows
        self.first_row = f.load(c.row_starts + self.row_group * 8)
        self.rows = f.load(c.row_starts + self.row_group * 8 + 8) - self.first_row
        self.first_unit = f.load(c.unit_starts + self.unit_group * 8)
        self.last_unit = f.load(c.unit_starts + self.unit_group * 8 + 8)
        self.meeting = c.barriers + (1 + self.turn * c.grid_rows + self.row_group) * BARRIER_BYTES
        own = self.first_unit * self.v.bytes
        end = (self.last_unit * self.v.lanes).at_most(c.hidden)
        self.own, self.own_bytes = own, end * self.v.item - own

    def meet(self) -> None:
        """Wait for the members that share these rows."""
        f, c = self.f, self.c
        with f.if_(c.grid_units > 1):
            f.call(self.barrier, self.meeting, c.grid_units, c.spins)

    def _progress(self, layer: Value) -> Value:
        c = self.c
        return c.progress + (layer * c.grid_rows + self.row_group) * PROGRESS_BYTES

    def await_layer(self, layer: Value, steps: Value) -> None:
        """Where layers run side by side: wait until that one, if there is such a layer, has done so many steps."""
        f, c = self.f, self.c
        with f.if_(layers_side_by_side(c) & (layer >= 0) & (layer < c.layers)):
            f.call(self.reach, self._progress(layer), steps, c.spins)

    def tell_layers(self, steps: Value) -> None:
        """Where layers run side by side: these rows of this one have done so many steps, by all who share them."""
        with self.f.if_(layers_side_by_side(self.c) & self.unit_group.equals(0)):
            tell(self.f, self._progress(self.layer), steps)

    def index(self, row: Value) -> Value:
        """The place in the batch of this member's row."""
        place = self.first_row + row
        return looked_up(self.f, self.c.order, place, place)

    def time(self, step: Value) -> Value:
        """The time of a step of the forward loop in this direction."""
        return self.p.reverse.compare("!=", 0).select(self.c.steps - 1 - step, step)

    def alive(self, time: Value) -> Value:
        """How many of this member's rows have that time."""
        return looked_up(self.f, self.c.alive, self.row_group * self.c.steps + time, self.rows)

    def length(self, row: Value) -> Value:
        """The steps of this member's row."""
        return looked_up(self.f, self.c.lengths, self.first_row + row, self.c.steps)

    def time_before(self, time: Value) -> Value:
        """The time of the step before, in this direction."""
        return time + self.p.reverse.compare("!=", 0).select(self.f.constant(1), -1)

    def row_of_state(self, base: Value, index: Value) -> Value:
        """This member's part of a sequence's row in an array (N, H) of states."""
        return base + index * self.c.hidden * self.v.item + self.own

    def record(self, base: Value, time: Value, index: Value) -> Value:
        """A row of states in the reserve."""
        return base + time * self.c.record_step + index * self.c.record_row

    def draw(self, index: Value, time: Value) -> tuple[Value, ...]:
        """What the dropout of a sequence's features at a time depends on, in what this layer reads."""
        c = self.c
        return index, time, self.layer - 1, c.threshold, c.scale, c.seed

    def gathered(self, drop_row: Function, source: Value, into: Value, index: Value, time: Value) -> Value:
        """Where a row of what this layer reads is to be read: where it lies, or a copy if dropout takes some of it."""
        f = self.f
        at = f.var(source)
        with f.if_((self.layer > 0) & (self.c.threshold > 0)):
            at.set(into)
            f.call(drop_row, source, into, self.p.k, *self.draw(index, time))
        return at.get()

    def store_real(self, value: Value, unit: Value, at: Value) -> None:
        """A vector of units to memory of any alignment; at the end of a row only those units that exist."""
        left = self.c.hidden - unit * self.v.lanes
        with self.f.if_else(left >= self.v.lanes) as (whole, part):
            with whole:
                self.v.store(value, at, align=self.v.item)
            with part:
                self.v.store_first(value, at, left)

    def backwards(self, step: Value) -> Value:
        """Whether a step goes through the recurrent weights from their end: what the one before read last is near."""
        return (step & 1).compare("!=", 0)

    @contextmanager
    def panels(self, first: Value, last: Value, backwards: Value | None = None) -> Iterator[tuple[Value, Value]]:
        """The vectors of columns before ``last``, panel by panel: the first of a panel's that is wanted, how many."""
        with self._parts(first, last, self.panel_vectors, backwards) as (begin, end):
            yield begin, end - begin

    @contextmanager
    def blocks(self, backwards: Value | None = None) -> Iterator[tuple[Value, Value]]:
        """This member's units, block by block: the first of a block's that is its own, and the one past the last."""
        with self._parts(self.first_unit, self.last_unit, self.blocking.block_units, backwards) as part:
            yield part

    @contextmanager
    def _parts(
        self, first: Value, last: Value, size: int, backwards: Value | None
    ) -> Iterator[tuple[Value, Value]]:
        """A range cut at the multiples of a size, the last part first if it goes backwards."""
        lowest, past = first // size, (last + (size - 1)) // size
        with self.f.loop(lowest, past) as number:
            part = number if backwards is None else backwards.select(lowest + past - 1 - number, number)
            begin, end = part * size, part * size + size
            yield (begin < first).select(first, begin), end.at_most(last)

    def weights_at(self, weights: Value, column: Value, k: Value) -> Value:
        """Where a vector of columns begins in packed weights of k rows."""
        panel, within = column // self.panel_vectors, column % self.panel_vectors
        return weights + panel * k * self.panel_bytes + within * self.v.bytes
