"""The gradients of means and variances in backward: what each unit adds to them, and the mean of that over units."""

from __future__ import annotations

from collections.abc import Sequence

from fusedrnn.cell.leaves import MeanCotangent, RowMean, RowVariance, VarianceCotangent
from fusedrnn.engines.cpu.kernels.backward_emitter import BackwardEmitter
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage, moments
from fusedrnn.engines.cpu.kernels.row_moments import row_mean
from fusedrnn.jit.builder import Value


class MomentGradients(BackwardEmitter):
    """A function of backward that takes gradients back through reductions over the units of a row."""

    def moment_row(self, leaf: RowMean | RowVariance, row: Value) -> Value:
        """This thread's row of what units add to a gradient, after the gradients of operands."""
        c = self.c
        number = len(self.later_gemm_stages) + moments(self.stages).index(leaf)
        return self.group + c.operands_offset + (c.batch * number + self.first_row + row) * c.carried_stride

    def moment_grad(self, leaf: RowMean | RowVariance, row: Value) -> Value:
        """Where the gradient of a mean or a variance of this thread's row is, divided by how many values it reduces."""
        leaves = moments(self.stages)
        vector = row * len(leaves) + leaves.index(leaf)
        return self.scratch + self.c.moments_offset + vector * self.v.bytes

    def load_moment(self, leaf: RowMean | RowVariance, saved: Value) -> Value:
        """A mean or a variance in every lane, from those of a row in the reserve."""
        return self.v.broadcast(saved + self.moment_offset(leaf))

    def load_moment_grad(self, leaf: MeanCotangent | VarianceCotangent, row: Value) -> Value:
        """The gradient of a mean or a variance of a row in every lane, divided by how many values it reduces."""
        kind = RowMean if isinstance(leaf, MeanCotangent) else RowVariance
        return self.v.load(self.moment_grad(kind(leaf.stage, leaf.index), row))

    def store_moment_grads(self, stage: LoweredStage, row: Value, unit_vec: Value, values: Sequence[Value]) -> None:
        """Store what a vector of units adds to the gradients of a stage's moments."""
        leaves = [leaf for reduction in stage.reductions for leaf in reduction.leaves]
        for leaf, value in zip(leaves, values, strict=True):
            self.v.store(value, self.moment_row(leaf, row) + unit_vec * self.v.bytes)

    def reduce_moment_grads(self, stage: LoweredStage, num_rows: Value) -> None:
        """Compute the gradients of a stage's moments from what all units add to them."""
        v = self.v
        with self.f.loop(0, num_rows) as row:
            for reduction in stage.reductions:
                for leaf in reduction.leaves:
                    mean = row_mean(self, [self.moment_row(leaf, row)])
                    v.store(mean * (1 / len(reduction.values)), self.moment_grad(leaf, row))
