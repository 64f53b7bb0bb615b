"""What a thread works on: its layer-directions, its rows, its units; and how it waits for other threads.

Python plans a call and hands the kernels structs of integers: one for the call, and one for each layer-direction, which
is a layer in one direction. The grid of threads divides layer-directions, rows and units (whole vectors of hidden units
with all their gates).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fusedrnn.cell.cells import Variant
from fusedrnn.cell.derivative import Derivative
from fusedrnn.cell.trace import TracedCell
from fusedrnn.engines.cpu.kernels.lowered_cell import (
    Blocking,
    LoweredStage,
    column_groups,
    derivative_of,
    input_groups,
    input_only_groups,
    is_plain,
    lowered_cell,
    lowered_stages,
)
from fusedrnn.engines.cpu.kernels.panel_matrix import ColVecs
from fusedrnn.engines.cpu.kernels.products import STORAGE, products_of
from fusedrnn.jit.builder import Function, Module, Operand, Value
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


@dataclass(frozen=True)
class Program:
    """A module under construction: a cell's kernel on a target, and the functions that all of it calls.

    ``compute`` is the format of the operands of its GEMMs, ``dtype`` that of everything else.
    """

    module: Module
    compute: str
    dtype: str
    target: Target
    cell: TracedCell
    derivative: Derivative
    stages: tuple[LoweredStage, ...]
    input_only_groups: tuple[LoweredStage, ...]
    barrier: Function
    wait_for_progress: Function
    is_residual: bool

    @classmethod
    def of(cls, name: str, variant: Variant, compute: str, target: Target) -> Program:
        """A new module of that name."""
        module = Module(f"{name}_{variant.slug}_{compute}")
        wait = emit_wait(module)
        return cls(
            module, compute, STORAGE[compute], target,
            lowered_cell(variant), derivative_of(variant), lowered_stages(variant), input_only_groups(variant),
            emit_barrier(module, wait), emit_wait_for_progress(module, wait), variant.residual == "identity",
        )  # fmt: skip


def is_pipelined(c: Fields) -> Value:
    """Whether the layers of a network of one direction are pipelined: each a chunk of steps behind the one it reads."""
    return (c.grid_layer_dirs > 1) & c.directions.equals(1)


def each_layer_dir(
    f: Function, c: Fields, thread: Value, run: Callable[[Value, Value], None], after: Callable[[Value], None]
) -> None:
    """Emit ``run(layer, direction)`` for each of a thread's layer-directions, in the order in which layers run.

    Where layers are not pipelined, ``after(layer)`` follows each layer.
    """
    first = thread % c.grid_layer_dirs
    with f.if_else(is_pipelined(c)) as (pipelined, one_by_one):
        with pipelined, f.loop(first, c.layers, c.grid_layer_dirs) as layer:
            run(layer, f.constant(0))
        with one_by_one, f.loop(0, c.layers) as layer:
            with f.loop(first, c.directions, c.grid_layer_dirs) as direction:
                run(layer, direction)
            after(layer)


@dataclass(frozen=True)
class UnitRange:
    """A thread's share of the hidden units, or of the units of h."""

    first: Value
    last: Value  # past its last vector of units
    size: Value  # the units of all threads
    offset: Value  # bytes before its part in a row of all units
    num_bytes: Value


class ThreadShare:
    """A function under construction, ``name(call, thread, layer, direction, *more)``: a thread's share of the work.

    Attributes:
        c, p: The fields of the structs of the call and of the layer-direction.
        layer_dir_group, row_group, unit_group: The thread's position in the grid.
        concurrent: The index of this layer-direction among those that run at the same time.
    """

    def __init__(self, program: Program, name: str, structs: tuple[Struct, Struct], more: tuple[str, ...] = ()) -> None:
        self.cell, self.derivative, self.stages = program.cell, program.derivative, program.stages
        self.input_only_groups, self.is_residual = program.input_only_groups, program.is_residual
        self._barrier, self._wait_for_progress = program.barrier, program.wait_for_progress
        self.f = f = Function(program.module, name, ["call", "thread", "layer", "direction", *more])
        self.v = Vectors(f, program.target, program.dtype)
        self.panel_vectors = program.target.tile[1]
        self.panel_bytes = self.panel_vectors * self.v.bytes
        self.num_gates = len(program.cell.x_gates)
        self.products = products_of(program.compute, self.v)
        # Vectors of columns that GEMMs of one row multiply at once, in whole panels.
        self.one_row_vectors = self.panel_vectors * program.target.one_row_panels
        # A result that needs no scale is converted as it is stored, not where it is read.
        converts_results = self.products.converts_rows and not self.products.has_scales
        self.stores_operands = converts_results and bool(self.gemm_stages)
        self.operand_vector_bytes = self.v.lanes * self.products.a_item
        self.can_read_unpacked = is_plain(program.cell) and self.products.reads_unpacked
        call, self.thread, self.layer, self.direction = f.arguments[:4]
        self.c = c = structs[0].read(f, call)
        index = self.layer * c.directions + self.direction
        self.p = structs[1].read(f, c.layer_dirs + index * structs[1].size)
        self.is_unpacked = self.p.x_weights.is_zero
        self.layer_dir_group = self.thread % c.grid_layer_dirs
        self.concurrent = c.directions.equals(1).select(self.layer_dir_group, self.direction)
        rest = self.thread // c.grid_layer_dirs
        self.row_group, self.unit_group = rest % c.grid_rows, rest // c.grid_rows
        self.first_row = f.load(c.row_starts + self.row_group * 8)
        self.rows = f.load(c.row_starts + self.row_group * 8 + 8) - self.first_row
        self.hidden = self._unit_range(c.unit_starts, c.hidden)
        self.out = self._unit_range(c.out_starts, c.out) if self.cell.projects else self.hidden
        self.row_group_barrier = c.barriers + (1 + self.layer_dir_group * c.grid_rows + self.row_group) * BARRIER_BYTES

    def _unit_range(self, starts: Value, size: Value) -> UnitRange:
        f, v = self.f, self.v
        first, last = (f.load(starts + self.unit_group * 8 + end) for end in (0, 8))
        offset, end = first * v.bytes, (last * v.lanes).at_most(size)
        return UnitRange(first, last, size, offset, end * v.item - offset)

    def units_of(self, stage: LoweredStage) -> UnitRange:
        """This thread's share of the units that a stage computes."""
        return self.out if stage.projects else self.hidden

    def units_of_state(self, name: str) -> UnitRange:
        """This thread's share of a state."""
        return self.out if name == self.cell.first_state else self.hidden

    def operand_size(self, stage: LoweredStage) -> Value:
        """Elements of a row of a stage's operand."""
        return self.c.hidden if stage.index else self.c.out

    @property
    def gemm_stages(self) -> list[LoweredStage]:
        """The stages that have a GEMM."""
        return [stage for stage in self.stages if stage.multiplies]

    @property
    def later_gemm_stages(self) -> list[LoweredStage]:
        """The stages with a GEMM whose operands the step computes."""
        return [stage for stage in self.gemm_stages if stage.operand_number]

    @property
    def multiplies_output(self) -> bool:
        """Whether a step begins with a GEMM of the output before it."""
        return self.gemm_stages != self.later_gemm_stages

    @property
    def maths_stages(self) -> list[LoweredStage]:
        """The stages; if a cell has none, the groups of gates of the input, which then have all of its maths."""
        return [*self.stages] or self.column_groups

    @property
    def input_groups(self) -> list[LoweredStage]:
        """The stages and groups of gates that have columns of the input weights, in the order of these columns."""
        return input_groups(self.column_groups)

    @property
    def column_groups(self) -> list[LoweredStage]:
        """The stages that have a GEMM or gradients, then the gates whose part from the input belongs to no stage."""
        return column_groups(self.stages, self.input_only_groups)

    def num_vectors(self, size: Value) -> Value:
        """Vectors that hold so many elements."""
        return (size + (self.v.lanes - 1)) // self.v.lanes

    def barrier(self) -> None:
        """Wait for the threads that share these rows."""
        f, c = self.f, self.c
        with f.if_(c.grid_units > 1):
            f.call(self._barrier, self.row_group_barrier, c.grid_units, c.spins)

    def _progress(self, layer: Value) -> Value:
        c = self.c
        return c.progress + (layer * c.grid_rows + self.row_group) * PROGRESS_BYTES

    def wait_for_layer(self, layer: Value, steps: Value) -> None:
        """If layers are pipelined: wait until that layer, if it exists, has done so many steps of these rows."""
        f, c = self.f, self.c
        with f.if_(is_pipelined(c) & (layer >= 0) & (layer < c.layers)):
            f.call(self._wait_for_progress, self._progress(layer), steps, c.spins)

    def publish_layer(self, steps: Value) -> None:
        """If layers are pipelined: tell other layers that this one has done so many steps of these rows."""
        with self.f.if_(is_pipelined(self.c) & self.unit_group.is_zero):
            publish_progress(self.f, self._progress(self.layer), steps)

    def blocking(self, stage: LoweredStage) -> Blocking:
        """How a stage's columns fill panels."""
        return Blocking(stage.num_gates, self.panel_vectors)

    @contextmanager
    def panels(
        self, first: Value, last: Value, reverse: Value | None = None, num_rows: Operand = 0
    ) -> Iterator[ColVecs]:
        """Loop over the vectors of columns from ``first`` to before ``last``; yields those of one panel at a time.

        If ``num_rows`` is 1, it yields those of as many panels as a GEMM of one row multiplies at once, where the range
        holds all of them.
        """
        f, width, size = self.f, self.panel_vectors, self.one_row_vectors
        lowest, past = first // width, (last + (width - 1)) // width
        first_group, past_group = (first + (size - 1)) // size, last // size
        has_groups = f.as_value(num_rows).equals(1) & (past_group > first_group)
        num_groups = has_groups.select(past_group - first_group, 0)
        more_panels, before = size // width - 1, first_group * (size // width) - lowest
        count = past - lowest - num_groups * more_panels
        with f.loop(0, count) as index:
            part = index if reverse is None else reverse.select(count - 1 - index, index)
            groups_before = (part - before).at_most(num_groups)
            groups_before = (groups_before > 0).select(groups_before, 0)
            begin = (lowest + part + groups_before * more_panels) * width
            is_group = (part >= before) & (part < before + num_groups)
            end = (begin + is_group.select(f.constant(size), width)).at_most(last)
            begin = (begin < first).select(first, begin)
            yield ColVecs(begin, end - begin)

    @contextmanager
    def blocks(
        self, stage: LoweredStage, units: tuple[Value, Value], reverse: Value | None = None, num_rows: Operand = 0
    ) -> Iterator[tuple[Value, Value]]:
        """Loop over the blocks of unit vectors of a range; yields the first unit vector and the one past the last.

        If ``num_rows`` is 1, blocks hold all panels that a GEMM of one row multiplies at once.
        """
        f, (first, last) = self.f, units
        of_one_row = f.constant(Blocking(stage.num_gates, self.one_row_vectors).block_unit_vecs)
        size = f.as_value(num_rows).equals(1).select(of_one_row, self.blocking(stage).block_unit_vecs)
        with self.parts_of_range(first, last, size, reverse) as (_, begin, end):
            yield begin, end

    @contextmanager
    def parts_of_range(
        self, first: Value, last: Value, size: Value, reverse: Value | None = None
    ) -> Iterator[tuple[Value, Value, Value]]:
        """Loop over a range cut at multiples of ``size``; yields a part's number, its first item and the one past it.

        The first part and the last may be smaller. In reverse, the loop begins with the last part.
        """
        lowest, past = first // size, (last + (size - 1)) // size
        with self.f.loop(lowest, past) as index:
            number = index if reverse is None else reverse.select(lowest + past - 1 - index, index)
            begin, end = number * size, number * size + size
            yield number, (begin < first).select(first, begin), end.at_most(last)

    def serpentine_reversed(self, step: Value) -> Value:
        """Whether a step goes through the weights in reverse: it begins with what the step before left in cache."""
        return (step & 1).is_set
