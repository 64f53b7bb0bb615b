"""Block-diagonal recurrent weights: the units of a head are multiplied only with their part of an operand's row.

Each head has a matrix of its own, packed from a new panel on. Where weights are full, all units are one head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage
from fusedrnn.engines.cpu.kernels.panel_matrix import LeftOperand
from fusedrnn.engines.cpu.kernels.thread_share import ThreadShare
from fusedrnn.jit.builder import Value


class Head(NamedTuple):
    """A share of the units of a head, in unit vectors."""

    number: Value
    first: Value  # the unit vectors of all heads before
    begin: Value  # of the share, counted from the head's first
    end: Value


class HeadShare(ThreadShare):
    """A function of a thread's share of one layer-direction, whose recurrent weights may be block-diagonal."""

    scratch: Value  # this thread's

    @property
    def head_vecs(self) -> Value:
        """Unit vectors of a head."""
        return self.c.head_size // self.v.lanes

    @contextmanager
    def heads(self, first: Value, last: Value, reverse: Value | None = None) -> Iterator[Head]:
        """Loop over the heads of the unit vectors from ``first`` to before ``last``; in reverse from the last."""
        if not self.cell.is_block_diagonal:
            zero = self.f.constant(0)
            yield Head(zero, zero, first, last)
            return
        with self.parts_of_range(first, last, self.head_vecs, reverse) as (number, begin, end):
            before = number * self.head_vecs
            yield Head(number, before, begin - before, end - before)

    def part_of_rows(self, a: LeftOperand, offset: Value) -> LeftOperand:
        """The rows of a left operand from this byte on, those of a head."""
        f = self.f
        if not self.cell.is_block_diagonal:
            return a
        table = self.scratch + self.c.head_table_offset
        with f.loop(0, a.num_rows) as row:
            f.store(f.load(a.address + row * 8) + offset, table + row * 8)
        return LeftOperand(table, a.num_rows)

    def gemm_k(self, stage: LoweredStage) -> Value:
        """Elements of a stage's operand that a unit is multiplied with."""
        return self.c.head_size if self.cell.is_block_diagonal else self.operand_size(stage)

    def col_vecs_of_head(self, stage: LoweredStage) -> Value:
        """Vectors of columns of a head in the packed recurrent weights of a stage: whole panels."""
        return self.whole_panels(self.head_vecs * stage.num_gates)

    def whole_panels(self, vectors: Value) -> Value:
        """So many vectors, rounded up to whole panels."""
        width = self.panel_vectors
        return (vectors + (width - 1)) // width * width

    def col_vecs(self, stages: Sequence[LoweredStage], of_state: bool = False) -> Value:
        """Vectors of columns of these stages; each stage, and each head of recurrent weights, has whole panels."""
        total = self.f.constant(0)
        for stage in stages:
            if of_state and self.cell.is_block_diagonal:
                total = total + self.c.heads * self.col_vecs_of_head(stage)
            else:
                total = total + self.whole_panels(self.num_vectors(self.units_of(stage).size) * stage.num_gates)
        return total
