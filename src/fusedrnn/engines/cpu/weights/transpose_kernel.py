"""Machine code that transposes blocks of matrices between buffers: frameworks keep weights in either order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fusedrnn.jit.builder import Function, Module, Value
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import function, load, load_once
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors


class Block(NamedTuple):
    """A block to transpose: element [row, column] of the source becomes [column, row] of the destination.

    Attributes:
        source, dest: Numbers of buffers.
        source_offset, dest_offset: Where the block begins in them, in bytes.
        source_stride, dest_stride: Bytes from one row of each to the next; their columns are contiguous.
        rows, columns: The size of the block in the source.
    """

    source: int
    source_offset: int
    source_stride: int
    dest: int
    dest_offset: int
    dest_stride: int
    rows: int
    columns: int


BLOCK = Struct(*Block._fields)
CALL = Struct("blocks", "num_blocks")


class TransposeCall:
    """The transposes of some blocks; any number of threads may run it at once.

    Attributes:
        address: The address of the call, for :func:`load_transpose`.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = np.array(blocks, np.int64).reshape(-1, len(BLOCK))
        self._call = np.array([self._blocks.ctypes.data, len(blocks)], np.int64)
        self.address: int = self._call.ctypes.data


@load_once(4)
def load_transpose(dtype: str) -> Callable[..., int]:
    """The function ``transpose(call, buffers)``, which returns 0.

    Its arguments are the address of a :class:`TransposeCall`, and that of the addresses of its buffers.
    """
    target = current_target()
    return function(load(f"transpose_{dtype}", target, build_transpose, dtype, target), "transpose", 2, returns=True)


def build_transpose(dtype: str, target: Target) -> Module:
    """The module of ``transpose(call, buffers)`` for elements of that dtype."""
    module = Module(f"transpose_{dtype}")
    transpose_block = _emit_transpose_block(module, dtype, target)
    f = Function(module, "transpose", ["call", "buffers"], exported=True, returns=True)
    call, buffers = f.arguments
    c = CALL.read(f, call)
    with f.loop(0, c.num_blocks) as number:
        b = BLOCK.read(f, c.blocks + number * BLOCK.size)
        source = f.load(buffers + b.source * 8) + b.source_offset
        dest = f.load(buffers + b.dest * 8) + b.dest_offset
        f.call(transpose_block, source, b.source_stride, dest, b.dest_stride, b.rows, b.columns)
    f.ret(f.constant(0))
    return module


def _emit_transpose_block(module: Module, dtype: str, target: Target) -> Function:
    names = "source", "source_stride", "dest", "dest_stride", "rows", "columns"
    f = Function(module, "transpose_block", names)
    source, source_stride, dest, dest_stride, rows, columns = f.arguments
    v = Vectors(f, target, dtype)
    is_row = rows.equals(1) & dest_stride.equals(v.item)
    is_column = columns.equals(1) & source_stride.equals(v.item)
    with f.if_else(is_row | is_column) as (vector, matrix):
        with vector:
            f.copy(dest, source, rows * columns * v.item)
        with matrix:
            _transpose_matrix(f, v)
    f.ret()
    return f


def _transpose_matrix(f: Function, v: Vectors) -> None:
    """Transpose whole squares in registers, and the elements outside of squares one by one."""
    source, source_stride, dest, dest_stride, rows, columns = f.arguments

    def copy(first_row: Value, end_row: Value, first_column: Value, end_column: Value) -> None:
        with f.loop(first_row, end_row) as row, f.loop(first_column, end_column) as column:
            element = f.load(source + row * source_stride + column * v.item, v.format.scalar, v.item)
            f.store(element, dest + column * dest_stride + row * v.item, v.item)

    zero = f.constant(0)
    whole_rows, whole_columns = rows - rows % v.lanes, columns - columns % v.lanes
    with f.loop(0, whole_rows, v.lanes) as row, f.loop(0, whole_columns, v.lanes) as column:
        corner = source + row * source_stride + column * v.item
        square = v.transpose_square([corner + source_stride * lane for lane in range(v.lanes)])
        for lane, vector in enumerate(square):
            v.store(vector, dest + (column + lane) * dest_stride + row * v.item, v.item)
    copy(zero, whole_rows, whole_columns, columns)
    copy(whole_rows, rows, zero, columns)
