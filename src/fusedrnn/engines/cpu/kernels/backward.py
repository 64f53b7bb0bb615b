"""The time loop reversed: one job that takes gradients back through every layer, direction and step.

Step by step, from the last to the first: what reaches h from the step after (a recurrent GEMM with transposed weights)
and from the output, the differentiated maths of the cell, gate gradients written. They go to three places: rows that
the next step's GEMM reads, rows from which a chunk of steps later makes the gradient of the input, and upright, as the
GEMMs of the weights' gradients (``weights.py``) want them. One barrier a step if members share rows, as in forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedrnn.cell.cells import Variant
from fusedrnn.cell.expr import Expr, Leaf, evaluate
from fusedrnn.cell.leaves import NewState, OperandCotangent, Peephole, Saved, State, StateCotangent
from fusedrnn.engines.cpu.kernels.backward_emitter import CALL, BackwardEmitter, emit_add_directions, emit_deliver
from fusedrnn.engines.cpu.kernels.dropout import DROP_PANEL
from fusedrnn.engines.cpu.kernels.gemm import GEMM
from fusedrnn.engines.cpu.kernels.gemm_unpacked import UNPACKED_GEMM_NN
from fusedrnn.engines.cpu.kernels.loop import Program, each_pass, layers_side_by_side, looked_up, step_at
from fusedrnn.engines.cpu.kernels.recompute import Recompute
from fusedrnn.engines.cpu.kernels.stages import StageKernel
from fusedrnn.engines.cpu.kernels.weight_gradients import WeightGradients
from fusedrnn.jit.builder import Declared, Function, Module, Value, Variable
from fusedrnn.jit.sync import flush_denormals
from fusedrnn.jit.target import Target


def build_backward(variant: Variant, dtype: str, target: Target) -> Module:
    """The module whose ``backward(call, member)`` is a pool's job."""
    program = Program.of("backward", variant, dtype, target)
    sweep = _Sweep(program).emit()
    add_directions = emit_add_directions(program)
    f = Function(program.module, "backward", ["call", "member"], exported=True)
    call, member = f.arguments
    c = CALL.read(f, call)
    everyone = c.grid_layer_dirs * c.grid_rows * c.grid_units

    def run(layer: Value, direction: Value) -> None:
        f.call(sweep, call, member, c.layers - 1 - layer, direction)

    def after(layer: Value) -> None:
        with f.if_(everyone > 1):
            f.call(program.barrier, c.barriers, everyone, c.spins)

    with f.if_(member < everyone), flush_denormals(f):
        each_pass(f, c, member, run, after)
        with f.if_(c.x_gradient.is_set):
            f.call(add_directions, call, member, everyone)
    f.ret()
    return program.module


class _Sweep(BackwardEmitter):
    """Emits a member's part of one pass."""

    def __init__(self, program: Program) -> None:
        self.gemm = Declared(program.module, GEMM)
        if program.is_plain:
            self.unpacked = Declared(program.module, UNPACKED_GEMM_NN)
        self.drop_panel = Declared(program.module, DROP_PANEL)
        self.deliver = emit_deliver(program)
        self.weights = WeightGradients(program, self.deliver).emit()
        self.recompute = Recompute(program).emit()
        super().__init__(program, "sweep")

    def emit(self) -> Function:
        """Emit the function."""
        f, c = self.f, self.c
        self.of_weights = self.weights_wanted()
        self._enter()
        before = f.var(0)
        fresh = f.var(1)
        with f.loop(0, c.steps, c.block) as first:
            last = (first + c.block).at_most(c.steps)
            offset = f.var(0)
            with f.loop(first, last, c.chunk) as begin:
                end = (begin + c.chunk).at_most(last)
                self._chunk(begin, end, before, offset)
            with f.if_(self.of_weights):
                f.call(self.weights, *f.arguments, first, last, offset.get(), fresh.get())
            fresh.set(0)
        with f.if_(self.wanted(self.p.dh0)):
            self._recurrent(c.steps, before.get())
        self._exit()
        f.ret()
        return f

    def _enter(self) -> None:
        """The gradients of the final states into what is carried from step to step; addresses of rows."""
        f, p = self.f, self.p
        f.fill_zero(self.zeros, f.constant(self.panel_bytes))
        with f.loop(0, self.rows) as row:
            index = self.index(row)
            for stage in self.stages:
                for parity in (f.constant(0), f.constant(1)):
                    at = self.state_gates(row, parity) + self.gradients_at(stage)
                    f.store(at, self.row_table(stage, parity) + row * 8)
            for name, final in zip(self.cell.states, (p.dh_n, p.dc_n), strict=False):
                self.bring_state(name, final, index, self.carried(name, row) + self.units_of_state(name).own)
        self.meet()

    def _exit(self) -> None:
        """What has reached the initial states to the caller, if it is wanted."""
        f, c, p = self.f, self.c, self.p
        for name, initial in zip(self.cell.states, (p.dh0, p.dc0), strict=False):
            units = self.units_of_state(name)
            with f.if_(initial.is_set), f.loop(0, self.rows) as row:
                source = self.carried(name, row) + units.own
                into = self.row_of_state(name, initial, self.index(row))
                f.call(self.deliver, source, into, units.own_bytes // self.v.item, c.add_states)

    def _chunk(self, begin: Value, end: Value, before: Variable, offset: Variable) -> None:
        """Some steps, then the gradients of their inputs."""
        f, c, p = self.f, self.c, self.p
        with f.if_(c.recompute.is_set):
            f.call(self.recompute, *f.arguments, begin, end)
        parity = begin // c.chunk & 1
        done = f.var(0)
        self.await_layer(self.layer + 1, end)
        with f.loop(begin, end) as step:
            time = self.time_back(step)
            alive = self.alive(time)
            self._recurrent(step, before.get())
            dy = step_at(f, p.dy, p.dy_step, p.dy_row, p.dy_row_offsets, time)
            for stage in reversed(self.stages):
                with f.loop(0, alive) as row:
                    self._row(stage, row, time, dy, step & 1, parity, done.get(), offset.get())
                if stage.index:
                    # What reaches an operand comes from all of a stage's gradients.
                    self.meet()
                    self._operand(stage, alive, step)
            done.set(done.get() + alive)
            offset.set(offset.get() + self.alive_in_batch(time))
            before.set(alive)
            self.meet()
        with f.if_((self.p.dx.is_set) & (done.get() > 0)):
            self._input_gradients(begin, end, parity, done.get())
        with f.if_(layers_side_by_side(c)):
            self.meet()
        self.tell_layers(end)

    def _recurrent(self, step: Value, count: Value) -> None:
        """What reaches h from the gates of the step after, for the rows that had it; this member's units."""
        f, c, p, stage, units = self.f, self.c, self.p, self.stages[0], self.out
        rows = self.row_table(stage, 1 - (step & 1))
        backwards = self.backwards(step)
        with f.if_(count > 0), self.panels(units.first, units.last, backwards) as (unit, vectors):
            at = self.carried("h", f.constant(0)) + unit * self.v.bytes
            places = at, c.carried_stride, at, c.carried_stride
            onward = backwards.select(f.constant(-1), 1)
            weights = p.h_weights, p.unpacked_h_weights, c.hidden, self.columns_of(stage)
            self._multiply(unit, vectors, count, rows, weights, places, onward)

    def _operand(self, stage: StageKernel, count: Value, step: Value) -> None:
        """What reaches the operand of a stage behind the first from the stage's gradients; this member's units."""
        f, c, p, units = self.f, self.c, self.p, self.hidden
        backwards = self.backwards(step)
        k = self.columns_of(stage)
        if stage.projects:
            weights = p.projection
        else:
            weights = p.h_weights
            for other in self.stages[: stage.index]:
                panels = (self.vectors_of(self.operand_size(other)) + (self.panel_vectors - 1)) // self.panel_vectors
                weights = weights + panels * self.columns_of(other) * self.panel_bytes
        with f.if_(count > 0), self.panels(units.first, units.last, backwards) as (unit, vectors):
            into = self.operand_gradient(stage, f.constant(0)) + unit * self.v.bytes
            places = self.zeros, f.constant(0), into, c.carried_stride
            onward = backwards.select(f.constant(-1), 1)
            packed = weights, f.constant(0), c.hidden, k
            self._multiply(unit, vectors, count, self.row_table(stage, step & 1), packed, places, onward)

    def _multiply(
        self,
        column: Value,
        vectors: Value,
        count: Value,
        rows: Value,
        weights: tuple[Value, Value, Value, Value],
        places: tuple[Value, Value, Value, Value],
        onward: Value,
    ) -> None:
        """Columns of gate gradients times weights: packed, as they lie, their columns, and the gradients of a row.

        ``places`` are the start and its stride, the result and its. The panel needed next is so many further
        ``onward``.
        """
        f = self.f
        packed, matrix, columns, k = weights

        def fast() -> None:
            b = self.weights_at(packed, column, k)
            f.call(self.gemm, count, vectors, rows, b, k, *places, b + onward * k * self.panel_bytes)

        if not self.is_plain:
            fast()
            return
        with f.if_else(self.is_unpacked) as (loose, otherwise):
            with loose:
                f.call(self.unpacked, count, vectors, rows, matrix, columns, *places, column, self.c.hidden, self.gates)
            with otherwise:
                fast()

    def _row(
        self, stage: StageKernel, row: Value, time: Value, dy: Value, parity: Value, half: Value, done: Value,
        offset: Value,
    ) -> None:
        """The differentiated cell on this member's units of one row; the time's output gradients begin at ``dy``."""
        f, c, p, v = self.f, self.c, self.p, self.v
        index = self.index(row)
        place = offset + looked_up(f, c.unsorted_indices, self.first_row + row, self.first_row + row)
        kept = f.var(p.saved_values + time * c.saved_values_step + index * c.saved_values_row)
        with f.if_(c.recompute.is_set):
            kept.set(self.recomputed(done + row))
        rows: dict[str, Any] = {
            "dy": dy + index * p.dy_row,
            "dy_too": p.dy_too + time * p.dy_step + index * p.dy_row,
            "kept": kept.get(),
            "to_state": self.state_gates(row, parity) + self.gradients_at(stage),
            "to_input": self.input_gates(done + row, half) + self.gradients_at(stage),
            "upright": self.upright + place * v.bytes,
            "carried": {name: self.carried(name, row) for name in self.cell.states},
            "states": {},
            "operands": {other.index: self.operand_gradient(other, row) for other in self.stages[1:]},
        }
        for name, base in zip(self.cell.states, (p.saved_h, p.saved_c), strict=False):
            rows["states"][State(name)] = self.record(base, self.time_before(time), index)
            rows["states"][NewState(name)] = self.record(base, time, index)
        units = self.units_of(stage)
        with f.loop(units.first, units.last) as unit:
            self._cell(stage, rows, unit)

    def _cell(self, stage: StageKernel, rows: dict[str, Any], unit: Value) -> None:
        """The differentiated cell on one vector of units of one row: the gradients of one stage."""
        v, derivative = self.v, self.derivative
        at = unit * v.bytes
        left = self.units_of(stage).size - unit * v.lanes
        last = stage is self.stages[-1]
        total: dict[str, Value] = {}

        def gradient(name: str) -> Value:
            if name not in total:
                total[name] = v.load(rows["carried"][name] + at)
                if name == "h" and last:
                    total[name] = total[name] + self._from_above(rows, at, left)
            return total[name]

        def load(leaf: Leaf) -> Value:
            match leaf:
                case StateCotangent(name):
                    return gradient(name)
                case OperandCotangent(index):
                    return v.load(rows["operands"][index] + at)
                case Saved(index):
                    return v.load(rows["kept"] + (unit * len(derivative.saved) + index) * v.bytes)
                case Peephole(gate):
                    return self.peephole(gate, unit)
            return v.load(rows["states"][leaf] + at, v.item)

        if last:
            gradient("h")
        names = [name for name in self.cell.states if derivative.final_stage(name) == stage.index]
        found = {name: expression for name in names if (expression := self._state(name)) is not None}
        slots = stage.derivative.distinct_grads
        values = evaluate([*slots, *found.values()], load, v)
        new = dict(zip(found, values[len(slots) :], strict=True))
        if last and "h" not in names:
            # For the stages before.
            v.store(total["h"], rows["carried"]["h"] + at)
        for name in names:
            v.store(new.get(name, v.const(0.0)), rows["carried"][name] + at)
        self._store_slots(stage, rows, unit, left, values[: len(slots)])

    def _state(self, name: str) -> Expr | None:
        """The gradient of a previous state."""
        return self.derivative.state_grads[self.cell.states.index(name)]

    def _store_slots(
        self, stage: StageKernel, rows: dict[str, Any], unit: Value, left: Value, values: Sequence[Value]
    ) -> None:
        """A stage's gradients of a vector of units, of which so many are left, to the three places."""
        f, c, v, derivative = self.f, self.c, self.v, stage.derivative
        whole = left >= v.lanes
        # Where no unit is, the rows must hold zeros: the GEMMs run over them.
        slots = [whole.select(slot, v.zero_tail(slot, left)) for slot in values]
        for into, places in (("to_state", derivative.h_grads), ("to_input", derivative.x_grads)):
            for gate, place in enumerate(places):
                v.store(slots[place], rows[into] + (unit * stage.num_gates + gate) * v.bytes)
        with f.if_(self.of_weights):
            for place, slot in enumerate(slots):
                v.store(slot, rows["upright"] + self.slot_at(stage, unit, place) * c.transposed_stride)

    def _from_above(self, rows: dict[str, Any], at: Value, left: Value) -> Value:
        """What reaches h from the output at its own time, in the layers below the last from both directions."""
        f, v = self.f, self.v
        total = f.var(v.const(0.0))
        with f.if_(self.p.dy.is_set):
            with f.if_else(left >= v.lanes) as (whole, tail):
                with whole:
                    total.set(v.load(rows["dy"] + at, v.item))
                with tail:
                    total.set(v.load_masked(rows["dy"] + at, left))
            with f.if_(self.p.dy_too.is_set):
                total.set(total.get() + v.load(rows["dy_too"] + at, v.item))
        return total.get()

    def _input_gradients(self, begin: Value, end: Value, half: Value, count: Value) -> None:
        """The gradients of a chunk's inputs: a GEMM over all gates, each member for some features, by panels."""
        f, c, p, v = self.f, self.c, self.p, self.v
        with f.loop(0, count) as row:
            f.store(self.input_gates(row, half), self.rows_table + row * 8)
        columns = (p.k + (v.lanes - 1)) // v.lanes
        first, last = (columns * group // c.grid_units for group in (self.unit_group, self.unit_group + 1))
        with self.panels(first, last) as (column, vectors):
            # In the place that it has in its panel, for dropout's masks are made for whole ones.
            offset = column % self.panel_vectors * v.bytes
            places = self.zeros, f.constant(0), self.panel + offset, f.constant(self.panel_bytes)
            weights, onward = (p.x_weights, p.unpacked_x_weights, p.k, self.gate_columns), f.constant(1)
            self._multiply(column, vectors, count, self.rows_table, weights, places, onward)
            self._deliver_part(begin, end, column, vectors, offset)

    def _deliver_part(self, begin: Value, end: Value, column: Value, vectors: Value, offset: Value) -> None:
        """Part of a panel of input gradients to where they belong, dropout's mask on those that go to a layer below."""
        f, c, p, v = self.f, self.c, self.p, self.v
        feature = column * v.lanes
        features = (p.k - feature).at_most(vectors * v.lanes)
        place = f.var(0)
        with f.loop(begin, end) as step:
            time = self.time_back(step)
            dx = step_at(f, p.dx, p.dx_step, p.dx_row, p.dx_row_offsets, time)
            with f.loop(0, self.alive(time)) as row:
                index = self.index(row)
                source = self.panel + place.get() * self.panel_bytes
                with f.if_((self.layer > 0) & (c.threshold > 0)):
                    f.call(self.drop_panel, source, feature - offset // v.item, *self.draw(index, time))
                into = dx + index * p.dx_row + feature * v.item
                f.call(self.deliver, source + offset, into, features, p.add_x)
                place.set(place.get() + 1)
