"""What forward did not keep, computed again for a chunk of steps: all its states are known, so all steps at once.

Each element's products are added in the same order as in forward, so that the same bits come out.
"""

from __future__ import annotations

from fusedrnn.codegen.build import Function, Value
from fusedrnn.codegen.dropout import Dropout
from fusedrnn.engine.gradient_pass import GradientPass
from fusedrnn.engine.sequence import Program
from fusedrnn.symbolic import Leaf, evaluate


class Recompute(GradientPass):
    """Emits a function of (a pass's arguments, first step, last step): a member's units of those steps' rows."""

    def __init__(self, program: Program, gemm: Function, dropout: Dropout) -> None:
        super().__init__(program, "recompute", ("first", "last"))
        self.gemm, self.dropout = gemm, dropout
        self.kept = self.derivative.kept
        self.first, self.last = self.f.arguments[4:]
        c = self.c
        self.gates, self.recurrent = self.scratch + c.forward_gates_at, self.scratch + c.recurrent_at
        self.first_column = self.first_unit * self.blocking.gates

    def emit(self) -> Function:
        """Emit the function."""
        f, p, v = self.f, self.p, self.v
        count = self._rows(inputs=True)
        with f.if_(count > 0):
            with self.panels(self.first_column, self.last_unit * self.blocking.gates) as (column, vectors):
                b = self.weights_at(p.forward_x_weights, column, p.k)
                bias = p.x_bias + column * v.bytes
                into = self.gates + (column - self.first_column) * v.bytes
                stride = self.c.forward_gates_stride
                ahead = b + p.k * self.panel_bytes
                f.call(self.gemm, count, vectors, self.rows_table, b, p.k, bias, 0, into, stride, ahead)
            self._rows(inputs=False)
            with self.blocks() as (unit, end):
                self._block(unit, end, count)
        f.done()
        return f

    def _rows(self, inputs: bool) -> Value:
        """The addresses of the rows of all steps, of what the layer read or of its h before; their number."""
        f, c, p = self.f, self.c, self.p
        place = f.var(0)
        with f.loop(self.first, self.last) as step:
            time = self.time_back(step)
            with f.loop(0, self.alive(time)) as row:
                index = self.index(row)
                if inputs:
                    source = p.x + time * p.x_step + index * p.x_row
                    copy = self.scratch + c.masked_at + place.get() * c.masked_row
                    at = self.gathered(self.dropout.row, source, copy, index, time)
                else:
                    at = self.record(p.h_record, self.time_before(time), index)
                f.store(at, self.rows_table + place.get() * 8)
                place.set(place.get() + 1)
        return place.get()

    def _block(self, unit: Value, end: Value, count: Value) -> None:
        """The recurrent GEMM of a block of units, then what forward would have kept of them."""
        f, c, p, v = self.f, self.c, self.p, self.v
        first = unit * self.blocking.gates
        with self.panels(first, end * self.blocking.gates) as (column, vectors):
            b = self.weights_at(p.forward_h_weights, column, c.hidden)
            if self.cell.merged:
                at, stride = self.gates + (column - self.first_column) * v.bytes, c.forward_gates_stride
                start, start_stride = at, stride
            else:
                at = self.recurrent + (column - first) * v.bytes
                stride, start_stride = f.constant(self.blocking.block_columns * v.bytes), f.constant(0)
                start = p.h_bias + column * v.bytes
            ahead = b + c.hidden * self.panel_bytes
            f.call(self.gemm, count, vectors, self.rows_table, b, c.hidden, start, start_stride, at, stride, ahead)
        with f.loop(0, count) as place, f.loop(unit, end) as at:
            self._cell(place, at, at - unit)

    def _cell(self, place: Value, unit: Value, within: Value) -> None:
        c, v, cell = self.c, self.v, self.cell
        gates = self.blocking.gates
        from_input = self.gates + place * c.forward_gates_stride + (unit - self.first_unit) * (gates * v.bytes)
        from_state = self.recurrent + (place * self.blocking.block_columns + within * gates) * v.bytes

        def leaf(which: Leaf) -> Value:
            kind, name = which
            source = from_state if kind == "h" else from_input
            return v.load(source + cell.gates.index(name) * v.bytes)

        for number, value in enumerate(evaluate(self.kept, leaf, v)):
            v.store(value, self.recomputed(place) + (unit * self.kept_slots + number) * v.bytes)
