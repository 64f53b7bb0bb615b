"""The gradients of weights and biases: GEMMs that sum over all rows of a block of steps.

A is the transposed gate gradients; B is the layer's input or its previous h, packed by panels. Each thread computes the
rows of its share of the units, whichever thread stored their gate gradients, and adds block after block in scratch.
Every element is one chain of multiply-adds over all steps, from the last to the first, for any blocks and any threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fusedrnn.engines.cpu.kernels.gemm import GEMM_TN
from fusedrnn.engines.cpu.kernels.gradient_operands import GradientOperands, GroupRange, Weights
from fusedrnn.engines.cpu.kernels.heads import Head
from fusedrnn.engines.cpu.kernels.panel_matrix import LeftOperand, PanelMatrix, Rows
from fusedrnn.engines.cpu.kernels.thread_share import Program
from fusedrnn.jit.builder import Declared, Function, Value
from fusedrnn.jit.sync import BARRIER_BYTES


class WeightGrad(NamedTuple):
    """The gradient of a matrix of weights."""

    address: Value  # of the caller's array; 0 if not requested
    num_cols: Value
    first_panel: Value  # in a row of sums


class WeightGradients(GradientOperands):
    """Emits a function of (a layer-direction's arguments, first step, last step, their rows, earlier rows).

    With the last block, the sums go to the caller.
    """

    def __init__(self, program: Program, store_or_add: Function) -> None:
        super().__init__(program, store_or_add)
        self._gemm = Declared(program.module, GEMM_TN)
        self.packed_panels = self.scratch + self.c.packed_offset
        self.x_panels = self._num_panels(self.p.k)

    def _num_panels(self, num_cols: Value) -> Value:
        return (num_cols + (self.panel_features - 1)) // self.panel_features

    def emit(self) -> Function:
        """Emit the function."""
        f, c = self.f, self.c
        # If this is the only block, and the caller's array is not added to, sums of whole panels go directly there.
        only_block = self.is_first_block & self.is_last_block
        self.write_direct = only_block & (self.num_rows > 0) & c.add_params.is_zero
        self._direction_barrier()
        self.store_row_positions()
        self._clear_sums()
        for stage in self.summed_stages:
            self.add_bias_sums(stage)
        if self.joins_rows:
            for stage in self.column_groups:
                self.join_gradients(stage)
        num_groups = self.row_groups.count
        with f.loop(0, num_groups, c.inner) as begin:
            end = (begin + c.inner).at_most(num_groups)
            accumulate = begin.is_set | self.is_first_block.is_zero
            for weights in (weights for stage in self.column_groups for weights in self.weights_of(stage)):
                with f.if_(self._weight_grad(weights).address.is_set):
                    self._multiply(weights, GroupRange(begin, end, accumulate))
        if self.first_row_number:
            self.keep_rest()
        with f.if_(self.is_last_block):
            self._store_sums()
        self._direction_barrier()
        for stage in self.summed_stages:
            self.store_scalar_sums(stage)
        f.ret()
        return f

    def _direction_barrier(self) -> None:
        """Wait for the threads of the direction group: they divide weights' gradients differently from steps."""
        f, c = self.f, self.c
        with f.if_(c.grid_rows * c.grid_units > 1):
            index = 1 + c.grid_layer_dirs * c.grid_rows + self.layer_dir_group
            f.call(self._barrier, c.barriers + index * BARRIER_BYTES, c.grid_rows * c.grid_units, c.spins)

    def _clear_sums(self) -> None:
        """Clear the sums before the first block; sums of weights only if no GEMM of the block writes them."""
        f = self.f
        with f.if_(self.is_first_block):
            for stage in self.summed_stages:
                begin, end = (self.bias_sums(stage, unit_vec) for unit_vec in self.hidden_share[:2])
                f.fill_zero(begin, end - begin)
        with f.if_(self.row_groups.count.is_zero & self.is_first_block):
            for stage in self.column_groups:
                first, last, _ = self.share_of(stage)
                size = (last - first) * (stage.num_gates * self.v.lanes) * self.c.weights_stride
                of_gate = {weights.first_gate: weights for weights in self.weights_of(stage)}
                for weights in of_gate.values():
                    f.fill_zero(self._weight_sums(weights, first, 0), size)

    def _multiply(self, weights: Weights, groups: GroupRange) -> None:
        """Add the products of some groups of the block to the gradient of a matrix."""
        f, c, stage = self.f, self.c, weights.stage
        num_panels = self._num_panels(self._weight_grad(weights).num_cols)
        k = groups.end - groups.begin
        panel_size = k * self.panel_bytes
        b = PanelMatrix(self.v, self.panel_vectors, self.v.bytes, self._gemm, self.packed_panels, k)
        with self._heads_of(weights) as head, f.loop(0, num_panels, c.packed_panels) as first:
            last = (first + c.packed_panels).at_most(num_panels)
            with f.loop(first, last) as panel:
                into = self.packed_panels + (panel - first) * panel_size
                self.pack(weights, groups, head.first * self.v.lanes + panel * self.panel_features, into)
            with f.loop(head.first + head.begin, head.first + head.end) as unit_vec:
                for gate, grad in enumerate(weights.grads):
                    a = self.groups(stage, unit_vec, grad) + groups.begin * self.v.bytes
                    self._multiply_gate(weights, unit_vec, gate, a, b, (first, last), groups.accumulate)

    @contextmanager
    def _heads_of(self, weights: Weights) -> Iterator[Head]:
        """The heads of this thread's share of recurrent weights; all units of other weights, as one head."""
        share = self.share_of(weights.stage)
        if weights.of_state:
            with self.heads(share.first, share.last) as head:
                yield head
        else:
            zero = self.f.constant(0)
            yield Head(zero, zero, share.first, share.last)

    def _multiply_gate(
        self, weights: Weights, unit_vec: Value, gate: int, a: Value, b: PanelMatrix, panels: tuple[Value, Value],
        accumulate: Value,
    ) -> None:  # fmt: skip
        """The GEMM of a vector of units of one gate and the packed panels."""
        f, c, v, stage, (first, last) = self.f, self.c, self.v, weights.stage, panels
        size = self.share_of(stage).size
        left = LeftOperand(a, (size - unit_vec * v.lanes).at_most(v.lanes))
        # The tiles of the first panel prefetch the gradients needed next; B is in cache.
        next_a = a + c.transposed_stride
        array, num_cols, first_panel = self._weight_grad(weights)
        sums = self._weight_sums(weights, unit_vec, gate) + first_panel * self.panel_bytes
        array_row = array + self._first_row(weights, unit_vec, gate) * num_cols * v.item
        direct_panels = self.write_direct.select(num_cols // self.panel_features, 0)
        with f.loop(first, last) as panel:
            offset = panel * self.panel_bytes
            is_direct = panel < direct_panels
            into = is_direct.select(array_row, sums) + offset
            stride = is_direct.select(num_cols * v.item, c.weights_stride)
            c_in = Rows(accumulate.select(into, self.zeros), accumulate.select(stride, 0))
            prefetch = panel.equals(first).select(next_a, a)
            num_col_vecs = (self.num_vectors(num_cols) - panel * self.panel_vectors).at_most(self.panel_vectors)
            b.panel(panel - first).gemm(left, num_col_vecs, Rows(into, stride), c_in, prefetch)

    def _first_row(self, weights: Weights, unit_vec: Value, gate: int) -> Value:
        """The row of the caller's array of a vector of units of a gate."""
        stage = weights.stage
        first_gate = 0 if stage.projects else weights.first_gate + gate
        return self.share_of(stage).size * first_gate + unit_vec * self.v.lanes

    def _weight_grad(self, weights: Weights) -> WeightGrad:
        """The gradient of a stage's projection, recurrent weights or input weights."""
        p, stage = self.p, weights.stage
        if stage.projects:
            return WeightGrad(p.d_projection, self.operand_size(stage), self.f.constant(0))
        if weights.of_state:
            return WeightGrad(p.d_h_weights, self.gemm_k(stage), self.x_panels)
        return WeightGrad(p.d_x_weights, p.k, self.f.constant(0))

    def _weight_sums(self, weights: Weights, unit_vec: Value, gate: int) -> Value:
        """The sums of a vector of units of a gate: a row for each unit, with input columns, then recurrent ones."""
        c, v = self.c, self.v
        index = self.unit_vecs * weights.first_gate + unit_vec * weights.stage.num_gates + gate
        return self.group + c.weights_offset + index * (v.lanes * c.weights_stride)

    def _store_sums(self) -> None:
        """Give the sums to the caller."""
        f, c, v = self.f, self.c, self.v
        for stage in self.column_groups:
            first, last, size = self.share_of(stage)
            with f.loop(first, last) as unit_vec:
                num_units = (size - unit_vec * v.lanes).at_most(v.lanes)
                for gate in range(stage.num_gates):
                    for weights in self.weights_of(stage):
                        self._store_weight_sums(weights, unit_vec, gate, num_units)
                for array, index, grad in self.bias_grads(stage):
                    with f.if_(array.is_set):
                        source = self.bias_sums(stage, unit_vec) + grad * v.bytes
                        into = array + (size * index + unit_vec * v.lanes) * v.item
                        f.call(self.store_or_add, source, into, num_units, c.add_params)

    def _store_weight_sums(self, weights: Weights, unit_vec: Value, gate: int, num_units: Value) -> None:
        """Store the rows of sums of a vector of units, except the panels that the GEMM wrote directly."""
        f, c, v = self.f, self.c, self.v
        array, num_cols, first_panel = self._weight_grad(weights)
        direct_panels = self.write_direct.select(num_cols // self.panel_features, 0)
        cols_left = num_cols - direct_panels * self.panel_features
        with f.if_(array.is_set & (cols_left > 0)), f.loop(0, num_units) as lane:
            sums = self._weight_sums(weights, unit_vec, gate) + lane * c.weights_stride
            row = self._first_row(weights, unit_vec, gate) + lane
            into = array + row * num_cols * v.item + direct_panels * self.panel_bytes
            source = sums + (first_panel + direct_panels) * self.panel_bytes
            f.call(self.store_or_add, source, into, cols_left, c.add_params)
