"""The GEMM micro-kernel: a few rows of A times a panel of packed B, accumulated in registers.

C[rows, vectors] = start[rows, vectors] + Σₖ A[rows, k]·B[k, vectors], each element summed over k in rising order by
one chain of fused multiply-adds. The chain is the same whatever the number of rows, so that the bits of a result do
not depend on which rows are computed together.
"""

from __future__ import annotations

from llvmlite import ir

from fusedrnn.codegen.build import Function, Value
from fusedrnn.codegen.target import Target
from fusedrnn.codegen.vector import Vectors

# Steps of k in one turn of the loop: the counting hides behind the multiplying.
_UNROLL = 8
# How far ahead of its use B is asked for into the first-level cache: it comes from the second.
_NEAR_BYTES = 1024
# The first tiles of a panel ask for a part each of the next panel into the second-level cache: it comes from afar.
_PARTS = 4
_CACHE_LINE = 64


def emit_tile(module: ir.Module, target: Target, dtype: str, rows: int) -> Function:
    """A function that multiplies and accumulates that many rows.

    Its arguments: A row addresses, B panel, K, start, bytes between start's rows, C, bytes between C's rows, and where
    to begin asking for this tile's part of the next panel.
    """
    names = ["a_rows", "b", "k", "start", "start_stride", "c", "c_stride", "next_b"]
    f = Function(module, f"tile{rows}", names)
    a_rows, b, k, start, start_stride, c, c_stride, next_b = f.arguments
    v = Vectors(f, target, dtype)
    vectors = target.tile[1]
    step = vectors * v.bytes
    a = [f.load(a_rows + 8 * i) for i in range(rows)]
    total = [[f.var(v.load(start + start_stride * i + j * v.bytes)) for j in range(vectors)] for i in range(rows)]

    def multiply(index: Value, ahead: int) -> None:
        here = b + index * step + ahead * step
        for line in range(-(-ahead * step // _CACHE_LINE), -(-(ahead + 1) * step // _CACHE_LINE)):
            f.prefetch(b + index * step + (_NEAR_BYTES + line * _CACHE_LINE))
        b_vectors = [v.load(here + j * v.bytes) for j in range(vectors)]
        for i in range(rows):
            scalar = v.broadcast(a[i] + index * v.item + ahead * v.item)
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
            v.store(total[i][j].get(), c + c_stride * i + j * v.bytes)
    f.done()
    return f


def emit_gemm(module: ir.Module, target: Target, dtype: str) -> Function:
    """A function of (count, then a tile's arguments but the last): one panel against any number of rows.

    Rows are cut into tiles whose sizes differ by at most one: a short last tile would leave the pipeline idle.
    """
    most = target.tile[0]
    tiles = [emit_tile(module, target, dtype, rows) for rows in range(1, most + 1)]
    f = Function(module, "gemm", ["count", "a_rows", "b", "k", "start", "start_stride", "c", "c_stride"])
    count, a_rows, b, k, start, start_stride, c, c_stride = f.arguments
    blocks = (count + (most - 1)) // most
    size = count // blocks
    larger = count - size * blocks
    panel = target.tile[1] * target.vector_bits // 8
    row = f.var(0)
    with f.loop(0, blocks) as block:
        rows = size + (block < larger).select(f.constant(1), 0)
        first = row.get()
        part = (block < _PARTS - 1).select(block, _PARTS - 1)
        next_b = b + k * panel + part * (k * panel // _PARTS)
        with f.switch(rows, range(1, most + 1)) as cases:
            for tile, case in zip(tiles, cases, strict=True):
                with case:
                    start_row, c_row = start + first * start_stride, c + first * c_stride
                    f.call(tile, a_rows + first * 8, b, k, start_row, start_stride, c_row, c_stride, next_b)
        row.set(first + rows)
    f.done()
    return f
