"""A stage of a step: what needs values of all units before the maths goes on; and the maths before the first one."""

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
        operand: What it multiplies: the previous output, or a value that an earlier stage computes. Of reductions the
            first value that they read; of maths alone the previous output.
        gates: The gates it computes, adjacent in the weights; none in the projection, of reductions, and of maths.
        projects: Whether this is the projection, which has its own weights and gives :class:`Projected`.
        accumulates_in_place: Whether ``PreX`` and ``PreH`` of its gates are only ever added, so that a kernel can
            accumulate the recurrent product onto the input's.
        reductions: The means and variances that it computes instead of a GEMM.
        multiplies: Whether it has a GEMM. A stage that has neither is the first one: the maths that what later ones
            read is computed by.
    """

    operand: Expr
    gates: tuple[str, ...]
    projects: bool = False
    accumulates_in_place: bool = False
    reductions: tuple[Reduction, ...] = ()
    multiplies: bool = True

    @property
    def values(self) -> tuple[Expr, ...]:
        """What it reads of all units: its operand, or all that it reduces."""
        return tuple(value for reduction in self.reductions for value in reduction.values) or (self.operand,)

    def with_values(self, values: Sequence[Expr]) -> Stage:
        """The stage with these :attr:`values`."""
        rest = iter(values)
        reductions = tuple(replace(r, values=tuple(next(rest) for _ in r.values)) for r in self.reductions)
        return replace(self, operand=values[0], reductions=reductions)

    def computes(self, leaf: Leaf) -> bool:
        """Whether it gives that leaf."""
        if isinstance(leaf, Projected):
            return self.projects
        if isinstance(leaf, (RowMean, RowVariance)):
            return any(leaf in reduction.leaves for reduction in self.reductions)
        return isinstance(leaf, (PreH, PreSum)) and leaf.gate in self.gates
