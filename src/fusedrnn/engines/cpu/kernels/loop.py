"""What the forward and the backward time loop share: the records they are handed, who owns what, which rows live.

Python decides everything beforehand and hands over records of integers (addresses and byte strides): one for the call
and one for each *pass*, which is a layer in a direction. A member of the pool owns some passes, some rows and some
units (whole vectors of hidden units with all their gates).

Rows are in the order of falling lengths, so that those still alive at a step are the first ones, in either direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fusedrnn.cell.cells import Variant
from fusedrnn.cell.derivative import Derivative
from fusedrnn.cell.trace import TracedCell
from fusedrnn.engines.cpu.kernels.dropout import DROP_ROW
from fusedrnn.engines.cpu.kernels.stages import (
    Blocking,
    StageKernel,
    derivative_of,
    is_plain,
    lowered_cell,
    stage_kernels,
)
from fusedrnn.jit.builder import Declared, Function, Module, Value
from fusedrnn.jit.struct import Fields, Struct
from fusedrnn.jit.sync import (
    BARRIER_BYTES,
    PROGRESS_BYTES,
    emit_barrier,
    emit_wait,
    emit_wait_for_progress,
    publish_progress,
)
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors

SHARED = (
    "steps", "batch", "layers", "directions", "hidden", "out",
    "grid_layer_dirs", "grid_rows", "grid_units", "row_starts", "unit_starts", "out_starts", "chunk",
    "row_to_sequence", "active_rows", "lengths",
    "layer_dirs", "spins",
    "saved_state_step", "saved_state_row", "saved_values_step", "saved_values_row",
    "threshold", "scale", "seed",
)  # fmt: skip
"""The fields that the records of both loops begin with.

``hidden`` is H, ``out`` is S: the size of h, which a projection makes less.
``order``, ``alive`` and ``lengths`` are tables, 0 if every sequence has all steps: the place in the batch of each row;
for each row group, how many of its rows live at each time; the length of each row. ``record`` strides are those of the
states in a reserve, ``kept`` strides those of whatever else it keeps. ``threshold``, ``scale`` (the bits of a float64)
and ``seed`` are dropout's; a threshold of 0 means none. ``grid_layer_dirs`` groups run passes side by side: the
directions
of a layer, or, where there is one direction, layers, each a chunk of steps behind the one whose results it reads;
``progress`` is how far each layer's row groups have come.
"""

UNPACKED_PARAMS = "unpacked_x_weights", "unpacked_h_weights", "unpacked_x_bias", "unpacked_h_bias"
"""A pass's weights and biases as they lie: for a call without packed ones, whose ``x_weights`` is 0."""


def layers_side_by_side(c: Fields) -> Value:
    """Whether the groups of passes are layers."""
    return (c.grid_layer_dirs > 1) & c.directions.equals(1)


def each_pass(
    f: Function, c: Fields, member: Value, run: Callable[[Value, Value], None], after: Callable[[Value], None]
) -> None:
    """Emit ``run(layer, direction)`` for each of a member's passes, layers numbered in the order in which they run.

    Where layers run one by one ``after(layer)`` comes after each.
    """
    first = member % c.grid_layer_dirs
    with f.if_else(layers_side_by_side(c)) as (side_by_side, one_by_one):
        with side_by_side, f.loop(first, c.layers, c.grid_layer_dirs) as layer:
            run(layer, f.constant(0))
        with one_by_one, f.loop(0, c.layers) as layer:
            with f.loop(first, c.directions, c.grid_layer_dirs) as direction:
                run(layer, direction)
            after(layer)


def looked_up(f: Function, table: Value, place: Value, otherwise: Value) -> Value:
    """What a table has at a place, or something else if there is no table."""
    found = f.var(otherwise)
    with f.if_(table.is_set):
        found.set(f.load(table + place * 8))
    return found.get()


def step_at(f: Function, base: Value, step: Value, row: Value, firsts: Value, time: Value) -> Value:
    """Where the rows of a time begin in a sequence: so many steps on, or, packed, behind those of all times before."""
    at = f.var(time * step)
    with f.if_(firsts.is_set):
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
    stages: tuple[StageKernel, ...]
    barrier: Function
    reach: Function

    @classmethod
    def of(cls, name: str, variant: Variant, dtype: str, target: Target) -> Program:
        """A new module of that name."""
        module = Module(f"{name}_{variant.slug}_{dtype}")
        wait = emit_wait(module)
        meeting = emit_barrier(module, wait), emit_wait_for_progress(module, wait)
        return cls(
            module, dtype, target, lowered_cell(variant), derivative_of(variant), stage_kernels(variant), *meeting
        )

    @property
    def is_plain(self) -> bool:
        """Whether the cell has one stage and matrices alone: then calls can use weights as they lie."""
        return is_plain(self.cell)


@dataclass(frozen=True)
class Units:
    """A member's share of hidden units, or of a projection's.

    Attributes:
        first, last: Its first vector of them, and the one past its last.
        size: How many units there are in all.
        own, own_bytes: Where its units begin in a row of them, and how many bytes they are.
    """

    first: Value
    last: Value
    size: Value
    own: Value
    own_bytes: Value


class Pass:
    """A function under construction, ``name(call, member, layer, direction, *more)``: a member's part of one pass."""

    def __init__(
        self, program: Program, name: str, records: tuple[Struct, Struct], more: tuple[str, ...] = ()
    ) -> None:
        self.cell, self.derivative = program.cell, program.derivative
        self.barrier, self.reach = program.barrier, program.reach
        self.f = f = Function(program.module, name, ["call", "member", "layer", "direction", *more])
        self.v = Vectors(f, program.target, program.dtype)
        self.panel_vectors = program.target.tile[1]
        self.panel_bytes = self.panel_vectors * self.v.bytes
        self.stages = program.stages
        self.gates = len(program.cell.gates)
        self.is_plain = program.is_plain
        call, self.member, self.layer, self.direction = f.arguments[:4]
        self.c = c = records[0].read(f, call)
        number = self.layer * c.directions + self.direction
        self.p = records[1].read(f, c.layer_dirs + number * (8 * len(records[1].names)))
        self.is_unpacked = self.p.x_weights.is_zero
        self._divide()

    def _divide(self) -> None:
        """Which rows and units are this member's."""
        f, c = self.f, self.c
        self.turn = self.member % c.grid_layer_dirs
        # What passes that run side by side must not share: directions, or layers of one.
        self.slot = c.directions.equals(1).select(self.turn, self.direction)
        rest = self.member // c.grid_layer_dirs
        self.row_group, self.unit_group = rest % c.grid_rows, rest // c.grid_rows
        self.first_row = f.load(c.row_starts + self.row_group * 8)
        self.rows = f.load(c.row_starts + self.row_group * 8 + 8) - self.first_row
        self.hidden = self._units(c.unit_starts, c.hidden)
        self.out = self._units(c.out_starts, c.out) if self.cell.projects else self.hidden
        self.meeting = c.barriers + (1 + self.turn * c.grid_rows + self.row_group) * BARRIER_BYTES

    def _units(self, starts: Value, size: Value) -> Units:
        f, v = self.f, self.v
        first, last = (f.load(starts + self.unit_group * 8 + more) for more in (0, 8))
        own, end = first * v.bytes, (last * v.lanes).at_most(size)
        return Units(first, last, size, own, end * v.item - own)

    def units_of(self, stage: StageKernel) -> Units:
        """This member's share of the units for which a stage has columns."""
        return self.out if stage.projects else self.hidden

    def units_of_state(self, name: str) -> Units:
        """This member's share of a state."""
        return self.out if name == "h" else self.hidden

    def operand_size(self, stage: StageKernel) -> Value:
        """Elements of what a stage multiplies."""
        return self.c.hidden if stage.index else self.c.out

    @property
    def gate_stages(self) -> list[StageKernel]:
        """The stages that have gates, and so a part of the input weights."""
        return [stage for stage in self.stages if not stage.projects]

    def part_of(self, gate: str) -> StageKernel:
        """The stage that has a gate."""
        return next(stage for stage in self.stages if gate in stage.gate_names)

    def from_input(self, row: Value, gate: str, unit: Value) -> Value:
        """Where a row of this member's gates has a vector of units of a gate, of whatever stage."""
        stage = self.part_of(gate)
        place = (unit - self.hidden.first) * stage.num_gates + stage.gate_names.index(gate)
        return row + self.region(stage) + place * self.v.bytes

    def vectors_of(self, size: Value) -> Value:
        """Vectors that hold so many units."""
        return (size + (self.v.lanes - 1)) // self.v.lanes

    def base_column(self, stage: StageKernel) -> Value:
        """The first of a stage's columns in packed weights of all gates: each stage begins with a new panel."""
        units, width = self.vectors_of(self.c.hidden), self.panel_vectors
        base = self.f.constant(0)
        for other in self.stages[: stage.index]:
            base = base + (units * other.num_gates + (width - 1)) // width * width
        return base

    def region(self, stage: StageKernel) -> Value:
        """Where a stage's gates begin in a row of this member's gates."""
        return (self.hidden.last - self.hidden.first) * (stage.first_gate * self.v.bytes)

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
        with self.f.if_(layers_side_by_side(self.c) & self.unit_group.is_zero):
            publish_progress(self.f, self._progress(self.layer), steps)

    def index(self, row: Value) -> Value:
        """The place in the batch of this member's row."""
        place = self.first_row + row
        return looked_up(self.f, self.c.row_to_sequence, place, place)

    def time(self, step: Value) -> Value:
        """The time of a step of the forward loop in this direction."""
        return self.p.reverse.is_set.select(self.c.steps - 1 - step, step)

    def alive(self, time: Value) -> Value:
        """How many of this member's rows have that time."""
        return looked_up(self.f, self.c.active_rows, self.row_group * self.c.steps + time, self.rows)

    def length(self, row: Value) -> Value:
        """The steps of this member's row."""
        return looked_up(self.f, self.c.lengths, self.first_row + row, self.c.steps)

    def time_before(self, time: Value) -> Value:
        """The time of the step before, in this direction."""
        return time + self.p.reverse.is_set.select(self.f.constant(1), -1)

    def row_of_state(self, name: str, base: Value, index: Value) -> Value:
        """This member's part of a sequence's row in an array (N, size) of a state."""
        units = self.units_of_state(name)
        return base + index * units.size * self.v.item + units.own

    def bring_state(self, name: str, base: Value, index: Value, into: Value) -> None:
        """This member's part of a sequence's row of a state (N, size) to where it is needed; zeros if there is none."""
        f, size = self.f, self.units_of_state(name).own_bytes
        with f.if_else(base.is_zero) as (absent, given):
            with absent:
                f.fill_zero(into, size)
            with given:
                f.copy(into, self.row_of_state(name, base, index), size)

    def record(self, base: Value, time: Value, index: Value) -> Value:
        """A row of states in the reserve."""
        return base + time * self.c.saved_state_step + index * self.c.saved_state_row

    def draw(self, index: Value, time: Value) -> tuple[Value, ...]:
        """What the dropout of a sequence's features at a time depends on, in what this layer reads."""
        c = self.c
        return index, time, self.layer - 1, c.threshold, c.scale, c.seed

    def gathered(self, source: Value, into: Value, index: Value, time: Value) -> Value:
        """Where a row of what this layer reads is to be read: where it lies, or a copy if dropout takes some of it."""
        f = self.f
        at = f.var(source)
        with f.if_((self.layer > 0) & (self.c.threshold > 0)):
            at.set(into)
            f.call(Declared(f.module, DROP_ROW), source, into, self.p.k, *self.draw(index, time))
        return at.get()

    def store_real(self, value: Value, unit: Value, at: Value, size: Value) -> None:
        """A vector of so many units to memory of any alignment; at the end of a row only those units that exist."""
        left = size - unit * self.v.lanes
        with self.f.if_else(left >= self.v.lanes) as (whole, tail):
            with whole:
                self.v.store(value, at, align=self.v.item)
            with tail:
                self.v.store_masked(value, at, left)

    def backwards(self, step: Value) -> Value:
        """Whether a step goes through the recurrent weights from their end: what the one before read last is near."""
        return (step & 1).is_set

    def peephole(self, gate: str, unit: Value) -> Value:
        """The peephole weights of a gate, for a vector of units."""
        count, place = len(self.cell.peepholes), self.cell.peepholes.index(gate)
        return self.v.load(self.p.peepholes + (unit * count + place) * self.v.bytes)

    @contextmanager
    def panels(self, first: Value, last: Value, backwards: Value | None = None) -> Iterator[tuple[Value, Value]]:
        """The vectors of columns before ``last``, panel by panel: the first of a panel's that is wanted, how many."""
        with self._parts(first, last, self.panel_vectors, backwards) as (begin, end):
            yield begin, end - begin

    @contextmanager
    def blocks(self, stage: StageKernel, backwards: Value | None = None) -> Iterator[tuple[Value, Value]]:
        """This member's units, block by block: the first of a block's that is its own, and the one past the last."""
        units, size = self.units_of(stage), self.blocking(stage).block_unit_vecs
        with self._parts(units.first, units.last, size, backwards) as block:
            yield block

    def blocking(self, stage: StageKernel) -> Blocking:
        """How a stage's columns lie in panels."""
        return Blocking(stage.num_gates, self.panel_vectors)

    @contextmanager
    def _parts(
        self, first: Value, last: Value, size: int, backwards: Value | None
    ) -> Iterator[tuple[Value, Value]]:
        """A range cut at the multiples of a size, the last stage first if it goes backwards."""
        lowest, past = first // size, (last + (size - 1)) // size
        with self.f.loop(lowest, past) as number:
            stage = number if backwards is None else backwards.select(lowest + past - 1 - number, number)
            begin, end = stage * size, stage * size + size
            yield (begin < first).select(first, begin), end.at_most(last)

    def weights_at(self, weights: Value, column: Value, k: Value) -> Value:
        """Where a vector of columns begins in packed weights of k rows."""
        panel, within = column // self.panel_vectors, column % self.panel_vectors
        return weights + panel * k * self.panel_bytes + within * self.v.bytes
