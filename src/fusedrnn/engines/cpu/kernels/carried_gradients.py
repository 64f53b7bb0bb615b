"""Gradients of states between two steps of the backward loop: cut at resets, and the caller's added to them."""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.backward_emitter import BackwardEmitter
from fusedrnn.engines.cpu.kernels.direction_emitter import rows_of_time
from fusedrnn.jit.builder import Function, Value


class CarriedGradients(BackwardEmitter):
    """A function of backward that carries the gradients of states from step to step, each thread those of its units."""

    store_or_add: Function

    def cut_gradients(self, step: Value, num_rows: Value) -> None:
        """Clear carried gradients of rows that were reset before the later step; first add them to the reset's."""
        f = self.f
        with f.if_(self.c.resets.is_set), f.loop(0, num_rows) as row:
            sequence = self.sequence(row)
            with f.if_(self.is_reset(self.backward_time(step - 1), sequence).is_set):
                for name, gradient in self.state_fields("d{}_reset"):
                    units = self.units_of_state(name)
                    carried = self.carried(name, row) + units.offset
                    with f.if_(gradient.is_set):
                        into = self.state_row(name, gradient, sequence)
                        f.call(self.store_or_add, carried, into, units.num_bytes // self.v.item, 1)
                    f.fill_zero(carried, units.num_bytes)

    def add_state_gradients(self, time: Value, num_rows: Value) -> None:
        """Add the gradients of the states of that time, if the caller got every state of every step."""
        f, c, p, v = self.f, self.c, self.p, self.v
        for name, base in self.state_fields("dall_{}", self.first_other_state):
            units = self.units_of_state(name)
            row_bytes = c.directions * units.size * v.item
            with f.if_(base.is_set):
                rows = rows_of_time(f, base, c.batch * row_bytes, row_bytes, p.dy_row_offsets, time)
                with f.loop(0, num_rows) as row, f.loop(units.first, units.last) as unit_vec:
                    source = rows + self.sequence(row) * row_bytes + unit_vec * v.bytes
                    carried = self.carried(name, row) + unit_vec * v.bytes
                    gradient = v.load_masked(source, (units.size - unit_vec * v.lanes).at_most(v.lanes))
                    v.store(v.load(carried) + gradient, carried)
