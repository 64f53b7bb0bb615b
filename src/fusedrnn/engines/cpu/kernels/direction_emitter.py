"""The scaffolding of the forward and the backward time loop: rows, steps, states, gates and weights.

Rows are sorted by falling length, so that those still active at a step are the first ones, in either direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fusedrnn.cell.expr import Leaf
from fusedrnn.cell.leaves import (
    KeptProduct,
    Mask,
    Parameter,
    ParamScalar,
    ParamVector,
    PreH,
    PreSum,
    PreX,
    Projected,
    RawInput,
    RowMean,
    RowVariance,
)
from fusedrnn.engines.cpu.kernels.heads import Head, HeadShare
from fusedrnn.engines.cpu.kernels.layer_rows import LayerRows
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage
from fusedrnn.engines.cpu.kernels.operand_rows import CONVERT_ROW
from fusedrnn.engines.cpu.kernels.panel_matrix import ColVecs, LeftOperand, Matrix, PanelMatrix, Rows
from fusedrnn.engines.cpu.kernels.row_values import RowValues
from fusedrnn.engines.cpu.kernels.workspace import OPERAND_ROW_OFFSET
from fusedrnn.jit.builder import I8, I64, Declared, Function, Value

COMMON_FIELDS = (
    "steps", "batch", "layers", "directions", "hidden", "out", "heads", "head_size",
    "grid_layer_dirs", "grid_rows", "grid_units", "row_starts", "unit_starts", "out_starts", "chunk",
    "row_to_sequence", "active_rows", "lengths",
    "layer_dirs", "spins",
    "saved_state_step", "saved_state_row", "saved_state_size", "saved_values_step", "saved_values_row",
    "seed", "resets",
)  # fmt: skip
"""The fields with which the structs of both calls begin.

``hidden`` is H; ``out`` is S, the size of h, which a projection makes smaller; ``head_size`` is that of each of
``heads`` blocks of recurrent weights. ``grid_layer_dirs`` groups of threads run layer-directions at the same time: the
directions of a layer or, in a network of one direction, pipelined layers; ``progress`` holds the steps that each layer
has done, by row group. ``row_to_sequence``, ``active_rows`` and ``lengths`` are tables, 0 if every sequence has all
steps. ``row_to_sequence`` has the sequence of each row, ``active_rows`` for each row group the number of rows that are
active at each time, ``lengths`` the length of each row. ``saved`` strides are those of the reserve: of states, and of
the other values saved for backward. ``seed`` is that of all random masks. ``resets``, if not 0, is a table of bytes
(T, N): 1 where a sequence begins anew.
"""

UNPACKED_PARAMS = "unpacked_x_weights", "unpacked_h_weights", "unpacked_x_bias", "unpacked_h_bias"
"""The parameters of a layer-direction as the caller stores them; used in calls whose ``x_weights`` is 0."""


def table_entry(f: Function, table: Value, index: Value, default: Value) -> Value:
    """An entry of a table of integers, or the default if there is no table."""
    entry = f.var(default)
    with f.if_(table.is_set):
        entry.set(f.load(table + index * 8))
    return entry.get()


def rows_of_time(
    f: Function, base: Value, step_stride: Value, row_stride: Value, row_offsets: Value, time: Value
) -> Value:
    """Where the rows of a time begin: a stride per step, or, in a packed sequence, as the table of row offsets says."""
    offset = f.var(time * step_stride)
    with f.if_(row_offsets.is_set):
        offset.set(f.load(row_offsets + time * 8) * row_stride)
    return base + offset.get()


class CellPosition(NamedTuple):
    """A stage's maths on one vector of units of one row."""

    stage: LoweredStage
    row: Value
    unit_vec: Value
    gate_row: Value  # the row's pre-activations, of this thread's units
    recurrent: Value  # the vector's pre-activations from the recurrent GEMM


class DirectionEmitter(HeadShare, RowValues, LayerRows):
    """A function of a thread's share of one layer-direction, under construction."""

    scratch: Value  # this thread's

    def sequence(self, row: Value) -> Value:
        """The sequence in the batch of this thread's row."""
        index = self.first_row + row
        return table_entry(self.f, self.c.row_to_sequence, index, index)

    def time(self, step: Value) -> Value:
        """The time of a step of the forward loop in this direction."""
        return self.p.reverse.is_set.select(self.c.steps - 1 - step, step)

    def previous_time(self, time: Value) -> Value:
        """The time of the step before, in this direction."""
        return time - self._time_step()

    def next_time(self, time: Value) -> Value:
        """The time of the step after, in this direction."""
        return time + self._time_step()

    def _time_step(self) -> Value:
        """From the time of a step to that of the next: 1, or -1 in the reverse direction."""
        return self.p.reverse.is_set.select(self.f.constant(-1), 1)

    def prefetch_next(self, address: Value, stride: Value) -> None:
        """Prefetch into L2 what the next step of the forward loop has at this place, ``stride`` bytes a time.

        The GEMM between the two steps hides the time that this takes, so cells without such a GEMM do not prefetch.
        """
        if self.stages:
            self.f.prefetch(address + self._time_step() * stride, cache=2)

    def prefetch_previous(self, address: Value, stride: Value) -> None:
        """The same for the step before, which is the next one of the backward loop."""
        if self.stages:
            self.f.prefetch(address - self._time_step() * stride, cache=2)

    def is_reset(self, time: Value, sequence: Value) -> Value:
        """Whether the states of a sequence are replaced before the step at that time, 0 or 1, in a call with resets.

        The reverse direction runs over the same pieces from their ends.
        """
        f, c = self.f, self.c
        first_of_piece = time + self.p.reverse
        mark = f.var(0)
        with f.if_(first_of_piece < c.steps):
            mark.set(f.load(c.resets + first_of_piece * c.batch + sequence, I8, 1).zext(I64))
        return mark.get()

    def time_before(self, time: Value, sequence: Value) -> Value:
        """The time at which the reserve holds the states that a step started from: T + 1 for those of a reset."""
        f, c = self.f, self.c
        before = f.var(self.previous_time(time))
        with f.if_(c.resets.is_set):
            before.set(self.is_reset(time, sequence).is_set.select(c.steps + 1, before.get()))
        return before.get()

    def active_rows(self, time: Value) -> Value:
        """The number of this thread's rows that have that time."""
        return table_entry(self.f, self.c.active_rows, self.row_group * self.c.steps + time, self.rows)

    def length(self, row: Value) -> Value:
        """The steps of this thread's row."""
        return table_entry(self.f, self.c.lengths, self.first_row + row, self.c.steps)

    def state_row(self, name: str, base: Value, sequence: Value) -> Value:
        """This thread's part of a sequence's row in an array (N, size) of a state."""
        units = self.units_of_state(name)
        return base + sequence * units.size * self.v.item + units.offset

    def load_state(self, name: str, base: Value, sequence: Value, into: Value) -> None:
        """Copy this thread's part of a sequence's row of a state (N, size); zeros if the array is absent."""
        f, size = self.f, self.units_of_state(name).num_bytes
        with f.if_else(base.is_zero) as (absent, present):
            with absent:
                f.fill_zero(into, size)
            with present:
                f.copy(into, self.state_row(name, base, sequence), size)

    def saved_state(self, base: Value, time: Value, sequence: Value) -> Value:
        """A row of a state in the reserve."""
        return base + time * self.c.saved_state_step + sequence * self.c.saved_state_row

    def saved_array(self, number: int) -> Value:
        """An array of the reserve at step 0: first those of the states, then those of the operands of later stages.

        These arrays follow one another.
        """
        p, num_states = self.p, len(self.cell.states)
        if number < num_states:
            base, later = (p.saved_c, number - 1) if number else (p.saved_h, 0)
        else:
            base, later = p.saved_operand, number - num_states
        return base + self.c.saved_state_size * later if later else base

    def saved_operand(self, stage: LoweredStage) -> Value:
        """The array of the reserve that holds the operand of a later stage."""
        return self.saved_array(len(self.cell.states) + stage.operand_number - 1)

    def gates_offset(self, stage: LoweredStage) -> Value:
        """Where a stage's gates begin in a row of this thread's gates."""
        return (self.hidden.last - self.hidden.first) * (stage.first_x_gate * self.v.bytes)

    def load_leaf(self, leaf: Leaf, position: CellPosition) -> Value:
        """Load a leaf of the cell's expressions that is no state."""
        v = self.v
        match leaf:
            case ParamVector() | ParamScalar():
                return self.parameter(leaf, position.unit_vec)
            case Projected():
                return v.load(position.recurrent)
            case RawInput():
                return v.load(self.raw_input(position.gate_row, position.unit_vec))
            case Mask():
                return self.mask(leaf, position.gate_row, position.unit_vec)
            case RowMean() | RowVariance():
                return v.load(self.moment(leaf, position.gate_row))
            case PreH(gate) if gate not in position.stage.gate_names:
                return v.load(self.kept_product(KeptProduct(gate), position.gate_row, position.unit_vec))
            case PreH(gate):
                return v.load(position.recurrent + position.stage.gate_names.index(gate) * v.bytes)
            case PreX(gate) | PreSum(gate):
                stage = next(stage for stage in self.input_groups if gate in stage.gate_names)
                index = (position.unit_vec - self.hidden.first) * stage.num_gates + stage.gate_names.index(gate)
                return v.load(position.gate_row + self.gates_offset(stage) + index * v.bytes)
        raise AssertionError(leaf)

    def parameter(self, leaf: Parameter, unit_vec: Value) -> Value:
        """A parameter of the cell for a vector of units; scalars are packed before the vectors."""
        v, cell, base = self.v, self.cell, self.p.parameters
        if isinstance(leaf, ParamScalar):
            return v.broadcast(base + cell.param_scalars.index(leaf.name) * v.bytes)
        if cell.param_scalars:
            base = base + -(-len(cell.param_scalars) // self.panel_vectors) * self.panel_bytes
        count, index = len(cell.param_vectors), cell.param_vectors.index(leaf.name)
        return v.load(base + (unit_vec * count + index) * v.bytes)

    def input_gemm(self, a: LeftOperand, weights: Callable[[LoweredStage], Matrix], gates: Rows) -> None:
        """The input GEMM of all stages: rows of the layer's input by the columns of this thread's units."""
        for stage in self.input_groups:
            begin, end = self.hidden.first * stage.num_gates, self.hidden.last * stage.num_gates
            with self.panels(begin, end, num_rows=a.num_rows) as cols:
                into = gates.address + self.gates_offset(stage) + (cols.first - begin) * self.v.bytes
                weights(stage).gemm(a, cols, Rows(into, gates.stride))

    def block_output(
        self, stage: LoweredStage, cols: ColVecs, first: Value, gates: Rows, recurrent: Value
    ) -> tuple[Rows, Rows | None]:
        """C and C_in of the recurrent GEMM of a block.

        Either both are the block's gates; or C is rows of its own, which begin with column ``first``, and C_in is None
        for the bias.
        """
        if stage.accumulates_in_place:
            col_vec = cols.first - self.hidden.first * stage.num_gates
            c = Rows(gates.address + self.gates_offset(stage) + col_vec * self.v.bytes, gates.stride)
            return c, c
        row_bytes = self.blocking(stage).block_col_vecs * self.v.bytes
        return Rows(recurrent + (cols.first - first) * self.v.bytes, row_bytes), None

    def left_operand(
        self, table: Value, num_rows: Value, size: Value, range_address: Value | None = None
    ) -> LeftOperand:
        """The rows of a table of addresses as a GEMM reads them, converted if operands have a format of their own."""
        f, c = self.f, self.c
        if not self.products.converts_rows:
            return LeftOperand(table, num_rows)
        convert_row = Declared(f.module, CONVERT_ROW)
        rows, converted_table = self.scratch + c.operand_rows_offset, self.scratch + c.operand_table_offset
        with f.loop(0, num_rows) as row:
            into = rows + row * c.operand_row + OPERAND_ROW_OFFSET
            f.call(convert_row, f.load(table + row * 8), into, size, range_address or f.constant(0))
            f.store(into, converted_table + row * 8)
        return LeftOperand(converted_table, num_rows)

    def packed(
        self, function: Declared, base: Value, k: Value, bias: Value | None = None, stage: LoweredStage | None = None,
        head: Head | None = None,
    ) -> PanelMatrix:  # fmt: skip
        """Packed weights: the columns of one stage among those of all gates; without a stage, a matrix as a whole.

        With a head they are recurrent weights of this head, else input weights. Quantized weights follow the scales of
        all columns.
        """
        v, group, slot_bytes = self.v, self.products.group, self.products.b_bytes
        groups = k if group == 1 else (k + (group - 1)) // group + self.products.head
        scales, first, of_input = None, None, head is None
        if stage is not None:
            before = self.input_groups if of_input else self.stages
            first = self.col_vecs(before[: before.index(stage)], not of_input)
            if self.cell.is_block_diagonal and head is not None:
                first = first + head.number * self.col_vecs_of_head(stage)
        if self.products.has_scales:
            scaled_stages = self.stages[-1:] if stage is None else self.input_groups if of_input else self.stages
            scaled_stages = [other for other in scaled_stages if stage is None or not other.projects]
            scales = base - self.col_vecs(scaled_stages) * v.bytes
        return PanelMatrix(v, self.panel_vectors, slot_bytes, function, base, groups, bias, first, scales)

    def packed_bytes(self, k: Value) -> Value:
        """Bytes of a panel of packed weights with so many rows, a multiple of the rows of a group."""
        return k * (self.panel_vectors * self.products.b_bytes // self.products.group)
