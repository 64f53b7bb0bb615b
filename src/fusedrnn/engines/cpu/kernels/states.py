"""Where a member's states lie in forward, and what comes in and goes out of them: initial states and final ones."""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.loop import Pass, Program
from fusedrnn.engines.cpu.kernels.stages import StageKernel
from fusedrnn.jit.builder import Value
from fusedrnn.jit.struct import Struct


class StateEmitter(Pass):
    """A member's part of one pass under construction, with the state buffers of its rows."""

    def __init__(self, program: Program, name: str, records: tuple[Struct, Struct]) -> None:
        super().__init__(program, name, records)
        c = self.c
        self.scratch = scratch = c.scratch + self.member * c.scratch_stride
        self.h_rows = scratch + c.h_rows_offset
        self.states = c.states + self.slot * c.states_stride + self.first_row * c.state_stride
        # h lies twice, for even and odd steps: a step reads one while it writes the other.
        self.h_size = c.c_offset / 2

    def operand_row(self, stage: StageKernel, row: Value) -> Value:
        """This member's row of what a stage behind the first multiplies."""
        c = self.c
        place = (stage.index - 1) * c.batch + row
        return self.states + c.operands_offset + place * c.state_stride

    def row_table(self, stage: StageKernel, parity: Value) -> Value:
        """The addresses of the rows that a stage multiplies: h's of even steps, of odd ones, then other stages'."""
        place = parity if not stage.index else stage.index + 1
        return self.h_rows + place * self.rows * 8

    def _state_fields(self) -> list[tuple[str, Value, Value]]:
        """For each state: its name, and where the caller's initial and final values go (0 for nowhere)."""
        p = self.p
        ends = {"h": (p.h0, p.h_n), "c": (p.c0, p.c_n)}
        return [(name, *ends[name]) for name in self.cell.states]

    def state_rows(self, name: str, row: Value) -> Value:
        """This member's row of a state buffer; the even one for h."""
        at = self.states + row * self.c.state_stride
        return at if name == "h" else at + self.c.c_offset

    def enter(self) -> None:
        """Initial states into the state buffers, and the addresses of the rows that stages multiply."""
        f = self.f
        with f.loop(0, self.rows) as row:
            index = self.index(row)
            f.store(self.state_rows("h", row), self.h_rows + row * 8)
            f.store(self.state_rows("h", row) + self.h_size, self.h_rows + (self.rows + row) * 8)
            for stage in self.stages[1:]:
                f.store(self.operand_row(stage, row), self.row_table(stage, f.constant(0)) + row * 8)
            for name, initial, _ in self._state_fields():
                units = self.units_of_state(name)
                into = self.state_rows(name, row) + units.own
                self.bring_state(name, initial, index, into)
                if name == "h":
                    f.copy(into + self.h_size, into, units.own_bytes)
                self.record_initial(name, row, index, into)

    def record_initial(self, name: str, row: Value, index: Value, source: Value) -> None:
        """What training does with an initial state."""

    def exit(self) -> None:
        """Final states to the caller: h from where each row's last step left it."""
        f, c, p = self.f, self.c, self.p
        with f.loop(0, self.rows) as row:
            index = self.index(row)
            steps = p.reverse.is_zero.select(self.length(row), c.steps)
            for name, _, final in self._state_fields():
                units = self.units_of_state(name)
                source = self.state_rows(name, row) + units.own
                if name == "h":
                    source = source + (steps & 1) * self.h_size
                f.copy(self.row_of_state(name, final, index), source, units.own_bytes)
