"""What the functions of backward share: their structs, where gradients are, and how they reach the caller."""

from __future__ import annotations

from fusedrnn.cell.trace import TracedCell
from fusedrnn.engines.cpu.kernels.direction_emitter import (
    COMMON_FIELDS,
    UNPACKED_PARAMS,
    DirectionEmitter,
    rows_of_time,
    table_entry,
)
from fusedrnn.engines.cpu.kernels.layer_rows import INPUT_FIELDS
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage, state_letters
from fusedrnn.engines.cpu.kernels.row_groups import first_row_number
from fusedrnn.engines.cpu.kernels.thread_share import Program
from fusedrnn.engines.cpu.kernels.workspace import BACKWARD_REGIONS
from fusedrnn.jit.builder import Function, Value
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.vector import Vectors

CALL = Struct(
    *COMMON_FIELDS,
    "block", "weight_starts", "out_weight_starts", "unsorted_indices", "batch_sizes", "sorted_indices",
    "add_states", "add_params", "recompute",
    "x_gradient", "x_step", "x_row", "x_row_offsets", "x_add", "x_size",
    *BACKWARD_REGIONS.fields,
)  # fmt: skip
"""A *direction group* is the threads that work on the same direction. Its memory, ``group_stride`` bytes, holds the
rows of gate gradients, the gradients carried from step to step, transposed gradients and the weights' gradients."""
LAYER_DIR = Struct(
    "reverse", "k", "x", "x_step", "x_row", "dy", "dy_second", "dy_step", "dy_row", "dy_row_offsets",
    "dx", "dx_step", "dx_row", "dx_row_offsets", "add_x",
    "x_weights", "h_weights", "projection", "parameters",
    "forward_x_weights", "forward_h_weights", "x_bias", "h_bias", *UNPACKED_PARAMS,
    "dh_n", "dc_n", "dh0", "dc0", "dh_reset", "dc_reset", "dall_h", "dall_c",
    "saved_h", "saved_c", "saved_operand", "saved_values",
    "d_x_weights", "d_h_weights", "d_projection", "d_param_vectors", "d_x_bias", "d_h_bias", *INPUT_FIELDS,
)  # fmt: skip


def layer_dir_struct(cell: TracedCell) -> Struct:
    """The struct of a layer-direction; a cell with more than two states, scalars or reductions has more fields."""
    letters = state_letters(len(cell.states))[2:]
    forms = "d{}_n", "d{}0", "d{}_reset", "dall_{}"
    states = (form.format(letter) for letter in letters for form in forms)
    more = *["d_param_scalars"] * bool(cell.param_scalars), *["moments"] * cell.reduces
    return Struct(*LAYER_DIR.names, *states, *more)


class BackwardEmitter(DirectionEmitter):
    """A function of backward under construction: a thread's share of one layer-direction."""

    def __init__(self, program: Program, name: str, more: tuple[str, ...] = ()) -> None:
        super().__init__(program, name, (CALL, layer_dir_struct(program.cell)), more)
        c, v = self.c, self.v
        self.num_saved = len(self.derivative.saved)
        self.unit_vecs = self.num_vectors(c.hidden)
        self.gates_k_padded = self.unit_vecs * (self.num_gates * v.lanes)
        self.group = c.groups + self.layer_dir_group * c.group_stride
        # Where the rows of a block of steps begin in the first transposed gradient.
        first_row = first_row_number(program.compute, program.target)
        self.transposed = self.group + c.transposed_offset + first_row * v.bytes
        self.scratch = c.scratch + self.thread * c.scratch_stride
        self.chunk_table = self.scratch + self.rows * (16 * len(self.gemm_stages))
        self.state_table = self.chunk_table + c.chunk * self.rows * 8
        # A row of zeros, the initial accumulators of GEMMs, comes before the panel that these GEMMs write.
        self.zeros = self.scratch + c.panel_offset
        self.panel = self.zeros + self.panel_bytes

    def backward_time(self, step: Value) -> Value:
        """The time of a step of the backward loop in this direction."""
        return self.time(self.c.steps - 1 - step)

    def k_padded(self, stage: LoweredStage) -> Value:
        """Elements of a row of a stage's gradients, padded to whole vectors: K of its GEMMs in backward."""
        return self.num_vectors(self.units_of(stage).size) * (stage.num_gates * self.v.lanes)

    def head_k_padded(self, stage: LoweredStage) -> Value:
        """The same for a head: K of its GEMM with recurrent weights."""
        if not self.cell.is_block_diagonal:
            return self.k_padded(stage)
        return self.head_vecs * (stage.num_gates * self.v.lanes)

    def head_weights_bytes(self, stage: LoweredStage) -> Value:
        """Bytes of the recurrent weights of a stage and a head, for backward."""
        vectors = self.head_vecs if self.cell.is_block_diagonal else self.num_vectors(self.operand_size(stage))
        panels = (vectors + (self.panel_vectors - 1)) // self.panel_vectors
        return panels * self.packed_bytes(self.head_k_padded(stage))

    def grads_offset(self, first_gate: int) -> Value:
        """Where the gradients of the gates from ``first_gate`` on begin in a row of gate gradients."""
        return self.unit_vecs * (first_gate * self.operand_vector_bytes)

    @property
    def raw_grads_offset(self) -> Value:
        """Where the gradients of the raw input begin in a row of gate gradients: after those of all stages."""
        return self.gates_k_padded * self.v.item

    def grad_index(self, stage: LoweredStage, unit_vec: Value, grad: int) -> Value:
        """The index of a stage's distinct gradient of a vector of units, among those of all stages."""
        return self.unit_vecs * stage.first_grad + unit_vec * stage.num_grads + grad

    def operand_grad(self, stage: LoweredStage, row: Value) -> Value:
        """This thread's row of the gradient of a later stage's operand."""
        c = self.c
        index = (stage.operand_number - 1) * c.batch + self.first_row + row
        return self.group + c.operands_offset + index * c.carried_stride

    def grad_table(self, stage: LoweredStage, parity: Value) -> Value:
        """The table of the addresses of a stage's rows of gradients: of even steps, then of odd ones."""
        return self.scratch + (parity + 2 * stage.gemm_number) * self.rows * 8

    def active_in_batch(self, time: Value) -> Value:
        """The number of sequences of the whole batch that have that time."""
        return table_entry(self.f, self.c.batch_sizes, time, self.c.batch)

    def carried(self, name: str, row: Value) -> Value:
        """This thread's row of the gradient of a state, carried over from the step after."""
        c = self.c
        base = self.group + c.carried_offset + self.cell.states.index(name) * c.carried_size
        return base + (self.first_row + row) * c.carried_stride

    def h_gate_grads(self, row: Value, parity: Value) -> Value:
        """A row of gate gradients for the recurrent GEMM: two sets, for even and odd steps."""
        c = self.c
        return self.group + c.state_gates_offset + (parity * c.batch + self.first_row + row) * c.gates_row

    def x_gate_grads(self, index: Value, parity: Value) -> Value:
        """A row of a chunk's gate gradients for the input GEMM: two sets, for even and odd chunks."""
        c = self.c
        row = (parity * c.batch + self.first_row) * c.chunk + index
        return self.group + c.input_gates_offset + row * c.gates_row

    def saved_moments(self, time: Value, sequence: Value) -> Value:
        """The means and variances of a row of a step in the reserve."""
        return self.p.moments + time * self.c.saved_values_step + sequence * self.c.saved_values_row

    def recomputed(self, index: Value) -> Value:
        """A row of a chunk's recomputed values, as if it began with the first of all units."""
        c, v = self.c, self.v
        units = self.hidden
        row = (units.last - units.first) * (self.num_saved * v.bytes)
        return self.scratch + c.recomputed_offset + index * row - units.first * (self.num_saved * v.bytes)


def emit_store_or_add(program: Program) -> Function:
    """A function of (source, into, num_features, add): store an aligned row at any alignment, or add it there."""
    f = Function(program.module, "store_or_add", ["source", "into", "num_features", "add"])
    source, into, num_features, add = f.arguments
    v = Vectors(f, program.target, program.dtype)
    with f.loop(0, num_features, v.lanes) as feature:
        offset = feature * v.item
        value = v.load(source + offset)
        store_or_add(f, v, value, into + offset, num_features - feature, add)
    f.ret()
    return f


def store_or_add(f: Function, v: Vectors, value: Value, into: Value, lanes_left: Value, add: Value) -> None:
    """Store a vector at any alignment, or add it there; only as many lanes as are left."""
    total = f.var(value)
    with f.if_else(lanes_left >= v.lanes) as (whole, tail):
        with whole:
            with f.if_(add.is_set):
                total.set(v.load(into, v.item) + value)
            v.store(total.get(), into, v.item)
        with tail:
            with f.if_(add.is_set):
                total.set(v.load_masked(into, lanes_left) + value)
            v.store_masked(total.get(), into, lanes_left)


def emit_add_directions(program: Program) -> Function:
    """A function of (call, thread, num_threads): add up both directions' parts of the input's gradient."""
    f = Function(program.module, "add_directions", ["call", "thread", "num_threads"])
    call, thread, num_threads = f.arguments
    c, v = CALL.read(f, call), Vectors(f, program.target, program.dtype)
    with (
        f.loop(thread, c.steps, num_threads) as time,
        f.loop(0, table_entry(f, c.batch_sizes, time, c.batch)) as sorted_index,
    ):
        sequence = table_entry(f, c.sorted_indices, sorted_index, sorted_index)
        dx = rows_of_time(f, c.x_gradient, c.x_step, c.x_row, c.x_row_offsets, time) + sequence * c.x_row
        partial = c.dx_partials + time * c.dx_partial_step + sequence * c.dx_partial_row
        with f.loop(0, c.x_size, v.lanes) as feature:
            offset = feature * v.item
            total = v.load(partial + offset) + v.load(partial + c.dx_partial_size + offset)
            store_or_add(f, v, total, dx + offset, c.x_size - feature, c.x_add)
    f.ret()
    return f
