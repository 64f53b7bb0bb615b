"""The forward time loop in training: it also fills the reserve.

Every state, and the values that backward needs, go to the reserve. From there each layer reads its input, after
dropout: the states of the layer below, or its outputs if these are no states.

A store of a vector prefetches the place where the next step stores one.
"""

from __future__ import annotations

from fusedrnn.cell.cells import Variant
from fusedrnn.cell.leaves import KeptProduct, NewState, Output, ReducedRow, Saved, StageOperand
from fusedrnn.engines.cpu.kernels.forward import ForwardStep, Inference, OutputRows, build_job
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage, Result
from fusedrnn.engines.cpu.kernels.thread_share import Program
from fusedrnn.jit.builder import Module, Value
from fusedrnn.jit.target import Target


def build_training(variant: Variant, compute: str, target: Target) -> Module:
    """The module whose ``forward(call, thread)`` is the job of training."""
    program = Program.of("training", variant, compute, target)
    return build_job(program, _Training(program).emit())


class _Training(Inference):
    """Emits a thread's share of one layer-direction in training, which fills the reserve."""

    _result_kinds = (NewState, Output, StageOperand, ReducedRow, KeptProduct, Saved)
    draws_masks = True

    def _saved_arrays(self) -> OutputRows:
        """Where the reserve holds the states of this layer-direction, and the operands of later stages."""
        results: list[Result] = [*map(NewState, self.cell.states)]
        results += [StageOperand(stage.index) for stage in self.later_gemm_stages]
        return {result: self.saved_array(number) for number, result in enumerate(results)}

    def save_initial(self, name: str, row: Value, sequence: Value, source: Value) -> None:
        """Save an initial state as the state of the time before the row's first."""
        time = self.p.reverse.is_zero.select(self.f.constant(-1), self.length(row))
        units = self.units_of_state(name)
        into = self.saved_state(self._saved_arrays()[NewState(name)], time, sequence) + units.offset
        self.f.copy(into, source, units.num_bytes)

    def save_resets(self, sequence: Value) -> None:
        """Save what replaces the states of a sequence as those of time T + 1."""
        f, c = self.f, self.c
        with f.if_(c.resets.is_set):
            for name, reset_state in self.state_fields("{}_reset"):
                saved = self.saved_state(self._saved_arrays()[NewState(name)], c.steps + 1, sequence)
                into = saved + self.units_of_state(name).offset
                self.load_state(name, reset_state, sequence, into)

    def _input_row(self, source: Value, time: Value, sequence: Value, index: Value) -> Value:
        """Save the network's input; apply dropout to what a layer reads from the one below."""
        f, c, p = self.f, self.c, self.p
        with f.if_(p.x_copy.is_set):
            begin, end = (p.k * group // c.grid_units * self.v.item for group in (self.unit_group, self.unit_group + 1))
            copy = p.x_copy + (time * c.batch + sequence) * p.k * self.v.item
            f.copy(copy + begin, source + begin, end - begin)
        into = self.scratch + c.masked_offset + index * c.masked_row
        return self.masked_input_row(source, into, sequence, time)

    def _output_rows(self, position: ForwardStep, row: Value) -> OutputRows:
        time, sequence = position.time, self.sequence(row)
        states = {result: self.saved_state(base, time, sequence) for result, base in self._saved_arrays().items()}
        offset = time * self.c.saved_values_step + sequence * self.c.saved_values_row
        rows = {**super()._output_rows(position, row), "saved": self.p.saved_values + offset, **states}
        return {**rows, "moments": self.p.moments + offset} if self.cell.reduces else rows

    def _store_result(
        self, stage: LoweredStage, result: Result, value: Value, unit_vec: Value, output_rows: OutputRows
    ) -> None:
        f, v, num_saved = self.f, self.v, len(self.derivative.saved)
        if isinstance(result, Saved):
            with f.if_(self.p.saved_values.is_set):
                into = output_rows["saved"] + (unit_vec * num_saved + result.index) * v.bytes
                v.store(value, into)
                self.prefetch_next(into, self.c.saved_values_step)
            return
        if isinstance(result, (KeptProduct, ReducedRow)):
            return
        if not isinstance(result, Output):
            into = output_rows[result] + unit_vec * v.bytes
            self.store_tail(value, unit_vec, into, self.units_of(stage).size)
            self.prefetch_next(into, self.c.saved_state_step)
        if result == self.output_result:
            with f.if_(self.p.y.is_set):
                self.store_output(value, unit_vec, output_rows["y"], output_rows.get("x"))
                self.prefetch_next(output_rows["y"] + unit_vec * v.bytes, self.p.y_step)
