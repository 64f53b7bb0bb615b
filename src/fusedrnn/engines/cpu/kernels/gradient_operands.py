"""The operands of the GEMMs of the weights' gradients, which sum over the rows of a block of steps.

A is the gate gradients, transposed as backward stored them. B is the layer's input or its previous h, packed by panels.
A group of k is one row or a pair of rows, see :mod:`fusedrnn.engines.cpu.kernels.row_groups`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fusedrnn.engines.cpu.kernels.bfloat16_products import rounded_to_bfloat16
from fusedrnn.engines.cpu.kernels.direction_emitter import table_entry
from fusedrnn.engines.cpu.kernels.dropout import DROP_PANEL
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage
from fusedrnn.engines.cpu.kernels.parameter_sums import ParameterSums, Share
from fusedrnn.engines.cpu.kernels.products import gradient_format, products_of
from fusedrnn.engines.cpu.kernels.row_groups import RowGroups, StepPairs, TilePairs, first_row_number
from fusedrnn.engines.cpu.kernels.thread_share import Program
from fusedrnn.engines.cpu.kernels.workspace import ROW_POSITION
from fusedrnn.jit.builder import Declared, Function, Value


class Weights(NamedTuple):
    """A stage's input weights; with ``of_state`` its recurrent weights, or its projection."""

    stage: LoweredStage
    of_state: bool

    @property
    def grads(self) -> tuple[int, ...]:
        """For each gate the number of the distinct gradient that its rows are multiplied with."""
        derivative = self.stage.derivative
        return derivative.h_grads if self.of_state else derivative.x_grads

    @property
    def first_gate(self) -> int:
        """The number of its first gate in these weights; the projection follows the recurrent weights."""
        return self.stage.first_h_gate if self.of_state else self.stage.first_x_gate


class GroupRange(NamedTuple):
    """Groups of the block of steps that one GEMM sums over."""

    begin: Value
    end: Value
    accumulate: Value  # whether to add to the sums so far; else they start from zero


class GradientOperands(ParameterSums):
    """A function of backward that multiplies gate gradients by inputs and states."""

    def __init__(self, program: Program, store_or_add: Function) -> None:
        super().__init__(program, store_or_add)
        c = self.c
        self._drop_panel = Declared(program.module, DROP_PANEL)
        self._products = products_of(gradient_format(program.compute, program.target), self.v)
        self.joins_rows = self._products.group > 1
        self.first_row_number = first_row_number(program.compute, program.target)
        self.row_positions = self.scratch + c.row_positions_offset
        self.panel_features = self.panel_bytes // self.v.item
        self.row_groups = self._row_groups()

    def _row_groups(self) -> RowGroups:
        """How the rows of the block are grouped."""
        if not self.joins_rows:
            return RowGroups(self.num_rows)
        operands = self.num_rows, self.v, self._products, self.zeros
        if self._products.tile_instruction:
            return TilePairs(*operands, self.rows_before, self.is_last_block)
        return StepPairs(*operands, self.scratch + self.c.row_pairs_offset)

    def share_of(self, stage: LoweredStage) -> Share:
        """This thread's share of a stage's units."""
        return self.out_share if stage.projects else self.hidden_share

    def weights_of(self, stage: LoweredStage) -> list[Weights]:
        """The weights of a stage: input weights if it has any, then recurrent ones or the projection."""
        return [weights for weights in (Weights(stage, False), Weights(stage, True)) if weights.grads]

    def gradients(self, stage: LoweredStage, unit_vec: Value, grad: int) -> Value:
        """A stage's distinct gradient of a vector of units: a vector for each row of the block."""
        return self.transposed + self.grad_index(stage, unit_vec, grad) * self.c.transposed_stride

    def groups(self, stage: LoweredStage, unit_vec: Value, grad: int) -> Value:
        """The same by groups of rows, after they are joined."""
        return self.gradients(stage, unit_vec, grad) - self.first_row_number * self.v.bytes

    def store_row_positions(self) -> None:
        """Store for each row of the block its time, its sequence and the time before; group the rows.

        The order is that of the transposed gradients.
        """
        f, c = self.f, self.c
        address = f.var(self.row_positions + self.first_row_number * ROW_POSITION.size)
        with f.loop(self.first, self.last) as step:
            time = self.backward_time(step)
            active = self.active_in_batch(time)
            with f.loop(0, active) as sorted_row:
                sequence = table_entry(f, c.sorted_indices, sorted_row, sorted_row)
                position = zip(ROW_POSITION.names, (time, sequence, self.time_before(time, sequence)), strict=True)
                for name, value in position:
                    f.store(value, address.get() + ROW_POSITION.offset(name))
                address.set(address.get() + ROW_POSITION.size)
            self.row_groups.add_step(active)

    def join_gradients(self, stage: LoweredStage) -> None:
        """Replace this thread's transposed gradients of a stage by groups of rows, in place."""
        for vectors in self._gradients_of_share(stage):
            self.row_groups.join(vectors)

    def keep_rest(self) -> None:
        """Keep what belongs to the rows that the GEMMs of this block have left."""
        for stage in self.column_groups:
            for vectors in self._gradients_of_share(stage):
                self.row_groups.keep_rest(vectors, self.v.bytes)
        self.row_groups.keep_rest(self.row_positions, ROW_POSITION.size)

    def _gradients_of_share(self, stage: LoweredStage) -> Iterator[Value]:
        """The gradients of this thread's units that weights are multiplied with, by groups; emitted in a loop."""
        with self.f.loop(*self.share_of(stage)[:2]) as unit_vec:
            for grad in sorted({grad for weights in self.weights_of(stage) for grad in weights.grads}):
                yield self.groups(stage, unit_vec, grad)

    def pack(self, weights: Weights, groups: GroupRange, feature: Value, into: Value) -> None:
        """Pack a panel of B: the features from ``feature`` on, of each row of the layer's input or stage's operand."""
        with self.f.loop(groups.begin, groups.end) as group:
            packed_group = into + (group - groups.begin) * self.panel_bytes
            if self.joins_rows:
                self._pack_pair(weights, feature, group, packed_group)
            else:
                self._pack_row(weights, feature, group, packed_group)

    def _pack_pair(self, weights: Weights, feature: Value, pair: Value, into: Value) -> None:
        """Pack a panel's features of a pair of rows; the panel of dx holds the second row meanwhile."""
        f, v = self.f, self.v
        row, num_rows = self.row_groups.rows_of(pair)
        with f.loop(0, num_rows) as number:
            self._pack_row(weights, feature, row + number, number.is_zero.select(into, self.panel))
        rows = [
            (num_rows > number).select(packed_row, self.zeros) for number, packed_row in enumerate((into, self.panel))
        ]
        for offset in range(0, self.panel_bytes, v.bytes):
            slot = self._products.slot([v.load(packed_row + offset) for packed_row in rows])
            f.store(slot, into + offset, v.bytes)

    def _pack_row(self, weights: Weights, feature: Value, row: Value, into: Value) -> None:
        """Pack a panel's features of a row as floats; rounded if the GEMM multiplies rounded floats."""
        f, p, v, (stage, of_state) = self.f, self.p, self.v, weights
        position = ROW_POSITION.read(f, self.row_positions + row * ROW_POSITION.size)
        time, sequence, time_before = position.time, position.sequence, position.time_before
        if of_state and stage.index:
            source = self.saved_state(self.saved_operand(stage), time, sequence)
        elif of_state:
            source = self.saved_state(p.saved_h, time_before, sequence)
        else:
            source = p.x + time * p.x_step + sequence * p.x_row
        for number in range(self.panel_vectors):
            vector = v.load(source + feature * v.item + number * v.bytes, v.item)
            v.store(vector, into + number * v.bytes)
        if not of_state:
            with f.if_(p.threshold > 0):
                f.call(self._drop_panel, into, feature, *self.dropout_counter(sequence, time))
        if self.products.converts_rows and not self.joins_rows:
            for address in (into + number * v.bytes for number in range(self.panel_vectors)):
                v.store(rounded_to_bfloat16(v, v.load(address)), address)
