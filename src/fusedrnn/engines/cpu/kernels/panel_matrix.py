"""The matrix B of a GEMM as an object: kernels say which columns to multiply, the matrix knows its own layout.

A :class:`Matrix` has one method, ``gemm``. Packed matrices are a :class:`PanelMatrix`, the caller's parameters an
:class:`UnpackedMatrix`; :class:`WeightMatrix` decides between the two at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fusedrnn.jit.builder import Declared, Operand, Value
from fusedrnn.jit.vector import Vectors


class LeftOperand(NamedTuple):
    """The matrix A."""

    address: Value  # of a table with the addresses of its rows, or of A itself if it is transposed
    num_rows: Value


class Rows(NamedTuple):
    """Rows of C or C_in, from the first of the multiplied columns on."""

    address: Value
    stride: Operand  # bytes; 0 repeats one row


class ColVecs(NamedTuple):
    """Adjacent vectors of columns, all of one panel."""

    first: Value
    num: Value


class Matrix(Protocol):
    """The right operand of a GEMM."""

    def gemm(self, a: LeftOperand, cols: ColVecs, c: Rows, c_in: Rows | None = None, next_panel: Operand = 1) -> None:
        """Emit ``c = c_in + a·B`` for some columns.

        Args:
            a: The left operand.
            cols: The columns of B.
            c: The result.
            c_in: The initial accumulators; None for the matrix's bias.
            next_panel: The distance, in panels, to the panel that is multiplied next; it is prefetched.
        """


@dataclass(frozen=True)
class PanelMatrix:
    """A matrix packed by panels of a few vectors of columns; a panel holds its groups of k one after the other."""

    v: Vectors
    panel_vectors: int
    slot_bytes: int  # of a group of a vector of columns
    function: Declared  # GEMM, GEMM_TN or GEMM_INT8
    base: Value
    k: Value  # groups
    bias: Value | None = None  # the address of a row: a vector for each vector of columns
    first_col_vec: Value | None = None  # the column that callers count from; it begins a panel
    scales: Value | None = None  # the address of the columns' scales: a vector for each vector of columns

    @property
    def group_bytes(self) -> int:
        """Bytes of a group of a panel."""
        return self.panel_vectors * self.slot_bytes

    def panel(self, index: Value) -> Panel:
        """The panel of that index."""
        return Panel(self, self.base + index * self.k * self.group_bytes)

    def at(self, col_vec: Value) -> Panel:
        """The panel of a vector of columns, from this vector on."""
        panel = self.panel(col_vec // self.panel_vectors)
        return Panel(self, panel.address + col_vec % self.panel_vectors * self.slot_bytes)

    def gemm(self, a: LeftOperand, cols: ColVecs, c: Rows, c_in: Rows | None = None, next_panel: Operand = 1) -> None:
        """Emit a GEMM; see :class:`Matrix`."""
        col_vec = cols.first if self.first_col_vec is None else self.first_col_vec + cols.first
        panel = self.at(col_vec)
        if c_in is None:
            assert self.bias is not None
            c_in = Rows(self.bias + col_vec * self.v.bytes, 0)
        scales = () if self.scales is None else (self.scales + col_vec * self.v.bytes,)
        panel.gemm(a, cols.num, c, c_in, panel.next(next_panel), *scales)


@dataclass(frozen=True)
class Panel:
    """A panel of a matrix, from one of its vectors of columns on."""

    matrix: PanelMatrix
    address: Value

    def next(self, panels: Operand = 1) -> Value:
        """The address of the same columns so many panels further on."""
        return self.address + self.matrix.k * panels * self.matrix.group_bytes

    def gemm(
        self, a: LeftOperand, num_col_vecs: Value, c: Rows, c_in: Rows, prefetch: Value, *scales: Value
    ) -> None:
        """Emit ``c = c_in + a·B`` for some vectors of this panel, and the prefetch of the operand needed next."""
        matrix, f = self.matrix, self.matrix.v.function
        operands = a.num_rows, num_col_vecs, a.address, self.address, matrix.k
        f.call(matrix.function, *operands, *c_in, *c, prefetch, *scales)


@dataclass(frozen=True)
class UnpackedMatrix:
    """The caller's weights, a row for each unit of each gate."""

    v: Vectors
    function: Declared  # UNPACKED_GEMM_NT or UNPACKED_GEMM_NN
    weights: Value
    row_size: Value  # elements
    hidden: Value
    gates: int
    scratch: Value  # for GEMMs of many rows
    bias: Value | None = None  # the address of the bias of ``first_col_vec`` and of the columns after it
    first_col_vec: Value | None = None

    def gemm(self, a: LeftOperand, cols: ColVecs, c: Rows, c_in: Rows | None = None, next_panel: Operand = 1) -> None:
        """Emit a GEMM; see :class:`Matrix`. It prefetches the weights of the next columns by itself."""
        if c_in is None:
            assert self.bias is not None and self.first_col_vec is not None
            c_in = Rows(self.bias + (cols.first - self.first_col_vec) * self.v.bytes, 0)
        b, columns = (self.weights, self.row_size), (cols.first, self.hidden, self.gates, self.scratch)
        self.v.function.call(self.function, a.num_rows, cols.num, a.address, *b, *c_in, *c, *columns)


@dataclass(frozen=True)
class WeightMatrix:
    """Weights that are unpacked in calls of few rows."""

    is_unpacked: Value
    unpacked: Callable[[], Matrix]  # makes the matrix inside its branch
    packed: Callable[[], Matrix]

    def gemm(self, a: LeftOperand, cols: ColVecs, c: Rows, c_in: Rows | None = None, next_panel: Operand = 1) -> None:
        """Emit both GEMMs and the choice between them; see :class:`Matrix`."""
        with self.is_unpacked.function.if_else(self.is_unpacked) as (unpacked, packed):
            with unpacked:
                self.unpacked().gemm(a, cols, c, c_in, next_panel)
            with packed:
                self.packed().gemm(a, cols, c, c_in, next_panel)
