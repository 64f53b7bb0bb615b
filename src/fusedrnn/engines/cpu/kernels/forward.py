"""The forward time loop: one job that runs every layer and direction of a network over a whole sequence.

A thread first multiplies the inputs of a chunk of steps by the weights of its own units. Then each step is a recurrent
GEMM, the cell's maths, stores of h, c and y, and a barrier if other threads need the new h.
"""

from __future__ import annotations

from typing import NamedTuple

from fusedrnn.cell.cells import Variant
from fusedrnn.cell.expr import Leaf
from fusedrnn.cell.leaves import KeptProduct, NewState, Output, ReducedRow, StageOperand, State
from fusedrnn.cell.trace import TracedCell
from fusedrnn.cell.traversal import evaluate
from fusedrnn.engines.cpu.kernels.between_steps import BetweenSteps
from fusedrnn.engines.cpu.kernels.direction_emitter import COMMON_FIELDS, UNPACKED_PARAMS, CellPosition, rows_of_time
from fusedrnn.engines.cpu.kernels.gemm import gemm_of
from fusedrnn.engines.cpu.kernels.gemm_unpacked import UNPACKED_GEMM_NT
from fusedrnn.engines.cpu.kernels.heads import Head
from fusedrnn.engines.cpu.kernels.initial_accumulators import InitialAccumulators
from fusedrnn.engines.cpu.kernels.layer_rows import INPUT_FIELDS
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage, Result, state_letters
from fusedrnn.engines.cpu.kernels.operand_rows import RANGE_BYTES
from fusedrnn.engines.cpu.kernels.output_stores import OutputStores
from fusedrnn.engines.cpu.kernels.panel_matrix import ColVecs, LeftOperand, Matrix, Rows, UnpackedMatrix, WeightMatrix
from fusedrnn.engines.cpu.kernels.reductions import Reductions
from fusedrnn.engines.cpu.kernels.thread_share import Program, each_layer_dir, is_pipelined
from fusedrnn.engines.cpu.kernels.workspace import FORWARD_REGIONS
from fusedrnn.jit.builder import Declared, Function, Module, Value
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.sync import flush_denormals
from fusedrnn.jit.target import Target
from fusedrnn.jit.tiles import released_tiles

CALL = Struct(*COMMON_FIELDS, *FORWARD_REGIONS.fields, "nontemporal_output")
LAYER_DIR = Struct(
    "x", "x_step", "x_row", "x_row_offsets", "k", "y", "y_step", "y_row", "y_row_offsets", "reverse",
    "x_weights", "h_weights", "projection", "parameters", "x_bias", "h_bias", *UNPACKED_PARAMS,
    "h0", "c0", "h_n", "c_n", "h_reset", "c_reset", "all_h", "all_c",
    "x_copy", "saved_h", "saved_c", "saved_operand", "saved_values", "ranges", *INPUT_FIELDS,
)  # fmt: skip


def layer_dir_struct(cell: TracedCell) -> Struct:
    """The struct of a layer-direction; a cell with more than two states, or with reductions, has more fields."""
    letters = state_letters(len(cell.states))[2:]
    forms = "{}0", "{}_n", "{}_reset", "all_{}"
    states = (form.format(letter) for letter in letters for form in forms)
    return Struct(*LAYER_DIR.names, *states, *["moments"] * cell.reduces)


OutputRows = dict[Result | str, Value]
"""Where the results of a row go: states and operands in the reserve; "y", the output; "saved", saved values; "moments",
means and variances. With residual connections also "x", the input that the output is added to."""


class ForwardStep(NamedTuple):
    """A step of the time loop: what its rows have in common."""

    step: Value
    time: Value
    active_rows: Value
    chunk_row: Value  # the step's first row in the chunk
    gates: Value  # the first row of the step's gates
    y: Value  # the first row of the time's output


def build_forward(variant: Variant, compute: str, target: Target) -> Module:
    """The module whose ``forward(call, thread)`` is the job of inference."""
    program = Program.of("forward", variant, compute, target)
    return build_job(program, Inference(program).emit())


def build_job(program: Program, direction_loop: Function) -> Module:
    """Add the exported function, which calls ``direction_loop`` for each layer-direction of a thread."""
    f = Function(program.module, "forward", ["call", "thread"], exported=True)
    call, thread = f.arguments
    c = CALL.read(f, call)
    num_threads = c.grid_layer_dirs * c.grid_rows * c.grid_units

    def run(layer: Value, direction: Value) -> None:
        f.call(direction_loop, call, thread, layer, direction)

    def after(layer: Value) -> None:
        """Wait for the other threads: if threads share rows, the next layer reads their units."""
        with f.if_((c.grid_layer_dirs * c.grid_units > 1) & (layer < c.layers - 1)):
            f.call(program.barrier, c.barriers, num_threads, c.spins)

    with f.if_(thread < num_threads), flush_denormals(f), released_tiles(f, program.target):
        each_layer_dir(f, c, thread, run, after)
    f.ret()
    return program.module


class Inference(InitialAccumulators, BetweenSteps, Reductions, OutputStores):
    """Emits a thread's share of one layer-direction in inference."""

    _result_kinds: tuple[type[Result], ...] = (NewState, Output, StageOperand, ReducedRow, KeptProduct)

    def __init__(self, program: Program) -> None:
        super().__init__(program, "direction_loop", (CALL, layer_dir_struct(program.cell)))
        self._gemm = Declared(program.module, gemm_of(program.compute))
        self._unpacked_gemm = Declared(program.module, UNPACKED_GEMM_NT)
        scratch, c = self.scratch, self.c
        self.x_rows, self.gate_rows = scratch, scratch + c.gates_offset
        self.recurrent = scratch + c.recurrent_offset
        if not self.stages:
            self.nontemporal_output = self.is_nontemporal()

    def emit(self) -> Function:
        """Emit the function."""
        f, c = self.f, self.c
        self.enter()
        self.store_initial_accumulators()
        self.barrier()
        with f.loop(0, c.steps, c.chunk) as first:
            last = (first + c.chunk).at_most(c.steps)
            self.wait_for_layer(self.layer - 1, last)
            self._input_chunk(first, last)
            self._chunk(first, last)
            self.publish_layer(last)
        self.exit()
        f.ret()
        return f

    def _chunk(self, first: Value, last: Value) -> None:
        """The steps of a chunk."""
        f, c = self.f, self.c
        rows_done = f.var(0)
        with f.loop(first, last) as step:
            time = self.time(step)
            active_rows = self.active_rows(time)
            with f.if_(active_rows > 0):
                self._step(step, time, active_rows, rows_done.get())
                rows_done.set(rows_done.get() + active_rows)
                self.end_step(step, time, active_rows)
                # After the very last step no thread reads what others stored; without stages none ever does.
                if self.stages:
                    with f.if_((step < c.steps - 1) | (self.layer < c.layers - 1)):
                        self.barrier()
        if not self.stages:
            self.complete_output()
            # A pipelined layer above reads the units of all threads.
            with f.if_(is_pipelined(c)):
                self.barrier()

    def _weights(self, stage: LoweredStage, head: Head | None = None) -> Matrix:
        """A stage's input weights, or its recurrent weights of a head; their bias is the initial accumulator."""
        of_state = head is not None
        c, p, first_unit_vec = self.c, self.p, self.hidden.first

        def packed() -> Matrix:
            base, bias = (p.h_weights, p.h_bias) if of_state else (p.x_weights, p.x_bias)
            k = self.gemm_k(stage) if of_state else p.k
            return self.packed(self._gemm, base, k, bias, stage, head)

        def unpacked() -> Matrix:
            weights, k = (p.unpacked_h_weights, c.out) if of_state else (p.unpacked_x_weights, p.k)
            bias = self.biases + c.biases_size if of_state else self.biases
            first = first_unit_vec * self.num_gates
            sizes = k, c.hidden, self.num_gates, self.scratch + c.unpacked_offset
            return UnpackedMatrix(self.v, self._unpacked_gemm, weights, *sizes, bias, first)

        return WeightMatrix(self.is_unpacked, unpacked, packed) if self.can_read_unpacked else packed()

    def _input_chunk(self, first: Value, last: Value) -> None:
        """The input GEMM of a chunk: every active row of its steps by the columns of this thread's units."""
        f, p = self.f, self.p
        num_rows = f.var(0)
        with f.loop(first, last) as step:
            time = self.time(step)
            x = rows_of_time(f, p.x, p.x_step, p.x_row, p.x_row_offsets, time)
            with f.loop(0, self.active_rows(time)) as row:
                sequence = self.sequence(row)
                x_row = self._input_row(x + sequence * p.x_row, time, sequence, num_rows.get())
                f.store(x_row, self.x_rows + num_rows.get() * 8)
                self.draw_masks(self.gate_rows + num_rows.get() * self.c.gates_stride, sequence, time)
                num_rows.set(num_rows.get() + 1)
        with f.if_(num_rows.get() > 0):
            a = self.left_operand(self.x_rows, num_rows.get(), p.k, p.ranges)
            gates = Rows(self.gate_rows, self.c.gates_stride)
            self.copy_raw_input(self.x_rows, num_rows.get(), gates)
            self.input_gemm(a, self._weights, gates)

    def _input_row(self, source: Value, time: Value, sequence: Value, index: Value) -> Value:
        """Where the input GEMM reads a row of the layer's input, the ``index``-th of the chunk."""
        return source

    def _step(self, step: Value, time: Value, active_rows: Value, rows_done: Value) -> None:
        """One step, stage by stage; a stage after the first multiplies what all threads have computed."""
        c, p = self.c, self.p
        gates = self.gate_rows + rows_done * c.gates_stride
        y = rows_of_time(self.f, p.y, p.y_step, p.y_row, p.y_row_offsets, time)
        position = ForwardStep(step, time, active_rows, rows_done, gates, y)
        for stage in self.maths_stages:
            if stage.index:
                self.barrier()
            run = self._stage if stage in self.gemm_stages else self._elementwise
            run(stage, position)

    def _elementwise(self, stage: LoweredStage, position: ForwardStep) -> None:
        """A stage without a GEMM: of reductions, or of maths alone."""
        f, c = self.f, self.c
        with f.loop(0, position.active_rows) as row:
            output_rows = self._output_rows(position, row)
            gate_row = position.gates + row * c.gates_stride
            if stage.reductions:
                self.reduce(stage, row, gate_row, output_rows.get("moments"))
            with f.loop(self.hidden.first, self.hidden.last) as unit_vec:
                self._cell(CellPosition(stage, row, unit_vec, gate_row, self.recurrent), position.step & 1, output_rows)

    def _stage(self, stage: LoweredStage, position: ForwardStep) -> None:
        """A stage's GEMM and the cell's maths on its results, for one block of units after the other."""
        f, c = self.f, self.c
        parity = position.step & 1
        row_bytes = self.blocking(stage).block_col_vecs * self.v.bytes
        table = self.operand_table(stage, parity)
        if self.stores_operands:
            a = LeftOperand(table, position.active_rows)
        else:
            operand_range = self.p.ranges + (1 + stage.gemm_number) * RANGE_BYTES
            a = self.left_operand(table, position.active_rows, self.operand_size(stage), operand_range)
        reverse = self.serpentine_reversed(position.step)
        units = self.units_of(stage)
        with self.heads(units.first, units.last, reverse) as head:
            part = self.part_of_rows(a, head.first * self.operand_vector_bytes)
            with self.blocks(stage, (head.begin, head.end), reverse, a.num_rows) as block:
                self._recurrent_gemm(stage, part, head, block, position.gates, reverse)
                begin, end = (head.first + bound for bound in block)
                with f.loop(0, position.active_rows) as row:
                    output_rows = self._output_rows(position, row)
                    gate_row = position.gates + row * c.gates_stride
                    with f.loop(begin, end) as unit_vec:
                        offset = (unit_vec - begin) * (stage.num_gates * self.v.bytes)
                        recurrent = self.recurrent + row * row_bytes + offset
                        self._cell(CellPosition(stage, row, unit_vec, gate_row, recurrent), parity, output_rows)

    def _recurrent_gemm(
        self, stage: LoweredStage, a: LeftOperand, head: Head, block: tuple[Value, Value], gates: Value, reverse: Value
    ) -> None:
        """The GEMM of a block of units of a head, accumulated onto the gates or stored by itself."""
        f, blocking = self.f, self.blocking(stage)
        begin, end = (unit_vec * stage.num_gates for unit_vec in block)
        with self.panels(begin, end, num_rows=a.num_rows) as cols:
            # In reverse, the panel after a block's last one is the first of the block before.
            is_last = reverse & (cols.first + cols.num).equals(end)
            next_panel = is_last.select(f.constant(1 - 2 * blocking.block_panels), 1)
            before = head.first * stage.num_gates
            all_cols, first = ColVecs(before + cols.first, cols.num), before + begin
            c, c_in = self.block_output(stage, all_cols, first, Rows(gates, self.c.gates_stride), self.recurrent)
            if stage.projects:
                projection = self.packed(self._gemm, self.p.projection, self.operand_size(stage))
                projection.gemm(a, cols, c, Rows(self.biases, 0), next_panel)
            else:
                self._weights(stage, head).gemm(a, cols, c, c_in, next_panel)

    def _output_rows(self, position: ForwardStep, row: Value) -> OutputRows:
        """Where a row's results of a time go, in addition to the state buffers."""
        y = position.y + self.sequence(row) * self.p.y_row
        return {"y": y, **self.residual_row(self.x_rows, position.chunk_row + row)}

    def _cell(self, position: CellPosition, parity: Value, output_rows: OutputRows) -> None:
        """The cell's maths on one vector of units of one row; ``parity`` is 0 in even steps, 1 in odd ones."""
        v, (stage, row, unit_vec, *_) = self.v, position
        states = {name: self.state_buffer(name, row) + unit_vec * v.bytes for name in self.cell.states}
        new_h_offset = (1 - parity) * self.h_size
        output = self.cell.first_state
        old_h, new_h = states[output] + parity * self.h_size, states[output] + new_h_offset

        def load(leaf: Leaf) -> Value:
            if isinstance(leaf, ReducedRow):
                return v.load(self.reduced_row(leaf, row) + unit_vec * v.bytes)
            if isinstance(leaf, State):
                return v.load(old_h if leaf.name == output else states[leaf.name])
            return self.load_leaf(leaf, position)

        results = stage.results_of(*self._result_kinds)
        for result, value in zip(results, evaluate(list(results.values()), load, v), strict=True):
            match result:
                case NewState(name):
                    v.store(value, new_h if name == output else states[name])
                    if name == output and self.stores_operands and self.multiplies_output:
                        self.store_operand(value, unit_vec, self.h_operand(row) + new_h_offset, self.c.out)
                case ReducedRow():
                    v.store(value, self.reduced_row(result, row) + unit_vec * v.bytes)
                case KeptProduct():
                    v.store(value, self.kept_product(result, position.gate_row, unit_vec))
                case StageOperand(index):
                    self.store_operand(value, unit_vec, self.operand_row(self.stages[index], row), self.c.hidden)
            self._store_result(stage, result, value, unit_vec, output_rows)

    def _store_result(
        self, stage: LoweredStage, result: Result, value: Value, unit_vec: Value, output_rows: OutputRows
    ) -> None:
        """Store a vector of a result where it is needed in addition to the state buffers."""
        if result == self.output_result:
            self.store_output(value, unit_vec, output_rows["y"], output_rows.get("x"))
