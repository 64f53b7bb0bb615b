"""A stage of a step: a GEMM or reductions, which need values of all units, or the maths before the first of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusedrnn.cell.expr import Expr, Leaf
from fusedrnn.cell.leaves import PreH, PreSum, Projected, RowMean, RowVariance
from fusedrnn.cell.reductions import Reduction


@dataclass(frozen=True)
class Stage:
    """One GEMM of a step, or reductions over the units; or neither.

    Attributes:
        operand: What a GEMM multiplies: the previous output, or a value that an earlier stage computes. In a stage of
            reductions, the first value that they read; in a stage of maths alone, the previous output.
        gates: The gates it computes, adjacent in the weights; none in a projection, and in stages without a GEMM.
        projects: Whether this is the projection, which has its own weights and gives :class:`Projected`.
        accumulates_in_place: Whether ``PreX`` and ``PreH`` of its gates are only ever added, so that a kernel can
            accumulate the recurrent product onto the input's.
        reductions: The means and variances that it computes instead of a GEMM.
        multiplies: Whether it has a GEMM. A stage that has neither a GEMM nor reductions is the first one: it computes
            values that the later stages read.
    """

    operand: Expr
    gates: tuple[str, ...]
    projects: bool = False
    accumulates_in_place: bool = False
    reductions: tuple[Reduction, ...] = ()
    multiplies: bool = True

    @property
    def values(self) -> tuple[Expr, ...]:
        """The values of all units that it reads: its operand, or all values that it reduces."""
        return tuple(value for reduction in self.reductions for value in reduction.values) or (self.operand,)

    def with_values(self, values: Sequence[Expr]) -> Stage:
        """The stage with these :attr:`values`."""
        rest = iter(values)
        reductions = tuple(replace(r, values=tuple(next(rest) for _ in r.values)) for r in self.reductions)
        return replace(self, operand=values[0], reductions=reductions)

    def computes(self, leaf: Leaf) -> bool:
        """Whether it computes that leaf."""
        if isinstance(leaf, Projected):
            return self.projects
        if isinstance(leaf, (RowMean, RowVariance)):
            return any(leaf in reduction.leaves for reduction in self.reductions)
        return isinstance(leaf, (PreH, PreSum)) and leaf.gate in self.gates
