"""The gradients of biases and of a cell's own parameters: sums of gate gradients over all rows of a block of steps."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

from fusedrnn.cell.leaves import ParamScalar, ParamVector
from fusedrnn.engines.cpu.kernels.backward_emitter import BackwardEmitter
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage
from fusedrnn.engines.cpu.kernels.thread_share import Program
from fusedrnn.jit.builder import Function, Value


class Share(NamedTuple):
    """A thread's share of the units of a stage."""

    first: Value
    last: Value  # past its last vector of units
    size: Value  # the units of all threads


class ParameterSums(BackwardEmitter):
    """A function of (a layer-direction's arguments, first step, last step, their rows, earlier rows)."""

    def __init__(self, program: Program, store_or_add: Function) -> None:
        super().__init__(program, "weight_gradients", ("first", "last", "rows_in_block", "rows_before"))
        self.store_or_add = store_or_add
        f, c = self.f, self.c
        self.first, self.last, self.num_rows, self.rows_before = f.arguments[4:]
        self.is_first_block, self.is_last_block = self.first.is_zero, self.last.equals(c.steps)
        thread = self.row_group * c.grid_units + self.unit_group
        self.hidden_share = self._share(c.weight_starts, thread, c.hidden)
        self.out_share = self._share(c.out_weight_starts, thread, c.out) if self.cell.projects else self.hidden_share

    def _share(self, starts: Value, thread: Value, size: Value) -> Share:
        first, last = (self.f.load(starts + thread * 8 + end) for end in (0, 8))
        return Share(first, last, size)

    @property
    def summed_stages(self) -> list[LoweredStage]:
        """What has gradients of biases or of the cell's own parameters."""
        return [stage for stage in self.column_groups if not stage.projects]

    def bias_sums(self, stage: LoweredStage, unit_vec: Value) -> Value:
        """The sums of a stage's distinct gradients for a vector of units."""
        return self.group + self.c.sums_offset + self.grad_index(stage, unit_vec, 0) * self.v.bytes

    def add_bias_sums(self, stage: LoweredStage) -> None:
        """Add up transposed gradients over the rows: the gradients of biases and parameters."""
        f, c, v = self.f, self.c, self.v
        with f.loop(*self.hidden_share[:2]) as unit_vec:
            address = self.bias_sums(stage, unit_vec)
            sums = [f.var(v.load(address + grad * v.bytes)) for grad in range(stage.num_grads)]
            source = self.transposed + self.grad_index(stage, unit_vec, 0) * c.transposed_stride
            with f.loop(0, self.num_rows) as row:
                for grad, total in enumerate(sums):
                    total.set(total.get() + v.load(source + c.transposed_stride * grad + row * v.bytes))
            for grad, total in enumerate(sums):
                v.store(total.get(), address + grad * v.bytes)

    def bias_grads(self, stage: LoweredStage) -> Iterator[tuple[Value, int, int]]:
        """For each sum of a vector of units: the array that it goes to, the part of it, the distinct gradient."""
        p, derivative = self.p, stage.derivative
        for gate, grad in enumerate(derivative.x_grads):
            yield p.d_x_bias, stage.first_x_gate + gate, grad
        if not stage.projects:
            for gate, grad in enumerate(derivative.h_grads):
                yield p.d_h_bias, stage.first_h_gate + gate, grad
        for leaf, grad in derivative.param_grads.items():
            if isinstance(leaf, ParamVector):
                yield p.d_param_vectors, self.cell.param_vectors.index(leaf.name), grad

    def store_scalar_sums(self, stage: LoweredStage) -> None:
        """Give the gradients of scalars to the caller: sums over all units, which the first thread computes."""
        f, c, v, p = self.f, self.c, self.v, self.p
        grads = {leaf: grad for leaf, grad in stage.derivative.param_grads.items() if isinstance(leaf, ParamScalar)}
        if not grads:
            return
        is_last_of_first = self.is_last_block & self.row_group.is_zero & self.unit_group.is_zero
        with f.if_(p.d_param_scalars.is_set & is_last_of_first):
            for leaf, grad in grads.items():
                total = f.var(v.const(0.0))
                with f.loop(0, self.unit_vecs) as unit_vec:
                    total.set(total.get() + v.load(self.bias_sums(stage, unit_vec) + grad * v.bytes))
                v.store(v.reduce(total.get(), operator.add), self.panel)
                into = p.d_param_scalars + self.cell.param_scalars.index(leaf.name) * v.item
                f.call(self.store_or_add, self.panel, into, 1, c.add_params)
