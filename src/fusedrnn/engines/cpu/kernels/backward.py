"""The backward time loop: one job that takes gradients back through every layer, direction and step.

Steps go from the last to the first. Each of them does the following:

1. It computes the gradient of h: the part from the step after, by a recurrent GEMM with transposed weights, plus the
   part from the output.
2. It computes the derivative of the cell.
3. It stores gate gradients three times: in rows for the next step's GEMM, in rows for the GEMM that gives a chunk's dx,
   and transposed for the GEMMs of the weights' gradients (``weight_gradients.py``).

As in forward, there is one barrier a step if threads share rows.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

from fusedrnn.cell.cells import Variant
from fusedrnn.engines.cpu.kernels.backward_cell import BackwardStep, CellGradient
from fusedrnn.engines.cpu.kernels.backward_emitter import CALL, emit_add_directions, emit_store_or_add
from fusedrnn.engines.cpu.kernels.carried_gradients import CarriedGradients
from fusedrnn.engines.cpu.kernels.direction_emitter import rows_of_time
from fusedrnn.engines.cpu.kernels.dropout import DROP_PANEL
from fusedrnn.engines.cpu.kernels.gemm import GEMM
from fusedrnn.engines.cpu.kernels.gemm_unpacked import UNPACKED_GEMM_NN
from fusedrnn.engines.cpu.kernels.heads import Head
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage, is_plain
from fusedrnn.engines.cpu.kernels.panel_matrix import ColVecs, LeftOperand, Matrix, Rows, UnpackedMatrix, WeightMatrix
from fusedrnn.engines.cpu.kernels.recompute import Recompute
from fusedrnn.engines.cpu.kernels.thread_share import Program, each_layer_dir, is_pipelined
from fusedrnn.engines.cpu.kernels.weight_gradients import WeightGradients
from fusedrnn.jit.builder import Declared, Function, Module, Value, Variable
from fusedrnn.jit.sync import flush_denormals
from fusedrnn.jit.target import Target
from fusedrnn.jit.tiles import released_tiles


def build_backward(variant: Variant, compute: str, target: Target) -> Module:
    """The module whose ``backward(call, thread)`` is the job of backward."""
    program = Program.of("backward", variant, compute, target)
    direction_loop = _DirectionLoop(program).emit()
    add_directions = emit_add_directions(program)
    f = Function(program.module, "backward", ["call", "thread"], exported=True)
    call, thread = f.arguments
    c = CALL.read(f, call)
    num_threads = c.grid_layer_dirs * c.grid_rows * c.grid_units

    def run(layer: Value, direction: Value) -> None:
        f.call(direction_loop, call, thread, c.layers - 1 - layer, direction)

    def after(layer: Value) -> None:
        with f.if_(num_threads > 1):
            f.call(program.barrier, c.barriers, num_threads, c.spins)

    with f.if_(thread < num_threads), flush_denormals(f), released_tiles(f, program.target):
        each_layer_dir(f, c, thread, run, after)
        with f.if_(c.x_gradient.is_set):
            f.call(add_directions, call, thread, num_threads)
    f.ret()
    return program.module


class _DirectionLoop(CarriedGradients, CellGradient):
    """Emits a thread's share of one layer-direction."""

    def __init__(self, program: Program) -> None:
        self._gemm = Declared(program.module, GEMM)
        if is_plain(program.cell):
            self._unpacked_gemm = Declared(program.module, UNPACKED_GEMM_NN)
        self._drop_panel = Declared(program.module, DROP_PANEL)
        self.store_or_add = emit_store_or_add(program)
        self._weight_gradients = WeightGradients(program, self.store_or_add).emit()
        self._recompute = Recompute(program).emit()
        super().__init__(program, "direction_loop")
        p = self.p
        gradients = [p.d_x_weights, p.d_h_weights, p.d_x_bias, p.d_h_bias]
        if self.cell.projects:
            gradients.append(p.d_projection)
        if self.cell.param_vectors:
            gradients.append(p.d_param_vectors)
        if self.cell.param_scalars:
            gradients.append(p.d_param_scalars)
        self.params_requested = reduce(or_, gradients).is_set

    def emit(self) -> Function:
        """Emit the function."""
        f, c = self.f, self.c
        self._enter()
        rows_of_step_after = f.var(0)
        rows_before = f.var(0)
        with f.loop(0, c.steps, c.block) as first:
            last = (first + c.block).at_most(c.steps)
            rows_in_block = f.var(0)
            with f.loop(first, last, c.chunk) as begin:
                end = (begin + c.chunk).at_most(last)
                self._chunk(begin, end, rows_of_step_after, rows_in_block)
            with f.if_(self.params_requested):
                f.call(self._weight_gradients, *f.arguments, first, last, rows_in_block.get(), rows_before.get())
            rows_before.set(rows_before.get() + rows_in_block.get())
        with f.if_((self.p.dh0 | self.p.dh_reset).is_set):
            self._recurrent_gemm(c.steps, rows_of_step_after.get())
            self.cut_gradients(c.steps, rows_of_step_after.get())
        self._exit()
        f.ret()
        return f

    def _enter(self) -> None:
        """Copy the gradients of the final states to the carried ones, and fill the tables of gradient rows."""
        f = self.f
        f.fill_zero(self.zeros, f.constant(self.panel_bytes))
        with f.loop(0, self.rows) as row:
            sequence = self.sequence(row)
            for stage in self.gemm_stages:
                for parity in (f.constant(0), f.constant(1)):
                    address = self.h_gate_grads(row, parity) + self.grads_offset(stage.first_h_gate)
                    f.store(address, self.grad_table(stage, parity) + row * 8)
            for name, final in self.state_fields("d{}_n"):
                into = self.carried(name, row) + self.units_of_state(name).offset
                self.load_state(name, final, sequence, into)
        self.barrier()

    def _exit(self) -> None:
        """Give the gradients of the initial states to the caller, if requested."""
        f, c = self.f, self.c
        for name, initial in self.state_fields("d{}0"):
            units = self.units_of_state(name)
            with f.if_(initial.is_set), f.loop(0, self.rows) as row:
                source = self.carried(name, row) + units.offset
                into = self.state_row(name, initial, self.sequence(row))
                f.call(self.store_or_add, source, into, units.num_bytes // self.v.item, c.add_states)

    def _chunk(self, begin: Value, end: Value, rows_of_step_after: Variable, rows_in_block: Variable) -> None:
        """Some steps, then the gradients of their inputs."""
        f, c, p = self.f, self.c, self.p
        with f.if_(c.recompute.is_set):
            f.call(self._recompute, *f.arguments, begin, end)
        chunk_parity = begin // c.chunk & 1
        rows_done = f.var(0)
        self.wait_for_layer(self.layer + 1, end)
        with f.loop(begin, end) as step:
            time = self.backward_time(step)
            active_rows = self.active_rows(time)
            self._recurrent_gemm(step, rows_of_step_after.get())
            self.cut_gradients(step, rows_of_step_after.get())
            self.add_state_gradients(time, active_rows)
            dy = rows_of_time(f, p.dy, p.dy_step, p.dy_row, p.dy_row_offsets, time)
            self._step(BackwardStep(step, time, active_rows, dy, chunk_parity, rows_done.get(), rows_in_block.get()))
            rows_done.set(rows_done.get() + active_rows)
            rows_in_block.set(rows_in_block.get() + self.active_in_batch(time))
            rows_of_step_after.set(active_rows)
            if self.stages:
                self.barrier()
        if not self.stages:
            # The gradients of inputs need the gate gradients of all units.
            self.barrier()
        with f.if_(p.dx.is_set & (rows_done.get() > 0)):
            self._input_gradients(begin, end, chunk_parity, rows_done.get())
        with f.if_(is_pipelined(c)):
            self.barrier()
        self.publish_layer(end)

    def _step(self, position: BackwardStep) -> None:
        """The cell's derivative, stage by stage, the last one first."""
        f = self.f
        for stage in reversed(self.maths_stages):
            with f.loop(0, position.active_rows) as row:
                rows = self.grad_rows(stage, row, position)
                units = self.units_of(stage)
                with f.loop(units.first, units.last) as unit_vec:
                    self.cell_gradient(stage, rows, unit_vec)
            if stage.index:
                # The gradient of an operand or a moment comes from the gradients of all units of its stage.
                self.barrier()
                if stage.reductions:
                    self.reduce_moment_grads(stage, position.active_rows)
                else:
                    self._operand_gemm(stage, position.active_rows, position.step)

    def _recurrent_gemm(self, step: Value, num_rows: Value) -> None:
        """Add to dh of this thread's units what comes through the gates of the step after, in rows that have it."""
        if not self.multiplies_output:
            return
        f, c, p, stage, units = self.f, self.c, self.p, self.stages[0], self.out
        a = LeftOperand(self.grad_table(stage, 1 - (step & 1)), num_rows)
        reverse = self.serpentine_reversed(step)
        # GEMMs on unpacked weights take one panel at a time.
        num_packed_rows = self.is_unpacked.select(0, num_rows) if self.can_read_unpacked else num_rows
        with f.if_(num_rows > 0), self.heads(units.first, units.last, reverse) as head:
            part, packed = self._of_head(stage, head, a, p.h_weights)
            carried = self.carried(self.cell.first_state, f.constant(0)) + head.first * self.v.bytes
            with self.panels(head.begin, head.end, reverse, num_packed_rows) as cols:
                dh = Rows(carried + cols.first * self.v.bytes, c.carried_stride)
                weights = self._weights(packed, self.head_k_padded(stage), p.unpacked_h_weights, c.hidden)
                weights.gemm(part, cols, dh, dh, reverse.select(f.constant(-1), 1))

    def _of_head(self, stage: LoweredStage, head: Head, a: LeftOperand, weights: Value) -> tuple[LeftOperand, Value]:
        """A head's part of a stage's rows of gradients, and the head's recurrent weights."""
        if not self.cell.is_block_diagonal:
            return a, weights
        part = self.part_of_rows(a, head.first * (stage.num_gates * self.operand_vector_bytes))
        return part, weights + head.number * self.head_weights_bytes(stage)

    def _operand_gemm(self, stage: LoweredStage, num_rows: Value, step: Value) -> None:
        """The gradient of a later stage's operand, from the gradients of the stage, for this thread's units."""
        f, c, p, units = self.f, self.c, self.p, self.hidden
        reverse = self.serpentine_reversed(step)
        weights = p.projection if stage.projects else p.h_weights
        for earlier in () if stage.projects else self.gemm_stages[: stage.gemm_number]:
            weights = weights + c.heads * self.head_weights_bytes(earlier)
        a = LeftOperand(self.grad_table(stage, step & 1), num_rows)
        with f.if_(num_rows > 0), self.heads(units.first, units.last, reverse) as head:
            part, packed = self._of_head(stage, head, a, weights)
            matrix = self.packed(self._gemm, packed, self.head_k_padded(stage))
            grads = self.operand_grad(stage, f.constant(0)) + head.first * self.v.bytes
            with self.panels(head.begin, head.end, reverse) as cols:
                into = Rows(grads + cols.first * self.v.bytes, c.carried_stride)
                matrix.gemm(part, cols, into, Rows(self.zeros, 0), reverse.select(f.constant(-1), 1))

    def _weights(self, packed: Value, k: Value, unpacked: Value, num_cols: Value) -> Matrix:
        """Weights for backward: packed transposed, with k rows; or unpacked, with ``num_cols`` columns."""

        def as_packed() -> Matrix:
            return self.packed(self._gemm, packed, k)

        def as_unpacked() -> Matrix:
            sizes = num_cols, self.c.hidden, self.num_gates, self.scratch + self.c.unpacked_offset
            return UnpackedMatrix(self.v, self._unpacked_gemm, unpacked, *sizes)

        return WeightMatrix(self.is_unpacked, as_unpacked, as_packed) if self.can_read_unpacked else as_packed()

    def _input_gradients(self, begin: Value, end: Value, chunk_parity: Value, num_rows: Value) -> None:
        """The gradients of a chunk's inputs: a GEMM over all gates; each thread computes some features, by panels."""
        f, c, p, v = self.f, self.c, self.p, self.v
        with f.loop(0, num_rows) as row:
            f.store(self.x_gate_grads(row, chunk_parity), self.chunk_table + row * 8)
        a = LeftOperand(self.chunk_table, num_rows)
        feature_vecs = (p.k + (v.lanes - 1)) // v.lanes
        first, last = (feature_vecs * group // c.grid_units for group in (self.unit_group, self.unit_group + 1))
        with self.panels(first, last) as cols:
            # Dropout masks whole panels, so the columns keep their place in the panel.
            offset = cols.first % self.panel_vectors * v.bytes
            into, c_in = Rows(self.panel + offset, self.panel_bytes), Rows(self.zeros, 0)
            if self.cell.reads_raw_input:
                raw_grads = self.x_gate_grads(f.constant(0), chunk_parity) + self.raw_grads_offset
                c_in = Rows(raw_grads + cols.first * v.bytes, c.gates_row)
            weights = self._weights(p.x_weights, self.gates_k_padded, p.unpacked_x_weights, p.k)
            weights.gemm(a, cols, into, c_in)
            self._store_input_gradients(begin, end, cols, offset)

    def _store_input_gradients(self, begin: Value, end: Value, cols: ColVecs, offset: Value) -> None:
        """Store the columns of a panel of dx: add what a residual connection adds, then apply the mask of dropout."""
        f, p, v = self.f, self.p, self.v
        feature = cols.first * v.lanes
        num_features = (p.k - feature).at_most(cols.num * v.lanes)
        index = f.var(0)
        with f.loop(begin, end) as step:
            time = self.backward_time(step)
            dx = rows_of_time(f, p.dx, p.dx_step, p.dx_row, p.dx_row_offsets, time)
            with f.loop(0, self.active_rows(time)) as row:
                sequence = self.sequence(row)
                source = self.panel + index.get() * self.panel_bytes
                if self.is_residual:
                    self._add_output_grad(source + offset, time, sequence, feature, num_features)
                with f.if_(p.threshold > 0):
                    counter = self.dropout_counter(sequence, time)
                    f.call(self._drop_panel, source, feature - offset // v.item, *counter)
                into = dx + sequence * p.dx_row + feature * v.item
                f.call(self.store_or_add, source + offset, into, num_features, p.add_x)
                index.set(index.get() + 1)

    def _add_output_grad(
        self, panel_row: Value, time: Value, sequence: Value, feature: Value, num_features: Value
    ) -> None:
        """Add the gradient of the output to that of the input, if a residual connection joins them.

        One direction adds the gradients of both: its ``residual`` is set.
        """
        f, p, v = self.f, self.p, self.v
        with f.if_(p.residual.is_set):
            dy = rows_of_time(f, p.dy, p.dy_step, p.dy_row, p.dy_row_offsets, time) + sequence * p.dy_row
            dy_second = p.dy_second + time * p.dy_step + sequence * p.dy_row
            with f.loop(0, num_features, v.lanes) as done:
                offset, into = (feature + done) * v.item, panel_row + done * v.item
                v.store(v.load(into) + self.output_grad(dy + offset, dy_second + offset, num_features - done), into)
