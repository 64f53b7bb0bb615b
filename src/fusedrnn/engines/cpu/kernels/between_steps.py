"""What happens to the states between two steps of the forward loop: copies of every state, and resets.

A barrier follows each step, before other threads read its h. If a row is reset before the next step, each thread
replaces its own units of the row's states before that barrier.
"""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.direction_emitter import rows_of_time
from fusedrnn.engines.cpu.kernels.states import StateEmitter
from fusedrnn.jit.builder import Value


class BetweenSteps(StateEmitter):
    """A function of a thread's share of one layer-direction that also ends its steps."""

    def end_step(self, step: Value, time: Value, active_rows: Value) -> None:
        """Copy states to the caller if all are requested; replace those of rows that the next step resets."""
        f, c = self.f, self.c
        self._copy_states(step, time, active_rows)
        with f.if_(c.resets.is_set & (step < c.steps - 1)):
            next_time = self.next_time(time)
            with f.loop(0, active_rows) as row:
                sequence = self.sequence(row)
                with f.if_(self.is_reset(next_time, sequence).is_set):
                    self.replace_states(row, sequence, 1 - (step & 1))

    def _copy_states(self, step: Value, time: Value, active_rows: Value) -> None:
        """Copy this thread's units of the states that the output does not show, where the caller requests them."""
        f, c, p = self.f, self.c, self.p
        for name, base in self.state_fields("all_{}", self.first_other_state):
            units = self.units_of_state(name)
            row_bytes = c.directions * units.size * self.v.item
            buffer_offset = (1 - (step & 1)) * self.h_size if name == self.cell.first_state else f.constant(0)
            with f.if_(base.is_set):
                into = rows_of_time(f, base, c.batch * row_bytes, row_bytes, p.y_row_offsets, time) + units.offset
                with f.loop(0, active_rows) as row:
                    source = self.state_buffer(name, row) + buffer_offset + units.offset
                    f.copy(into + self.sequence(row) * row_bytes, source, units.num_bytes)
