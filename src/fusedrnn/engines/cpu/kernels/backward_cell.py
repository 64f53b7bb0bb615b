"""The derivative of a cell's stage for one vector of units of one row: gate gradients, and gradients of states.

A load from memory that forward or the caller has filled prefetches what the next step of the loop loads at this place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from fusedrnn.cell.expr import Leaf
from fusedrnn.cell.leaves import (
    MeanCotangent,
    NewState,
    OperandCotangent,
    OutputCotangent,
    ParamScalar,
    ParamVector,
    RowMean,
    RowVariance,
    Saved,
    State,
    StateCotangent,
    VarianceCotangent,
)
from fusedrnn.cell.traversal import evaluate
from fusedrnn.engines.cpu.kernels.bfloat16_products import rounded_to_bfloat16
from fusedrnn.engines.cpu.kernels.direction_emitter import table_entry
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage
from fusedrnn.engines.cpu.kernels.moment_gradients import MomentGradients
from fusedrnn.jit.builder import Value


class BackwardStep(NamedTuple):
    """A step of the time loop: what its rows have in common."""

    step: Value
    time: Value
    active_rows: Value
    dy: Value  # the first row of the time's output gradients
    chunk_parity: Value  # 0 in even chunks, 1 in odd ones
    chunk_row: Value  # the step's first row in the chunk
    block_row: Value  # the step's first row in the block, of the whole batch


@dataclass(frozen=True)
class GradRows:
    """The addresses of one row's values and gradients."""

    row: Value  # its number among this thread's
    moments: Value  # means and variances
    dy: Value
    dy_second: Value  # from the second direction of the layer above
    saved: Value  # what forward has saved, or what was recomputed
    h_gates: Value  # gate gradients for the recurrent GEMM
    x_gates: dict[int, Value]  # gate gradients for the input GEMM, by the number of their first gate
    raw: Value  # the gradients of the raw input
    transposed: Value  # gate gradients for the weights' GEMMs
    carried: dict[str, Value]  # the gradients of the states
    states: dict[Leaf, Value]  # before and after the step
    operands: dict[int, Value]  # the gradients of later stages' operands


class _Leaves:
    """Loads the leaves of a stage's derivative, for one vector of units of one row.

    With ``adds_dy`` the cotangent of the output includes the gradient that the caller gives.
    """

    def __init__(
        self, emitter: CellGradient, rows: GradRows, unit_vec: Value, units_left: Value, adds_dy: bool
    ) -> None:
        self._emitter, self._rows, self._unit_vec, self._units_left = emitter, rows, unit_vec, units_left
        self._offset = unit_vec * emitter.v.bytes
        self._cotangents: dict[str, Value] = {}
        self._dy_state = emitter.cell.first_state if adds_dy else None
        if adds_dy:
            self.cotangent(emitter.cell.first_state)

    def cotangent(self, name: str) -> Value:
        """The gradient of a state after the step."""
        if name not in self._cotangents:
            value = self._emitter.v.load(self._rows.carried[name] + self._offset)
            self._cotangents[name] = value + self._output_grad() if name == self._dy_state else value
        return self._cotangents[name]

    def _output_grad(self) -> Value:
        rows = self._rows
        return self._emitter.output_grad(rows.dy + self._offset, rows.dy_second + self._offset, self._units_left)

    def load(self, leaf: Leaf) -> Value:
        """The value of a leaf."""
        emitter, rows, unit_vec, offset = self._emitter, self._rows, self._unit_vec, self._offset
        v = emitter.v
        match leaf:
            case StateCotangent(name):
                return self.cotangent(name)
            case OutputCotangent():
                return self._output_grad()
            case OperandCotangent(index):
                return v.load(rows.operands[index] + offset)
            case Saved(index):
                saved = rows.saved + (unit_vec * emitter.num_saved + index) * v.bytes
                emitter.prefetch_previous(saved, emitter.c.saved_values_step)
                return v.load(saved)
            case ParamVector() | ParamScalar():
                return emitter.parameter(leaf, unit_vec)
            case RowMean() | RowVariance():
                return emitter.load_moment(leaf, rows.moments)
            case MeanCotangent() | VarianceCotangent():
                return emitter.load_moment_grad(leaf, rows.row)
        state = rows.states[leaf] + offset
        emitter.prefetch_previous(state, emitter.c.saved_state_step)
        return v.load(state, v.item)


class CellGradient(MomentGradients):
    """A function of backward that runs the derivative of the cell."""

    params_requested: Value  # whether the caller asks for gradients of parameters

    def grad_rows(self, stage: LoweredStage, row: Value, position: BackwardStep) -> GradRows:
        """The addresses of this thread's row in a step."""
        f, c, p, v, time = self.f, self.c, self.p, self.v, position.time
        sequence = self.sequence(row)
        sorted_row = self.first_row + row
        block_row = position.block_row + table_entry(f, c.unsorted_indices, sorted_row, sorted_row)
        chunk_row = position.chunk_row + row
        saved = f.var(p.saved_values + time * c.saved_values_step + sequence * c.saved_values_row)
        with f.if_(c.recompute.is_set):
            saved.set(self.recomputed(chunk_row))
        states: dict[Leaf, Value] = {}
        before = self.time_before(time, sequence)
        for name, base in ((name, self.saved_array(number)) for number, name in enumerate(self.cell.states)):
            states[State(name)] = self.saved_state(base, before, sequence)
            states[NewState(name)] = self.saved_state(base, time, sequence)
        return GradRows(
            row=row,
            moments=self.saved_moments(time, sequence) if self.cell.reduces else f.constant(0),
            dy=position.dy + sequence * p.dy_row,
            dy_second=p.dy_second + time * p.dy_step + sequence * p.dy_row,
            saved=saved.get(),
            h_gates=self.h_gate_grads(row, position.step & 1) + self.grads_offset(stage.first_h_gate),
            x_gates={
                first: self.x_gate_grads(chunk_row, position.chunk_parity) + self.grads_offset(first)
                for first in (group.first_x_gate for group in (stage, *self.input_only_groups))
            },
            raw=self._raw_grads(chunk_row, position.chunk_parity),
            transposed=self.transposed + block_row * v.bytes,
            carried={name: self.carried(name, row) for name in self.cell.states},
            states=states,
            operands={other.index: self.operand_grad(other, row) for other in self.later_gemm_stages},
        )

    def _raw_grads(self, chunk_row: Value, chunk_parity: Value) -> Value:
        """Where the gradients of the raw input are in a row of a chunk; 0 if the cell does not read it."""
        if not self.cell.reads_raw_input:
            return self.f.constant(0)
        return self.x_gate_grads(chunk_row, chunk_parity) + self.raw_grads_offset

    def cell_gradient(self, stage: LoweredStage, rows: GradRows, unit_vec: Value) -> None:
        """The gradients of one stage, for one vector of units of one row."""
        v, derivative = self.v, self.derivative
        units_left = self.units_of(stage).size - unit_vec * v.lanes
        adds_dy = stage is self.maths_stages[-1] and self.cell.output is None
        leaves = _Leaves(self, rows, unit_vec, units_left, adds_dy)
        names = [name for name in self.cell.states if derivative.final_stage(name) == stage.index]
        state_grads = {name: grad for name, grad in derivative.state_grads.items() if name in names}
        has_inputs = derivative.inputs_stage == stage.index
        groups = [stage, *(group for group in self.input_only_groups if has_inputs and group is not stage)]
        raw = [derivative.raw_input] if has_inputs and derivative.raw_input is not None else []
        gate_grads = [grad for group in groups for grad in group.derivative.distinct_grads]
        kinds = gate_grads, stage.derivative.moment_grads, [*state_grads.values()], raw
        values = iter(evaluate([grad for kind in kinds for grad in kind], leaves.load, v))
        of_gates, of_moments, of_states, of_raw = [[*islice(values, len(kind))] for kind in kinds]
        self.store_moment_grads(stage, rows.row, unit_vec, of_moments)
        for value in of_raw:
            is_whole = units_left >= v.lanes
            v.store(is_whole.select(value, v.zero_tail(value, units_left)), rows.raw + unit_vec * v.bytes)
        if adds_dy and self.cell.first_state not in names:
            # Earlier stages need it with the gradient of the output included.
            output = self.cell.first_state
            v.store(leaves.cotangent(output), rows.carried[output] + unit_vec * v.bytes)
        new = dict(zip(state_grads, of_states, strict=True))
        for name in names:
            v.store(new.get(name, v.const(0.0)), rows.carried[name] + unit_vec * v.bytes)
        by_group = iter(of_gates)
        for group in groups:
            self._store_gate_grads(group, rows, unit_vec, units_left, [*islice(by_group, group.num_grads)])

    def _store_gate_grads(
        self, stage: LoweredStage, rows: GradRows, unit_vec: Value, units_left: Value, values: Sequence[Value]
    ) -> None:
        """Store a stage's gradients of a vector of units where the three GEMMs read them."""
        f, c, v, derivative = self.f, self.c, self.v, stage.derivative
        is_whole = units_left >= v.lanes
        # The GEMMs also read the lanes without a unit: they must be zero.
        grads = [is_whole.select(value, v.zero_tail(value, units_left)) for value in values]
        if self.products.converts_rows:
            operands = {*derivative.h_grads, *derivative.x_grads}
            grads = [rounded_to_bfloat16(v, grad) if index in operands else grad for index, grad in enumerate(grads)]
        x_gates = rows.x_gates[stage.first_x_gate]
        for into, indices in ((rows.h_gates, derivative.h_grads), (x_gates, derivative.x_grads)):
            for gate, index in enumerate(indices):
                address = into + (unit_vec * stage.num_gates + gate) * self.operand_vector_bytes
                f.store(self.products.a_elements(grads[index]), address, self.operand_vector_bytes)
        with f.if_(self.params_requested):
            for index, grad in enumerate(grads):
                v.store(grad, rows.transposed + self.grad_index(stage, unit_vec, index) * c.transposed_stride)

    def output_grad(self, dy: Value, dy_second: Value, units_left: Value) -> Value:
        """A vector of the gradient of the output; below the last layer, the sum from the directions above."""
        f, v = self.f, self.v
        total = f.var(v.const(0.0))
        with f.if_(self.p.dy.is_set):
            self.prefetch_previous(dy, self.p.dy_step)
            total.set(self.load_tail(dy, units_left))
            with f.if_(self.p.dy_second.is_set):
                total.set(total.get() + v.load(dy_second, v.item))
        return total.get()
