"""The GEMM micro-kernel: a few rows of A times some vectors of a panel of packed B, accumulated in registers.

C[rows, vectors] = start[rows, vectors] + Σₖ A[rows, k]·B[k, vectors], each element summed over k in rising order by
one chain of fused multiply-adds. The chain is the same whatever the tile, so that the bits of a result do not depend
on which rows and which vectors are computed together.

A is either given by its rows, each with its k side by side, or *upright*: the rows of a vector's lanes side by side,
one vector for each k. Upright is how backward leaves gradients for a GEMM that sums over rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fusedrnn.jit.builder import Function, Module, Signature, Value
from fusedrnn.jit.target import ITEM_SIZE, Target
from fusedrnn.jit.vector import Vectors

# Steps of k in one turn of the loop, in tiles of a whole panel and of part of one: the counting hides behind the
# multiplying. The others are many and do little of the work, and code takes time to compile.
_UNROLL, _UNROLL_OF_PART = 4, 2
# How far ahead of its use B is asked for into the first-level cache: it comes from the second.
_NEAR_BYTES = 1024
# The first tiles of a panel ask for a part each of the next panel into the second-level cache: it comes from afar.
_PARTS = 4
_CACHE_LINE = 64

GEMM = Signature(
    "gemm", ("count", "vectors", "a_rows", "b", "k", "start", "start_stride", "c", "c_stride", "ahead")
)
GEMM_TN = Signature(
    "upright", ("count", "vectors", "a", "b", "k", "start", "start_stride", "c", "c_stride", "ahead")
)


def emit_tile(
    module: Module, target: Target, dtype: str, rows: int, vectors: int, upright: bool = False
) -> Function:
    """A function that multiplies and accumulates that many rows by that many vectors.

    Its arguments: A (the addresses of its rows, or itself if upright), the first of the vectors in B's panel, K, start,
    bytes between start's rows, C, bytes between C's rows, and where to begin asking for this tile's part of what is
    needed next, which only tiles of whole panels do.
    """
    names = ["a", "b", "k", "start", "start_stride", "c", "c_stride", "ahead"]
    f = Function(module, f"{'upright' if upright else 'tile'}{rows}x{vectors}", names)
    a_rows, b, k, start, start_stride, c, c_stride, next_b = f.arguments
    v = Vectors(f, target, dtype)
    step = target.tile[1] * v.bytes
    is_whole = vectors == target.tile[1]
    unroll = _UNROLL if is_whole else _UNROLL_OF_PART
    a_step = v.bytes if upright else v.item
    a = [a_rows + v.item * i if upright else f.load(a_rows + 8 * i) for i in range(rows)]
    # The gradients of weights may go where the caller wants them, which need not be aligned.
    align = v.item if upright else v.bytes
    places = [[start_stride * i + j * v.bytes for j in range(vectors)] for i in range(rows)]
    total = [[f.var(v.load(start + place, align)) for place in row] for row in places]
    if upright and is_whole:
        _ask_for_starts(f, start + start_stride * rows, start_stride, rows, step)

    def multiply(index: Value, steps: int) -> None:
        b_here, a_here = b + index * step, [row + index * a_step for row in a]
        sums = [[one.get() for one in row] for row in total]
        for ahead in range(steps):
            begin, end = ahead * step, ahead * step + vectors * v.bytes
            for line in range(-(-begin // _CACHE_LINE), -(-end // _CACHE_LINE)):
                f.prefetch(b_here + (_NEAR_BYTES + line * _CACHE_LINE))
            b_vectors = [v.load(b_here + (begin + j * v.bytes)) for j in range(vectors)]
            for i in range(rows):
                scalar = v.broadcast(a_here[i] + ahead * a_step)
                sums[i] = [v.fma(scalar, one, so_far) for one, so_far in zip(b_vectors, sums[i], strict=True)]
        for row, results in zip(total, sums, strict=True):
            for one, result in zip(row, results, strict=True):
                one.set(result)

    even = k - k % unroll
    lines = -(-unroll * step // (_CACHE_LINE * _PARTS)) if is_whole else 0
    with f.loop(0, even, unroll) as index:
        for line in range(lines):
            f.prefetch(next_b + index * (step // _PARTS) + line * _CACHE_LINE, cache=2)
        multiply(index, unroll)
    with f.loop(even, k) as index:
        multiply(index, 1)
    for i in range(rows):
        for j in range(vectors):
            v.store(total[i][j].get(), c + c_stride * i + j * v.bytes, align)
    f.ret()
    return f


def _ask_for_starts(f: Function, start: Value, stride: Value, rows: int, size: int) -> None:
    """Ask for what so many rows start from, bytes of each: it is next, and comes from afar unless all are one."""
    for i in range(rows):
        for line in range(-(-size // _CACHE_LINE)):
            f.prefetch(start + stride * i + line * _CACHE_LINE, cache=2)


def emit_gemm(module: Module, target: Target, dtype: str) -> Function:
    """A function of (count, vectors, then a tile's arguments): any number of rows by part of a panel.

    The last argument says which panel is needed next: the first tiles of a whole one ask for it.
    """
    made = _emit_tiles(module, target, dtype)
    f = Function.of(module, GEMM)
    count, vectors, a_rows, b, k, start, start_stride, c, c_stride, ahead = f.arguments
    size = k * (target.tile[1] * target.vector_bits // 8)
    with f.switch(vectors, range(1, len(made) + 1)) as cases:
        for of_width, case in zip(made, cases, strict=True):
            with case, tiles(f, of_width, count) as (block, first, tile):
                part = (block < _PARTS - 1).select(block, _PARTS - 1)
                start_row, c_row = start + first * start_stride, c + first * c_stride
                next_b = ahead + part * (size // _PARTS)
                tile(a_rows + first * 8, b, k, start_row, start_stride, c_row, c_stride, next_b)
    f.ret()
    return f


def emit_gemm_tn(module: Module, target: Target, dtype: str) -> Function:
    """The same for an upright A of at most a vector's lanes; its last argument says what is needed next."""
    made = _emit_tiles(module, target, dtype, upright=True)
    f = Function.of(module, GEMM_TN)
    count, vectors, a, b, k, start, start_stride, c, c_stride, ahead = f.arguments
    part = k * (target.tile[1] * target.vector_bits // 8) // _PARTS
    item = ITEM_SIZE[dtype]
    with f.switch(vectors, range(1, len(made) + 1)) as cases:
        for of_width, case in zip(made, cases, strict=True):
            with case, tiles(f, of_width, count) as (block, first, tile):
                start_row, c_row = start + first * start_stride, c + first * c_stride
                tile(a + first * item, b, k, start_row, start_stride, c_row, c_stride, ahead + block * part)
    f.ret()
    return f


def _emit_tiles(module: Module, target: Target, dtype: str, upright: bool = False) -> list[list[Function]]:
    """Tiles of one vector, of two and so on to a panel's; of one row, of two and so on."""
    rows, width = target.tile
    return [
        [emit_tile(module, target, dtype, count, vectors, upright) for count in range(1, rows + 1)]
        for vectors in range(1, width + 1)
    ]


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
