"""Recomputes the values that forward did not save, for all steps of a chunk at once, since all states are known.

The products of each element are added in the order of forward, so that the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fusedrnn.cell.expr import Leaf
from fusedrnn.cell.leaves import KeptProduct, State
from fusedrnn.cell.traversal import evaluate
from fusedrnn.engines.cpu.kernels.backward_emitter import BackwardEmitter
from fusedrnn.engines.cpu.kernels.direction_emitter import CellPosition
from fusedrnn.engines.cpu.kernels.gemm import GEMM
from fusedrnn.engines.cpu.kernels.heads import Head
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage, moments
from fusedrnn.engines.cpu.kernels.panel_matrix import ColVecs, LeftOperand, Rows
from fusedrnn.engines.cpu.kernels.thread_share import Program
from fusedrnn.jit.builder import Declared, Function, Value


class Recompute(BackwardEmitter):
    """Emits a function of (a layer-direction's arguments, first step, last step), for a thread's rows and units."""

    draws_masks = True

    def __init__(self, program: Program) -> None:
        super().__init__(program, "recompute", ("first", "last"))
        self._gemm = Declared(program.module, GEMM)
        self.first, self.last = self.f.arguments[4:]
        c = self.c
        self.gates = Rows(self.scratch + c.forward_gates_offset, c.gates_stride)
        self.recurrent = self.scratch + c.recurrent_offset

    def emit(self) -> Function:
        """Emit the function."""
        f, p = self.f, self.p
        self._fill_table(self.state_table, self._h_before)
        num_rows = self._fill_table(self.chunk_table, self._input)
        self._fill_row_values()
        with f.if_(num_rows > 0):
            x_weights = partial(self.packed, self._gemm, p.forward_x_weights, p.k, p.x_bias)
            self.copy_raw_input(self.chunk_table, num_rows, self.gates)
            self.input_gemm(self.left_operand(self.chunk_table, num_rows, p.k), x_weights, self.gates)
            if not self.multiplies_output:
                self._elementwise(num_rows)
            for stage in self.gemm_stages:
                if stage.projects:
                    continue
                table = self.state_table
                if stage.index:
                    table = self.chunk_table
                    self._fill_table(table, self._operand_of(stage))
                a = self.left_operand(table, num_rows, self.operand_size(stage))
                with self.heads(self.hidden.first, self.hidden.last) as head:
                    part = self.part_of_rows(a, head.first * self.operand_vector_bytes)
                    with self.blocks(stage, (head.begin, head.end)) as block:
                        self._block(stage, head, block, part)
        f.ret()
        return f

    def _fill_table(self, table: Value, address: Callable[[Value, Value, Value], Value]) -> Value:
        """Store the addresses of the rows of all steps, given by time, sequence and index; return their number."""
        f = self.f
        index = f.var(0)
        with f.loop(self.first, self.last) as step:
            time = self.backward_time(step)
            with f.loop(0, self.active_rows(time)) as row:
                f.store(address(time, self.sequence(row), index.get()), table + index.get() * 8)
                index.set(index.get() + 1)
        return index.get()

    def _fill_row_values(self) -> None:
        """Draw the masks of all rows again, and copy moments from the reserve to their place after the gates."""
        if not self.cell.masks and not self.cell.reduces:
            return
        f, v, index = self.f, self.v, self.f.var(0)
        with f.loop(self.first, self.last) as step:
            time = self.backward_time(step)
            with f.loop(0, self.active_rows(time)) as row:
                sequence, gate_row = self.sequence(row), self.gates.address + index.get() * self.gates.stride
                self.draw_masks(gate_row, sequence, time)
                for leaf in moments(self.stages):
                    saved = self.saved_moments(time, sequence) + self.moment_offset(leaf)
                    v.store(v.broadcast(saved), self.moment(leaf, gate_row))
                index.set(index.get() + 1)

    def _input(self, time: Value, sequence: Value, index: Value) -> Value:
        """A row of the layer's input."""
        p = self.p
        source = p.x + time * p.x_step + sequence * p.x_row
        copy = self.scratch + self.c.masked_offset + index * self.c.masked_row
        return self.masked_input_row(source, copy, sequence, time)

    def _operand_of(self, stage: LoweredStage) -> Callable[[Value, Value, Value], Value]:
        """The rows of a later stage's operand, which the reserve holds for the same step."""
        return lambda time, sequence, index: self.saved_state(self.saved_operand(stage), time, sequence)

    def _h_before(self, time: Value, sequence: Value, index: Value) -> Value:
        """A row of h that a step started from."""
        return self.saved_state(self.p.saved_h, self.time_before(time, sequence), sequence)

    def _block(self, stage: LoweredStage, head: Head, block: tuple[Value, Value], a: LeftOperand) -> None:
        """The recurrent GEMM of a block of units of a head, then the values that forward would have saved."""
        f, v, p = self.f, self.v, self.p
        begin, end = (head.first + bound for bound in block)
        before = head.first * stage.num_gates
        row_bytes = self.blocking(stage).block_col_vecs * v.bytes
        with self.panels(block[0] * stage.num_gates, block[1] * stage.num_gates) as cols:
            all_cols = ColVecs(before + cols.first, cols.num)
            c, c_in = self.block_output(stage, all_cols, begin * stage.num_gates, self.gates, self.recurrent)
            weights = self.packed(self._gemm, p.forward_h_weights, self.gemm_k(stage), p.h_bias, stage, head)
            weights.gemm(a, cols, c, c_in)
        with f.loop(0, a.num_rows) as row, f.loop(begin, end) as unit_vec:
            recurrent = self.recurrent + row * row_bytes + (unit_vec - begin) * (stage.num_gates * v.bytes)
            gate_row = self.gates.address + row * self.gates.stride
            self._cell(CellPosition(stage, row, unit_vec, gate_row, recurrent))

    def _elementwise(self, num_rows: Value) -> None:
        """The saved values of the maths with which a step begins, if it does not begin with a GEMM."""
        f, stage = self.f, self.maths_stages[0]
        with f.loop(0, num_rows) as row, f.loop(self.hidden.first, self.hidden.last) as unit_vec:
            gate_row = self.gates.address + row * self.gates.stride
            self._cell(CellPosition(stage, row, unit_vec, gate_row, self.recurrent))

    def _cell(self, position: CellPosition) -> None:
        """The saved values of one vector of units of one row of the chunk."""
        v, p, (stage, row, unit_vec, *_) = self.v, self.p, position

        def load(leaf: Leaf) -> Value:
            if isinstance(leaf, State):
                # The saved states of a layer have the same strides, so their rows are as far apart as the arrays.
                base = self.saved_array(self.cell.states.index(leaf.name))
                state_row = self.f.load(self.state_table + row * 8) + (base - p.saved_h)
                return v.load(state_row + unit_vec * v.bytes, v.item)
            return self.load_leaf(leaf, position)

        products, results = stage.results_of(KeptProduct), dict(stage.recomputed)
        values = evaluate([*products.values(), *results.values()], load, v)
        for product, value in zip(products, values, strict=False):
            v.store(value, self.kept_product(product, position.gate_row, unit_vec))
        for saved, value in zip(results, values[len(products) :], strict=True):
            v.store(value, self.recomputed(row) + (unit_vec * self.num_saved + saved.index) * v.bytes)
