"""A thread's state buffers in forward: initial states are copied into them, and final states out of them."""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.bfloat16_products import rounded_to_bfloat16
from fusedrnn.engines.cpu.kernels.direction_emitter import DirectionEmitter
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage
from fusedrnn.engines.cpu.kernels.operand_rows import CONVERT_ROW
from fusedrnn.engines.cpu.kernels.thread_share import Program
from fusedrnn.jit.builder import Declared, Value
from fusedrnn.jit.struct import Struct


class StateEmitter(DirectionEmitter):
    """A function of a thread's share of one layer-direction, with the state buffers of its rows."""

    def __init__(self, program: Program, name: str, structs: tuple[Struct, Struct]) -> None:
        super().__init__(program, name, structs)
        c = self.c
        self.scratch = scratch = c.scratch + self.thread * c.scratch_stride
        self.h_rows = scratch + c.h_rows_offset
        self.states = c.states + self.concurrent * c.states_stride + self.first_row * c.state_stride
        if self.stores_operands:
            self._convert_row = Declared(program.module, CONVERT_ROW)
        # h has two buffers, for even and odd steps, if other threads may still read what a step would overwrite.
        self.h_size = c.c_offset / 2 if self.stages else self.f.constant(0)

    def operand_row(self, stage: LoweredStage, row: Value) -> Value:
        """This thread's row of the operand of a later stage."""
        c = self.c
        index = (stage.operand_number - 1) * c.batch + row
        return self.states + c.operands_offset + index * c.state_stride

    def operand_table(self, stage: LoweredStage, parity: Value) -> Value:
        """The table of addresses of a stage's operand rows; h has two, for even and odd steps, a later operand one."""
        index = stage.operand_number + 1 if stage.operand_number else parity
        return self.h_rows + index * self.rows * 8

    def h_operand(self, row: Value) -> Value:
        """This thread's row of h of even steps as GEMMs read it."""
        if not self.stores_operands:
            return self.state_buffer(self.cell.first_state, row)
        return self.states + self.c.h_operands_offset + row * self.c.state_stride

    def store_operand(self, value: Value, unit_vec: Value, row: Value, size: Value) -> None:
        """Store a vector of units in a row of operands; if groups have several elements, with zeros at the end."""
        f, v = self.f, self.v
        if not self.stores_operands:
            v.store(value, row + unit_vec * v.bytes)
            return
        existing = f.var(value)
        if self.products.group > 1:
            left = size - unit_vec * v.lanes
            with f.if_(left < v.lanes):
                existing.set(v.zero_tail(value, left))
        operand = self.products.a_elements(rounded_to_bfloat16(v, existing.get()))
        f.store(operand, row + unit_vec * self.operand_vector_bytes, self.operand_vector_bytes)

    def state_buffer(self, name: str, row: Value) -> Value:
        """This thread's row of a state buffer; for the output, of the buffer of even steps."""
        c, number = self.c, self.cell.states.index(name)
        address = self.states + row * c.state_stride
        if not number:
            return address
        address = address + c.c_offset
        return address + c.batch * c.state_stride * (number - 1) if number > 1 else address

    def enter(self) -> None:
        """Copy the initial states into the buffers, and fill the tables of operand rows."""
        f = self.f
        with f.loop(0, self.rows) as row:
            sequence = self.sequence(row)
            if self.multiplies_output:
                f.store(self.h_operand(row), self.h_rows + row * 8)
                f.store(self.h_operand(row) + self.h_size, self.h_rows + (self.rows + row) * 8)
            for stage in self.later_gemm_stages:
                f.store(self.operand_row(stage, row), self.operand_table(stage, f.constant(0)) + row * 8)
            for name, initial in self.state_fields("{}0"):
                units = self.units_of_state(name)
                into = self.state_buffer(name, row) + units.offset
                self.load_state(name, initial, sequence, into)
                if name == self.cell.first_state:
                    f.copy(into + self.h_size, into, units.num_bytes)
                    for parity in (f.constant(0), f.constant(1)):
                        self._convert_h(row, into, parity)
                self.save_initial(name, row, sequence, into)
            self.save_resets(sequence)
            is_possible = self.p.reverse.is_zero & self.c.resets.is_set
            with f.if_(is_possible), f.if_(self.is_reset(f.constant(0), sequence).is_set):
                self.replace_states(row, sequence, f.constant(0))

    def replace_states(self, row: Value, sequence: Value, parity: Value) -> None:
        """Replace this thread's part of a row's states by the states of a reset; h in the buffer of that parity."""
        for name, reset_state in self.state_fields("{}_reset"):
            into = self.state_buffer(name, row) + self.units_of_state(name).offset
            if name == self.cell.first_state:
                into = into + parity * self.h_size
            self.load_state(name, reset_state, sequence, into)
            if name == self.cell.first_state:
                self._convert_h(row, into, parity)

    def _convert_h(self, row: Value, source: Value, parity: Value) -> None:
        """Convert this thread's part of a row of h, if GEMMs read another format."""
        if self.stores_operands and self.multiplies_output:
            units = self.out
            into = self.h_operand(row) + parity * self.h_size + units.first * self.operand_vector_bytes
            self.f.call(self._convert_row, source, into, units.num_bytes // self.v.item, 0)

    def save_initial(self, name: str, row: Value, sequence: Value, source: Value) -> None:
        """Save an initial state for backward; inference saves none."""

    def save_resets(self, sequence: Value) -> None:
        """Save what replaces the states of a sequence for backward; inference saves nothing."""

    def exit(self) -> None:
        """Copy the final states to the caller; h from the buffer that each row's last step wrote."""
        f, c, p = self.f, self.c, self.p
        with f.loop(0, self.rows) as row:
            sequence = self.sequence(row)
            steps = p.reverse.is_zero.select(self.length(row), c.steps)
            for name, final in self.state_fields("{}_n"):
                units = self.units_of_state(name)
                source = self.state_buffer(name, row) + units.offset
                if name == self.cell.first_state:
                    source = source + (steps & 1) * self.h_size
                f.copy(self.state_row(name, final, sequence), source, units.num_bytes)
