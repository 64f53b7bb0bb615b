"""The GEMM on tiles: AMX multiplies 16 rows of A by a vector of columns of B in one instruction, over 16 k-groups.

What it computes, and its arguments, are those of :mod:`fusedrnn.engines.cpu.kernels.gemm`. Rows of A must be evenly
spaced in memory. A *K-block* is the 16 k-groups that an instruction multiplies. The instruction for bfloat16 sums a
K-block from zero and adds the result to C. So the K-blocks of an element, and the order within a K-block, do not depend
on the rows and columns that are computed together. A last K-block of fewer k-groups is copied and filled up with zeros.

Rows are cut into tiles of the same height: the lowest one with which there are no more tiles than with 16 rows. The
last tile ends with the last row, so it may overlap the tile before it. One kernel computes both tiles, and loads all
its sums before it stores any, so that rows in both tiles get the same values in both.

One row is multiplied by vector instructions, with the same bits: in a tile of one row, each product would wait for the
one before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fusedrnn.engines.cpu.kernels.gemm import GEMM_TN, OUTPUT_ARGUMENTS, gemm_of, k_parts
from fusedrnn.engines.cpu.kernels.one_row_gemm import emit_one_row_kernels
from fusedrnn.engines.cpu.kernels.products import PRODUCTS, SCALE_BYTES, STORAGE, products_of
from fusedrnn.jit.builder import Function, Module, Value
from fusedrnn.jit.target import Target
from fusedrnn.jit.tiles import RIGHT_TILES, ROW_BYTES, TILE_BYTES, TILE_ROWS, TilesOf, aligned_alloca, emit_tiles
from fusedrnn.jit.vector import Vectors

GROUPS = TILE_ROWS
"""K-groups in a K-block."""
ROWS_PER_KERNEL = 2 * TILE_ROWS
"""Rows that read a panel together."""
# Bytes of the part of a panel that all rows use before the next part. Processors with tiles prefetch by themselves:
# prefetch instructions would take more time than they save.
_PART_BYTES = 128 << 10
_FIRST_LEFT_TILE = 4


def emit_tile_gemm(module: Module, target: Target, compute: str, part_bytes: int = _PART_BYTES) -> Function:
    """The function ``GEMM`` or ``GEMM_INT8``: it cuts K into parts and the rows into tiles."""
    f = Function.of(module, gemm_of(compute))
    num_rows, num_col_vecs, a_rows, b, k, *others = f.arguments
    with f.if_(num_rows.equals(1)):
        for kernel in f.switch(num_col_vecs, emit_one_row_kernels(module, target, compute)):
            f.call(kernel, a_rows, f.constant(0), b, k, *others)
        f.ret()
    _ManyRows(f, target, compute).emit(part_bytes)
    f.ret()
    return f


def emit_tile_gemm_tn(module: Module, target: Target, compute: str) -> Function:
    """The function ``GEMM_TN``: A is a tile for each K-block, with a row of 64 bytes for each row of C.

    ``k`` is a number of whole K-blocks, in groups.
    """
    f = Function.of(module, GEMM_TN)
    num_rows, num_col_vecs, a, b, k, *output = f.arguments[:9]
    instruction = products_of(compute, Vectors(f, target, STORAGE[compute])).tile_instruction
    tiles_of, zero = emit_tiles(module, target, instruction), f.constant(0)
    kernels = {
        vecs: _TileKernel(module, target, compute, tiles_of, 1, vecs, a_step=TILE_BYTES).emit()
        for vecs in range(1, target.tile[1] + 1)
    }
    tiles_of(f, num_rows).configure()
    for kernel in f.switch(num_col_vecs, kernels):
        f.call(kernel, num_rows, zero, a, ROW_BYTES, zero, b, zero, k, *output)
    f.ret()
    return f


class _Part(NamedTuple):
    """A part of K: its first k-group, how many it has, and the initial accumulators, with the bytes between rows."""

    first_k: Value
    size: Value
    start: Value
    stride: Value


class _ManyRows:
    """The GEMM of more rows than one in a function under construction."""

    def __init__(self, f: Function, target: Target, compute: str) -> None:
        self.f, module = f, f.module
        self.num_rows, self.num_col_vecs, a_rows, b, k = f.arguments[:5]
        self.c_in, self.c_in_stride, self.c, self.c_stride, _, *self.scales = f.arguments[5:]
        self.v = v = Vectors(f, target, STORAGE[compute])
        self.products = products = products_of(compute, v)
        tiles_of, width = emit_tiles(module, target, products.tile_instruction), target.tile[1]
        self.group_bytes = width * products.b_bytes
        self.kernels = {
            (height, vecs): _TileKernel(module, target, compute, tiles_of, height, vecs).emit()
            for height, most in ((1, width), (2, 2))
            for vecs in range(1, most + 1)
        }
        self.num_tiles = (self.num_rows + (TILE_ROWS - 1)) // TILE_ROWS
        self.rows = (self.num_rows + self.num_tiles - 1) // self.num_tiles
        tiles_of(f, self.rows).configure()
        self.heads, self.b = b, b + products.head * self.group_bytes
        self.k = k - products.head
        self.a = f.load(a_rows)
        self.a_stride = f.load(a_rows + 8) - self.a
        self.a_tail = aligned_alloca(f, 2 * TILE_BYTES)
        self.b_tail = _copy_tail(v, self.b, self.group_bytes, self.num_col_vecs, width, self.k)

    def emit(self, part_bytes: int) -> None:
        """Emit the loop over the parts of K."""
        # K is not cut for quantized products, since C cannot hold their integer sums, nor for one tile of rows, which
        # reads everything once.
        part_groups = 0 if self.products.has_scales else part_bytes // self.group_bytes
        with k_parts(self.f, self.k, part_groups, GROUPS, self.num_rows > TILE_ROWS) as (first_k, size):
            is_first = first_k.is_zero
            start, stride = is_first.select(self.c_in, self.c), is_first.select(self.c_in_stride, self.c_stride)
            self._multiply(_Part(first_k, size, start, stride))

    def _multiply(self, part: _Part) -> None:
        """Add the products of a part: of one tile of rows if the number of tiles is odd, then of two at a time."""
        f, kernels, rows, num_rows, num_col_vecs = self.f, self.kernels, self.rows, self.num_rows, self.num_col_vecs
        is_odd, zero = self.num_tiles & 1, f.constant(0)
        with f.if_(is_odd.is_set):
            self._copy_left_tail(part, [zero])
            singles = {vecs: kernel for (height, vecs), kernel in kernels.items() if height == 1}
            for kernel in f.switch(num_col_vecs, singles):
                self._call(kernel, part, zero, zero, zero)
        with f.loop(is_odd * rows, num_rows, rows * 2) as row:
            second = (num_rows - rows - row).at_most(rows)
            self._copy_left_tail(part, [row, row + second])
            with f.loop(0, num_col_vecs, 2) as vec, f.if_else(num_col_vecs - vec > 1) as (both, last):
                with both:
                    self._call(kernels[2, 2], part, row, second, vec)
                with last:
                    self._call(kernels[2, 1], part, row, second, vec)

    def _call(self, kernel: Function, part: _Part, row: Value, second: Value, vec: Value) -> None:
        """Multiply the tiles of rows that begin at ``row`` and ``second`` rows later by the vectors from ``vec`` on."""
        offset = vec * self.v.bytes
        left = self.a + row * self.a_stride + part.first_k * self.products.a_bytes, self.a_stride, self.a_tail
        right = self.b + part.first_k * self.group_bytes + offset, self.b_tail + vec * TILE_BYTES, part.size
        c_in = part.start + row * part.stride + offset, part.stride
        c = self.c + row * self.c_stride + offset, self.c_stride
        quantized = (address + offset for address in (*self.scales, self.heads)) if self.scales else ()
        self.f.call(kernel, self.rows, second, *left, *right, *c_in, *c, *quantized)

    def _copy_left_tail(self, part: _Part, first_rows: Sequence[Value]) -> None:
        """Copy the last k-groups of the rows of some tiles, and add zeros: the memory after a row may hold anything."""
        f, v = self.f, self.v
        num_groups = part.size % GROUPS
        source = self.a + (part.first_k + part.size - num_groups) * self.products.a_bytes
        with f.if_(num_groups > 0), f.loop(0, self.rows) as in_tile:
            for number, first_row in enumerate(first_rows):
                # A k-group of a row has the size of a float32.
                groups = v.load_masked(source + (first_row + in_tile) * self.a_stride, num_groups)
                v.store(groups, self.a_tail + number * TILE_BYTES + in_tile * ROW_BYTES)


def _copy_tail(v: Vectors, b: Value, group_bytes: int, num_col_vecs: Value, width: int, k: Value) -> Value:
    """A copy of B's k-groups after the last whole K-block, with zeros: a tile for each vector of columns."""
    f = v.function
    tail = aligned_alloca(f, width * TILE_BYTES)
    num_groups = k % GROUPS
    source = b + (k - num_groups) * group_bytes
    with f.if_(num_groups > 0), f.loop(0, num_col_vecs) as vec:
        tile = tail + vec * TILE_BYTES
        with f.loop(0, num_groups) as group:
            v.store(v.load(source + group * group_bytes + vec * v.bytes), tile + group * ROW_BYTES)
        f.fill_zero(tile + num_groups * ROW_BYTES, (GROUPS - num_groups) * ROW_BYTES)
    return tail


class _TileKernel:
    """A function that multiplies one or two tiles of rows by some vectors of columns.

    Its arguments: the rows of a tile, and the row where the second one begins; A, the bytes between its rows, and the
    tiles of its last groups; the first vector in B's panel, and the tiles of B's last groups; K in groups; C_in and C,
    each with the bytes between rows; and if operands are quantized the scales of B's columns and B's head. A K-block of
    A's rows follows the one before it after ``a_step`` bytes.
    """

    def __init__(
        self, module: Module, target: Target, compute: str, tiles_of: TilesOf, height: int, col_vecs: int,
        a_step: int = ROW_BYTES,
    ) -> None:  # fmt: skip
        scales = ["b_scales", "head"] if PRODUCTS[compute].has_scales else []
        names = ["rows", "second", "a", "a_stride", "a_tail", "b", "b_tail", "k", *OUTPUT_ARGUMENTS, *scales]
        self.f = f = Function(module, f"tile_kernel{height}x{col_vecs}", names)
        self.rows, self.second, self.a, self.a_stride, self.a_tail, self.b, self.b_tail, self.k = f.arguments[:8]
        self.c_in, self.c_in_stride, self.c, self.c_stride, *self.scales = f.arguments[8:]
        self.v = Vectors(f, target, STORAGE[compute])
        self.products = products_of(compute, self.v)
        self.tiles = tiles_of(f, self.rows)
        self.group_bytes = target.tile[1] * self.products.b_bytes
        self.first_rows = [f.constant(0), self.second][:height]
        self.col_vecs, self.a_step = col_vecs, a_step

    def emit(self) -> Function:
        f = self.f
        self._begin_sums()
        num_steps = self.k // GROUPS
        a_tiles = [self.a + row * self.a_stride for row in self.first_rows]
        step_bytes = GROUPS * self.group_bytes
        with f.loop(0, num_steps) as step:
            left = [tile + step * self.a_step for tile in a_tiles]
            right = [self.b + step * step_bytes + vec * self.v.bytes for vec in range(self.col_vecs)]
            self._multiply(left, self.a_stride, right, f.constant(self.group_bytes))
        with f.if_(self.k % GROUPS > 0):
            left = [self.a_tail + number * TILE_BYTES for number in range(len(a_tiles))]
            right = [self.b_tail + vec * TILE_BYTES for vec in range(self.col_vecs)]
            self._multiply(left, f.constant(ROW_BYTES), right, f.constant(ROW_BYTES))
        if self.products.has_scales:
            self._store_scaled()
        else:
            self._store_sums(self.c, self.c_stride)
        f.ret()
        return f

    def _sum_tiles(self) -> Iterator[tuple[int, Value, int]]:
        """Each tile of sums, with its first row and its vector of columns."""
        positions = itertools.product(self.first_rows, range(self.col_vecs))
        for tile, (first_row, vec) in enumerate(positions):
            yield tile, first_row, vec

    def _begin_sums(self) -> None:
        """Begin with C_in, or with the panel's head if C_in is added after the sum is scaled."""
        for tile, first_row, vec in self._sum_tiles():
            if self.products.has_scales:
                self.tiles.load(tile, self.scales[1] + vec * self.v.bytes, self.f.constant(0))
            else:
                address = self.c_in + first_row * self.c_in_stride + vec * self.v.bytes
                self.tiles.load(tile, address, self.c_in_stride)

    def _store_sums(self, into: Value, stride: Value) -> None:
        for tile, first_row, vec in self._sum_tiles():
            self.tiles.store(tile, into + first_row * stride + vec * self.v.bytes, stride)

    def _multiply(self, left: Sequence[Value], left_stride: Value, right: Sequence[Value], right_stride: Value) -> None:
        """Add the products of a K-block, by the addresses of its tiles; 2 x 2 tiles need one load for each product."""
        tiles = self.tiles
        for number, address in enumerate(left):
            tiles.load(_FIRST_LEFT_TILE + number, address, left_stride)
        for vec, address in enumerate(right):
            right_tile = RIGHT_TILES[vec % len(RIGHT_TILES)]
            tiles.load(right_tile, address, right_stride)
            for number in range(len(left)):
                tiles.multiply(number * self.col_vecs + vec, _FIRST_LEFT_TILE + number, right_tile)

    def _store_scaled(self) -> None:
        """Scale the integer sums, which go through the stack, and add C_in."""
        f, v, row_bytes = self.f, self.v, self.col_vecs * self.v.bytes
        sums = aligned_alloca(f, len(self.first_rows) * TILE_ROWS * row_bytes)
        self._store_sums(sums, f.constant(row_bytes))
        with f.loop(0, self.first_rows[-1] + self.rows) as row:
            row_scale = self.a + row * self.a_stride - SCALE_BYTES
            for vec in range(self.col_vecs):
                offset = vec * v.bytes
                total = f.load(sums + row * row_bytes + offset, v.itype, v.bytes)
                c_in = self.c_in + row * self.c_in_stride + offset
                result = self.products.last_sum(total, (row_scale, self.scales[0] + offset), c_in, v.bytes)
                v.store(result, self.c + row * self.c_stride + offset)
