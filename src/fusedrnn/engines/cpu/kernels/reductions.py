"""A stage of reductions in forward: means and variances of rows that all threads have stored in the stage before."""

from __future__ import annotations

from fusedrnn.cell.leaves import ReducedRow, RowMean, RowVariance
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage, reduced_rows
from fusedrnn.engines.cpu.kernels.row_moments import moments_of
from fusedrnn.engines.cpu.kernels.states import StateEmitter
from fusedrnn.jit.builder import Value


class Reductions(StateEmitter):
    """A function of a thread's share of one layer-direction that reduces rows over all units."""

    def reduced_row(self, leaf: ReducedRow, row: Value) -> Value:
        """This thread's row of a value that is reduced, after the operands of later stages."""
        c = self.c
        number = len(self.later_gemm_stages) + reduced_rows(self.stages).index(leaf)
        return self.states + c.operands_offset + (row + c.batch * number) * c.state_stride

    def reduce(self, stage: LoweredStage, row: Value, gate_row: Value, saved: Value | None) -> None:
        """Compute the moments of a row, and store them with its gates; also at ``saved`` in the reserve, if given."""
        first = 0
        for reduction in stage.reductions:
            last = first + len(reduction.values)
            rows = [self.reduced_row(ReducedRow(stage.index, number), row) for number in range(first, last)]
            first = last
            for leaf, value in zip(reduction.leaves, moments_of(self, reduction, rows), strict=True):
                self.v.store(value, self.moment(leaf, gate_row))
                if saved is not None:
                    self._save(leaf, value, saved)

    def _save(self, leaf: RowMean | RowVariance, value: Value, saved: Value) -> None:
        with self.f.if_(self.unit_group.is_zero):
            self.v.store_first(value, saved + self.moment_offset(leaf))
