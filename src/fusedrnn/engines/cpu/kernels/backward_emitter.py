"""What the parts of backward share: their records, where gradients lie, how they are handed over."""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.loop import SHARED, UNPACKED_PARAMS, Pass, Program, looked_up, step_at
from fusedrnn.engines.cpu.kernels.scratch import BACKWARD
from fusedrnn.engines.cpu.kernels.stages import StageKernel
from fusedrnn.jit.builder import Function, Value
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.vector import Vectors

CALL = Struct(
    *SHARED,
    "block", "weight_starts", "out_weight_starts", "unsorted_indices", "batch_sizes", "sorted_indices",
    "add_states", "add_params", "recompute",
    "x_gradient", "x_step", "x_row", "x_row_offsets", "x_add", "x_size",
    *BACKWARD.fields,
)  # fmt: skip
"""A *team* is the members that work on the same direction; its memory, ``group_stride`` bytes, holds the rows of gate
gradients, what is carried from step to step, upright gradients and the weights' gradients."""
LAYER_DIR = Struct(
    "reverse", "k", "x", "x_step", "x_row", "dy", "dy_too", "dy_step", "dy_row", "dy_row_offsets",
    "dx", "dx_step", "dx_row", "dx_row_offsets", "add_x",
    "x_weights", "h_weights", "projection", "peepholes",
    "forward_x_weights", "forward_h_weights", "x_bias", "h_bias", *UNPACKED_PARAMS,
    "dh_n", "dc_n", "dh0", "dc0", "saved_h", "saved_c", "saved_operand", "saved_values",
    "d_x_weights", "d_h_weights", "d_projection", "d_peepholes", "d_x_bias", "d_h_bias",
)  # fmt: skip


class BackwardEmitter(Pass):
    """A function of backward's under construction."""

    def __init__(self, program: Program, name: str, more: tuple[str, ...] = ()) -> None:
        super().__init__(program, name, (CALL, LAYER_DIR), more)
        c, v = self.c, self.v
        self.kept_slots = len(self.derivative.saved)
        self.unit_vectors = self.vectors_of(c.hidden)
        self.gate_columns = self.unit_vectors * (self.gates * v.lanes)
        self.team = c.groups + self.turn * c.group_stride
        self.upright = self.team + c.transposed_offset
        self.scratch = c.scratch + self.member * c.scratch_stride
        self.state_rows, self.rows_table = self.scratch, self.scratch + self.rows * (16 * len(self.stages))
        # A row of zeros for GEMMs to start from lies before the panel that they make.
        self.zeros = self.scratch + c.panel_offset
        self.panel = self.zeros + self.panel_bytes

    def time_back(self, step: Value) -> Value:
        """The time of a step of the backward loop in this direction."""
        return self.time(self.c.steps - 1 - step)

    def wanted(self, *gradients: Value) -> Value:
        """Whether anybody wants any of these."""
        together = gradients[0]
        for gradient in gradients[1:]:
            together = together | gradient
        return together.is_set

    def weights_wanted(self) -> Value:
        """Whether anybody wants any gradient of this pass's parameters."""
        p = self.p
        found = [p.d_x_weights, p.d_h_weights, p.d_x_bias, p.d_h_bias]
        if self.cell.projects:
            found.append(p.d_projection)
        if self.cell.peepholes:
            found.append(p.d_peepholes)
        return self.wanted(*found)

    def columns_of(self, stage: StageKernel) -> Value:
        """Elements of a row of a stage's gradients, those of units that are not there among them."""
        return self.vectors_of(self.units_of(stage).size) * (stage.num_gates * self.v.lanes)

    def gradients_at(self, stage: StageKernel) -> Value:
        """Where a stage's gradients begin in a row of gate gradients."""
        return self.unit_vectors * (stage.first_gate * self.v.bytes)

    def slot_at(self, stage: StageKernel, unit: Value, slot: int) -> Value:
        """The number of a stage's distinct gradient of a vector of units, among those of all."""
        return self.unit_vectors * stage.first_grad + unit * stage.num_grads + slot

    def operand_gradient(self, stage: StageKernel, row: Value) -> Value:
        """This member's row of what reaches the operand of a stage behind the first."""
        c = self.c
        place = (stage.index - 1) * c.batch + self.first_row + row
        return self.team + c.operands_offset + place * c.carried_stride

    def row_table(self, stage: StageKernel, parity: Value) -> Value:
        """The addresses of a stage's rows of gradients: of even steps, then of odd ones."""
        return self.state_rows + (parity + 2 * stage.index) * self.rows * 8

    def alive_in_batch(self, time: Value) -> Value:
        """How many sequences of the whole batch have that time."""
        return looked_up(self.f, self.c.batch_sizes, time, self.c.batch)

    def carried(self, name: str, row: Value) -> Value:
        """This member's row of what reaches a state from the step after."""
        c = self.c
        base = self.team + c.carried_offset + self.cell.states.index(name) * c.carried_size
        return base + (self.first_row + row) * c.carried_stride

    def state_gates(self, row: Value, parity: Value) -> Value:
        """A row of gate gradients towards the recurrent weights: two sets, for even and odd steps."""
        c = self.c
        return self.team + c.state_gates_offset + (parity * c.batch + self.first_row + row) * c.gates_row

    def input_gates(self, place: Value, half: Value) -> Value:
        """A row of gate gradients towards the input weights, of a chunk: two sets, for even and odd chunks."""
        c = self.c
        row = (half * c.batch + self.first_row) * c.chunk + place
        return self.team + c.input_gates_offset + row * c.gates_row

    def recomputed(self, place: Value) -> Value:
        """Where a row of a chunk has what was computed again, as if all units were there."""
        c, v = self.c, self.v
        units = self.hidden
        row = (units.last - units.first) * (self.kept_slots * v.bytes)
        return self.scratch + c.recomputed_offset + place * row - units.first * (self.kept_slots * v.bytes)


def emit_deliver(program: Program) -> Function:
    """A function of (source, into, features, add): an aligned row to memory of any alignment, written or added."""
    f = Function(program.module, "deliver", ["source", "into", "features", "add"])
    source, into, features, add = f.arguments
    v = Vectors(f, program.target, program.dtype)
    with f.loop(0, features, v.lanes) as feature:
        at = feature * v.item
        value = v.load(source + at)
        deliver(f, v, value, into + at, features - feature, add)
    f.ret()
    return f


def deliver(f: Function, v: Vectors, value: Value, into: Value, left: Value, add: Value) -> None:
    """A vector to memory of any alignment, written or added, as many lanes as are left."""
    total = f.var(value)
    with f.if_else(left >= v.lanes) as (whole, tail):
        with whole:
            with f.if_(add.is_set):
                total.set(v.load(into, v.item) + value)
            v.store(total.get(), into, v.item)
        with tail:
            with f.if_(add.is_set):
                total.set(v.load_masked(into, left) + value)
            v.store_masked(total.get(), into, left)


def emit_add_directions(program: Program) -> Function:
    """A function of (call, member, members): the input's gradient is the sum of what both directions made."""
    f = Function(program.module, "add_directions", ["call", "member", "members"])
    call, member, members = f.arguments
    c, v = CALL.read(f, call), Vectors(f, program.target, program.dtype)
    with f.loop(member, c.steps, members) as time, f.loop(0, looked_up(f, c.batch_sizes, time, c.batch)) as rank:
        index = looked_up(f, c.sorted_indices, rank, rank)
        into = step_at(f, c.x_gradient, c.x_step, c.x_row, c.x_row_offsets, time) + index * c.x_row
        one = c.dx_partials + time * c.dx_partial_step + index * c.dx_partial_row
        with f.loop(0, c.x_size, v.lanes) as feature:
            at = feature * v.item
            total = v.load(one + at) + v.load(one + c.dx_partial_size + at)
            deliver(f, v, total, into + at, c.x_size - feature, c.x_add)
    f.ret()
    return f
