"""What forward did not keep, computed again for a chunk of steps: all its states are known, so all steps at once.

Each element's products are added in the same order as in forward, so that the same bits come out.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.cell.expr import Leaf, evaluate
from fusedrnn.cell.leaves import Peephole, PreH, PreSum, PreX, Saved, State
from fusedrnn.engines.cpu.kernels.backward_emitter import BackwardEmitter
from fusedrnn.engines.cpu.kernels.gemm import GEMM
from fusedrnn.engines.cpu.kernels.loop import Program
from fusedrnn.engines.cpu.kernels.stages import StageKernel
from fusedrnn.jit.builder import Declared, Function, Value


class Recompute(BackwardEmitter):
    """Emits a function of (a pass's arguments, first step, last step): a member's units of those steps' rows."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, "recompute", ("first", "last"))
        self.gemm = Declared(program.module, GEMM)
        self.first, self.last = self.f.arguments[4:]
        c = self.c
        self.gate_rows, self.recurrent = self.scratch + c.forward_gates_offset, self.scratch + c.recurrent_offset

    def emit(self) -> Function:
        """Emit the function."""
        f, p = self.f, self.p
        parts = self.gate_stages
        count = self._rows(self._input)
        with f.if_(count > 0):
            for stage in parts:
                begin = self.hidden.first * stage.num_gates
                with self.panels(begin, self.hidden.last * stage.num_gates) as (column, vectors):
                    place = self.base_column(stage) + column
                    b = self.weights_at(p.forward_x_weights, place, p.k)
                    bias = p.x_bias + place * self.v.bytes
                    into = self.gate_rows + self.region(stage) + (column - begin) * self.v.bytes
                    stride = self.c.forward_gates_stride
                    ahead = b + p.k * self.panel_bytes
                    f.call(self.gemm, count, vectors, self.rows_table, b, p.k, bias, 0, into, stride, ahead)
            for stage in parts:
                self._rows(self._operand_of(stage))
                with self.blocks(stage) as (unit, end):
                    self._block(stage, unit, end, count)
        f.ret()
        return f

    def _rows(self, found: Callable[[Value, Value, Value], Value]) -> Value:
        """The addresses of the rows of all steps, by time, sequence and place; their number."""
        f = self.f
        place = f.var(0)
        with f.loop(self.first, self.last) as step:
            time = self.time_back(step)
            with f.loop(0, self.alive(time)) as row:
                f.store(found(time, self.index(row), place.get()), self.rows_table + place.get() * 8)
                place.set(place.get() + 1)
        return place.get()

    def _input(self, time: Value, index: Value, place: Value) -> Value:
        """What the layer read."""
        p = self.p
        source = p.x + time * p.x_step + index * p.x_row
        copy = self.scratch + self.c.masked_offset + place * self.c.masked_row
        return self.gathered(source, copy, index, time)

    def _operand_of(self, stage: StageKernel) -> Callable[[Value, Value, Value], Value]:
        """What a stage multiplied: h of the step before, or what the reserve has kept of its own step."""
        if stage.index:
            return lambda time, index, place: self.record(self.p.saved_operand, time, index)
        return lambda time, index, place: self.record(self.p.saved_h, self.time_before(time), index)

    def _block(self, stage: StageKernel, unit: Value, end: Value, count: Value) -> None:
        """The recurrent GEMM of a block of units, then what forward would have kept of them."""
        f, c, p, v = self.f, self.c, self.p, self.v
        first, k = unit * stage.num_gates, self.operand_size(stage)
        begin = self.hidden.first * stage.num_gates
        with self.panels(first, end * stage.num_gates) as (column, vectors):
            place = self.base_column(stage) + column
            b = self.weights_at(p.forward_h_weights, place, k)
            if stage.accumulates_in_place:
                at = self.gate_rows + self.region(stage) + (column - begin) * v.bytes
                stride = c.forward_gates_stride
                start, start_stride = at, stride
            else:
                at = self.recurrent + (column - first) * v.bytes
                stride, start_stride = f.constant(self.blocking(stage).block_col_vecs * v.bytes), f.constant(0)
                start = p.h_bias + place * v.bytes
            ahead = b + k * self.panel_bytes
            f.call(self.gemm, count, vectors, self.rows_table, b, k, start, start_stride, at, stride, ahead)
        with f.loop(0, count) as row, f.loop(unit, end) as at:
            self._cell(stage, row, at, at - unit)

    def _cell(self, stage: StageKernel, place: Value, unit: Value, within: Value) -> None:
        c, v, p = self.c, self.v, self.p
        gate_row = self.gate_rows + place * c.forward_gates_stride
        from_state = self.recurrent + (place * self.blocking(stage).block_col_vecs + within * stage.num_gates) * v.bytes

        def load(leaf: Leaf) -> Value:
            match leaf:
                case Peephole(gate):
                    return self.peephole(gate, unit)
                case State(name):
                    # All records of a layer have the same strides: a state is as far from h as its record.
                    base = p.saved_h if name == "h" else p.saved_c
                    row = self.f.load(self.rows_table + place * 8) + (base - p.saved_h)
                    return v.load(row + unit * v.bytes, v.item)
                case PreH(gate):
                    return v.load(from_state + stage.gate_names.index(gate) * v.bytes)
                case PreX(gate) | PreSum(gate):
                    return v.load(self.from_input(gate_row, gate, unit))
            raise AssertionError(leaf)

        results = stage.results_of(Saved)
        for saved, value in zip(results, evaluate(list(results.values()), load, v), strict=True):
            v.store(value, self.recomputed(place) + (unit * self.kept_slots + saved.index) * v.bytes)
