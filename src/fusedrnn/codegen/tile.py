"""The GEMM micro-kernel: a few rows of A times a panel of packed B, accumulated in registers.

C[rows, vectors] = start[rows, vectors] + Σₖ A[rows, k]·B[k, vectors], each element summed over k in rising order by
one chain of fused multiply-adds. The chain is the same whatever the number of rows, so that the bits of a result do
not depend on which rows are computed together.

A is either given by its rows, each with its k side by side, or *upright*: the rows of a vector's lanes side by side,
one vector for each k. Upright is how backward leaves gradients for a GEMM that sums over rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

from fusedrnn.codegen.build import Function, Value
from fusedrnn.codegen.target import ITEM_SIZE, Target
from fusedrnn.codegen.vector import Vectors

# Steps of k in one turn of the loop: the counting hides behind the multiplying.
_UNROLL = 8
# How far ahead of its use B is asked for into the first-level cache: it comes from the second.
_NEAR_BYTES = 1024
# The first tiles of a panel ask for a part each of the next panel into the second-level cache: it comes from afar.
_PARTS = 4
_CACHE_LINE = 64


def emit_tile(module: ir.Module, target: Target, dtype: str, rows: int, upright: bool = False) -> Function:
    """A function that multiplies and accumulates that many rows.

    Its arguments: A (the addresses of its rows, or itself if upright), B panel, K, start, bytes between start's rows,
    C, bytes between C's rows, and where to begin asking for this tile's part of what is needed next.
    """
    names = ["a", "b", "k", "start", "start_stride", "c", "c_stride", "ahead"]
    f = Function(module, f"{'upright' if upright else 'tile'}{rows}", names)
    a_rows, b, k, start, start_stride, c, c_stride, next_b = f.arguments
    v = Vectors(f, target, dtype)
    vectors = target.tile[1]
    step = vectors * v.bytes
    a_step = v.bytes if upright else v.item
    a = [a_rows + v.item * i if upright else f.load(a_rows + 8 * i) for i in range(rows)]
    # The gradients of weights may go where the caller wants them, which need not be aligned.
    align = v.item if upright else v.bytes
    places = [[start_stride * i + j * v.bytes for j in range(vectors)] for i in range(rows)]
    total = [[f.var(v.load(start + place, align)) for place in row] for row in places]

    def multiply(index: Value, ahead: int) -> None:
        here = b + index * step + ahead * step
        for line in range(-(-ahead * step // _CACHE_LINE), -(-(ahead + 1) * step // _CACHE_LINE)):
            f.prefetch(b + index * step + (_NEAR_BYTES + line * _CACHE_LINE))
        b_vectors = [v.load(here + j * v.bytes) for j in range(vectors)]
        for i in range(rows):
            scalar = v.broadcast(a[i] + index * a_step + ahead * a_step)
            for j in range(vectors):
                total[i][j].set(v.fma(scalar, b_vectors[j], total[i][j].get()))

    even = k - k % _UNROLL
    lines = -(-_UNROLL * step // (_CACHE_LINE * _PARTS))
    with f.loop(0, even, _UNROLL) as index:
        for line in range(lines):
            f.prefetch(next_b + index * (lines * _CACHE_LINE // _UNROLL) + line * _CACHE_LINE, cache=2)
        for ahead in range(_UNROLL):
            multiply(index, ahead)
    with f.loop(even, k) as index:
        multiply(index, 0)
    for i in range(rows):
        for j in range(vectors):
            v.store(total[i][j].get(), c + c_stride * i + j * v.bytes, align)
    f.done()
    return f


def emit_gemm(module: ir.Module, target: Target, dtype: str) -> Function:
    """A function of (count, then a tile's arguments but the last): one panel against any number of rows.

    The first tiles ask for the next panel, which lies behind this one.
    """
    made = [emit_tile(module, target, dtype, rows) for rows in range(1, target.tile[0] + 1)]
    f = Function(module, "gemm", ["count", "a_rows", "b", "k", "start", "start_stride", "c", "c_stride"])
    count, a_rows, b, k, start, start_stride, c, c_stride = f.arguments
    size = k * (target.tile[1] * target.vector_bits // 8)
    with tiles(f, made, count) as (block, first, tile):
        part = (block < _PARTS - 1).select(block, _PARTS - 1)
        ahead = b + size + part * (size // _PARTS)
        start_row, c_row = start + first * start_stride, c + first * c_stride
        tile(a_rows + first * 8, b, k, start_row, start_stride, c_row, c_stride, ahead)
    f.done()
    return f


def emit_upright_gemm(module: ir.Module, target: Target, dtype: str) -> Function:
    """The same for an upright A of at most a vector's lanes; its last argument says what is needed next."""
    made = [emit_tile(module, target, dtype, rows, upright=True) for rows in range(1, target.tile[0] + 1)]
    f = Function(module, "upright", ["count", "a", "b", "k", "start", "start_stride", "c", "c_stride", "ahead"])
    count, a, b, k, start, start_stride, c, c_stride, ahead = f.arguments
    part = k * (target.tile[1] * target.vector_bits // 8) // _PARTS
    item = ITEM_SIZE[dtype]
    with tiles(f, made, count) as (block, first, tile):
        start_row, c_row = start + first * start_stride, c + first * c_stride
        tile(a + first * item, b, k, start_row, start_stride, c_row, c_stride, ahead + block * part)
    f.done()
    return f


@contextmanager
def tiles(f: Function, made: Sequence[Function], count: Value) -> Iterator[tuple[Value, Value, Callable[..., None]]]:
    """Cut rows into tiles whose sizes differ by at most one: a short last one would leave the pipeline idle.

    Yields a tile's number, its first row, and what calls the tile of its size.
    """
    most = len(made)
    blocks = (count + (most - 1)) // most
    size = count // blocks
    larger = count - size * blocks
    row = f.var(0)
    with f.loop(0, blocks) as block:
        rows = size + (block < larger).select(f.constant(1), 0)

        def call(*arguments: Value) -> None:
            with f.switch(rows, range(1, most + 1)) as cases:
                for tile, case in zip(made, cases, strict=True):
                    with case:
                        f.call(tile, *arguments)

        yield block, row.get(), call
        row.set(row.get() + rows)
