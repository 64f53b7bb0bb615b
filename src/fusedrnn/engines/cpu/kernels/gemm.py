"""The GEMM micro-kernel: a few rows of A times a few vectors of a panel of packed B, accumulated in registers.

C[rows, cols] = C_in[rows, cols] + Σₖ A[rows, k]·B[k, cols]. Each element is one chain of multiply-adds over rising k,
fused where the target has FMA; tiles of AMX have an order of their own. The chain does not depend on the tile, so the
bits of a result do not depend on which rows and columns are computed together. Nor does it depend on parts: a long
panel is cut in K so that a part stays in a fraction of L2 while all rows use it. Sums are stored after each part and
loaded again by the next.

``gemm`` takes A by the addresses of its rows. ``gemm_tn`` takes A transposed: for each k, one vector with the elements
of its rows. Backward stores gradients that way for the weights' gradients, which sum over the rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fusedrnn.engines.cpu.kernels.products import PRODUCTS, SCALE_BYTES, STORAGE, products_of
from fusedrnn.jit.builder import Function, Module, Signature, Value
from fusedrnn.jit.sync import CACHE_LINE
from fusedrnn.jit.target import ITEM_SIZE, Target
from fusedrnn.jit.vector import Vectors

# How many bytes ahead of its use B is prefetched from L2 into L1.
_L1_PREFETCH_DISTANCE = 1024
# Bytes of the part of a panel that all rows use before the next part: a fraction of any L2. For few tiles of rows,
# cutting a panel into parts does not pay.
_PART_BYTES, _TILES_WITHOUT_PARTS = 96 << 10, 2
# The first tiles of a panel prefetch one part each of the next panel into L2.
_TILES_PER_PREFETCH = 4

OUTPUT_ARGUMENTS = "c_in", "c_in_stride", "c", "c_stride"
"""The initial accumulators and the result, each with the bytes between rows."""
GEMM = Signature("gemm", ("num_rows", "num_col_vecs", "a_rows", "b", "k", *OUTPUT_ARGUMENTS, "prefetch_b"))
"""Any number of rows by vectors of one panel; ``prefetch_b`` is the panel needed next."""
GEMM_TN = Signature("gemm_tn", ("num_rows", "num_col_vecs", "a", "b", "k", *OUTPUT_ARGUMENTS, "prefetch_a"))
"""At most as many rows as a vector has lanes, by vectors of one panel; ``prefetch_a`` is the A needed next."""
GEMM_INT8 = Signature("gemm_int8", (*GEMM.arguments, "b_scales"))
"""``GEMM`` of int8 weights. ``b_scales`` has a vector for each vector of columns; quantized rows follow their scale."""


def gemm_of(compute: str) -> Signature:
    """The function that multiplies rows by a panel, for operands of a format."""
    return GEMM_INT8 if PRODUCTS[compute].has_scales else GEMM


def emit_gemm(
    module: Module, target: Target, compute: str, signature: Signature, part_bytes: int = _PART_BYTES
) -> Function:
    """The function ``GEMM``, ``GEMM_TN`` or ``GEMM_INT8``: it cuts K into parts and the rows into tiles.

    ``k`` is a number of groups; ``part_bytes`` are those of a part of a panel. One row of A may also multiply all
    vectors of ``target.one_row_panels`` panels.
    """
    transposed = signature is GEMM_TN
    # Micro-kernels of one vector, of two and so on up to those of a panel; each for one row, for two and so on.
    rows, width = target.tile
    microkernels = [
        [Microkernel(module, target, compute, height, num_vecs, transposed) for height in range(1, rows + 1)]
        for num_vecs in range(1, width + 1)
    ]
    products = microkernels[0][0].products
    functions = [[microkernel.emit() for microkernel in by_rows] for by_rows in microkernels]
    by_width = dict(enumerate(functions, 1))
    if not transposed:
        of_one_row = width * target.one_row_panels
        by_width[of_one_row] = [Microkernel(module, target, compute, 1, of_one_row, transposed).emit()]
    f = Function.of(module, signature)
    num_rows, num_col_vecs, a, b, k, c_in, c_in_stride, c, c_stride, prefetch, *scales = f.arguments
    group_bytes, last_prefetch = width * products.b_bytes, _TILES_PER_PREFETCH - 1
    a_step = ITEM_SIZE[STORAGE[compute]] if transposed else 8
    # What a tile prefetches of each group of the next panel.
    prefetch_step = group_bytes // _TILES_PER_PREFETCH
    # K is not cut for quantized products: C cannot hold their integer sums, and panels are short. Nor for gemm_tn: a
    # panel stays in cache for many calls, and C comes from memory.
    is_whole = products.has_scales or transposed
    part_groups = 0 if is_whole else part_bytes // group_bytes // products.unroll * products.unroll
    for by_rows in f.switch(num_col_vecs, by_width):
        with k_parts(f, k, part_groups, products.unroll, num_rows > _TILES_WITHOUT_PARTS * rows) as (first_k, size):
            is_first = first_k.is_zero
            start, stride = is_first.select(c_in, c), is_first.select(c_in_stride, c_stride)
            with row_tiles(f, by_rows, num_rows) as (tile, row, call):
                output = start + row * stride, stride, c + row * c_stride, c_stride
                prefetcher = tile if transposed else (tile < last_prefetch).select(tile, last_prefetch)
                ahead = prefetch + (prefetcher * k + first_k) * prefetch_step
                operands = a + row * a_step, first_k * products.a_bytes, b + first_k * group_bytes, size
                call(*operands, *output, ahead, *scales)
    f.ret()
    return f


@contextmanager
def k_parts(f: Function, k: Value, most: int, multiple: int, is_cut: Value) -> Iterator[tuple[Value, Value]]:
    """Cut K into parts of at most ``most`` groups; if ``most`` is 0 or ``is_cut`` is false, into one part.

    Every part but the last has a multiple of ``multiple`` groups. Yields the first group of a part and the number of
    its groups. There is a part even if there are no groups.
    """
    if not most:
        yield f.constant(0), k
        return
    num_parts = is_cut.select((k + (most - 1)) // most, 1)
    num_parts = (num_parts > 0).select(num_parts, 1)
    size = ((k + (num_parts - 1)) // num_parts + (multiple - 1)) // multiple * multiple
    with f.loop(0, num_parts) as part:
        first = part * size
        left = (k - first).at_most(size)
        yield first, (left > 0).select(left, 0)


@contextmanager
def row_tiles(
    f: Function, by_rows: Sequence[Function], num_rows: Value
) -> Iterator[tuple[Value, Value, Callable[..., None]]]:
    """Cut rows into tiles whose sizes differ by at most one: a short last tile would leave the pipeline idle.

    Yields a tile's number, its first row, and a call of the function for its number of rows.
    """
    largest = len(by_rows)
    num_tiles = (num_rows + (largest - 1)) // largest
    size = num_rows // num_tiles
    num_larger = num_rows - size * num_tiles
    first_row = f.var(0)
    with f.loop(0, num_tiles) as tile:
        rows = size + (tile < num_larger).select(f.constant(1), 0)

        def call(*arguments: Value) -> None:
            for function in f.switch(rows, dict(enumerate(by_rows, 1))):
                f.call(function, *arguments)

        yield tile, first_row.get(), call
        first_row.set(first_row.get() + rows)


class Microkernel:
    """A function that multiplies so many rows of A by so many vectors of a panel, or of several whole panels.

    Its arguments: the addresses of A's rows, each of which begins ``a_offset`` bytes further on, or A itself if
    transposed; the first vector in B's panel; K in groups; C_in and C, each with the bytes between rows; where this
    tile's part of the next prefetch begins, used by whole panels; and the scales of B's columns if there are any.
    """

    def __init__(
        self, module: Module, target: Target, compute: str, rows: int, col_vecs: int, transposed: bool
    ) -> None:
        scales = ["b_scales"] if PRODUCTS[compute].has_scales else []
        names = ["a", "a_offset", "b", "k", *OUTPUT_ARGUMENTS, "prefetch", *scales]
        self.f = f = Function(module, f"microkernel_{'tn' if transposed else 'nn'}{rows}x{col_vecs}", names)
        a, a_offset, self.b, self.k, self.c_in, self.c_in_stride, self.c, self.c_stride, self.prefetch = f.arguments[:9]
        self.v = v = Vectors(f, target, STORAGE[compute])
        self.products = products_of(compute, v, v.bytes if transposed else v.item)
        self.rows, self.col_vecs = rows, col_vecs
        self.width, self.b_step = target.tile[1], target.tile[1] * self.products.b_bytes
        self.is_whole_panel = col_vecs == self.width
        self.panels = [self.b + self.k * self.b_step * panel for panel in range(-(-col_vecs // self.width))]
        self.prefetches_c_in = transposed and self.is_whole_panel
        a_rows = [a + v.item * i if transposed else f.load(a + 8 * i) for i in range(rows)]
        self.a = [row if transposed else f.opaque(row + a_offset) for row in a_rows]
        # gemm_tn may write into the caller's gradients, which need not be aligned to vectors.
        self.align = v.item if transposed else v.bytes

    def emit(self) -> Function:
        """Emit the function."""
        f, v, products = self.f, self.v, self.products
        unroll = products.unroll if self.is_whole_panel else -(-products.unroll // 2)
        heads = self._slots(self.panels)
        offsets = [[self.c_in_stride * i + j * v.bytes for j in range(self.col_vecs)] for i in range(self.rows)]
        c_in = [[self.c_in + offset for offset in row] for row in offsets]
        self.sums = [
            [f.var(products.first_sum(address, head, self.align)) for address, head in zip(row, heads, strict=True)]
            for row in c_in
        ]
        if products.head:
            self.panels = [panel + products.head * self.b_step for panel in self.panels]
            self.k = self.k - products.head
        if self.prefetches_c_in:
            self._prefetch_c_in()
        self._add_all_products(unroll)
        for i, row in enumerate(self.sums):
            for j, total in enumerate(row):
                result = products.last_sum(total.get(), self._scales(i, j), c_in[i][j], self.align)
                v.store(result, self.c + self.c_stride * i + j * v.bytes, self.align)
        f.ret()
        return f

    def _add_all_products(self, unroll: int) -> None:
        """Add the products of all groups, ``unroll`` of them in each iteration."""
        f = self.f
        even = self.k - self.k % unroll
        lines = -(-unroll * self.b_step // (CACHE_LINE * _TILES_PER_PREFETCH)) if self.is_whole_panel else 0
        with f.loop(0, even, unroll) as k:
            for line in range(lines):
                part = self.prefetch + k * (self.b_step // _TILES_PER_PREFETCH)
                f.prefetch(part + line * CACHE_LINE, cache=2)
            self._multiply(k, unroll)
        if unroll > 1:
            with f.loop(even, self.k) as k:
                self._multiply(k, 1)

    def _scales(self, row: int, col_vec: int) -> tuple[Value, ...]:
        """The addresses of the scale of a row of A and of those of a vector of columns of B, if there are any."""
        scales = self.f.arguments[9:]
        return (self.a[row] - SCALE_BYTES, scales[0] + col_vec * self.v.bytes) if scales else ()

    def _multiply(self, k: Value, steps: int) -> None:
        """Add the products of so many groups from group ``k`` on."""
        products = self.products
        b_rows = [panel + k * self.b_step for panel in self.panels]
        a_rows = [row + k * products.a_bytes for row in self.a]
        sums = [[total.get() for total in row] for row in self.sums]
        for step in range(steps):
            for b_row in b_rows:
                self._prefetch_b(b_row, step)
            b_slots = self._slots(b_rows, step * self.b_step)
            sums = products.add([row + step * products.a_bytes for row in a_rows], b_slots, sums)
        for row, results in zip(self.sums, sums, strict=True):
            for total, result in zip(row, results, strict=True):
                total.set(result)

    def _slots(self, panels: Sequence[Value], offset: int = 0) -> list[Value]:
        """The slot of each vector of columns, ``offset`` bytes after these addresses of the panels."""
        b_bytes, width = self.products.b_bytes, self.width
        return [panels[j // width] + (offset + j % width * b_bytes) for j in range(self.col_vecs)]

    def _prefetch_b(self, b_row: Value, step: int) -> None:
        """Prefetch the cache lines of B that a later step reads, a fixed distance after those of this step."""
        num_vectors = min(self.col_vecs, self.width)
        begin, end = step * self.b_step, step * self.b_step + num_vectors * self.products.b_bytes
        for line in range(-(-begin // CACHE_LINE), -(-end // CACHE_LINE)):
            self.f.prefetch(b_row + (_L1_PREFETCH_DISTANCE + line * CACHE_LINE))

    def _prefetch_c_in(self) -> None:
        """Prefetch C_in for the next rows: in the weights' gradients it comes from memory."""
        next_rows = self.c_in + self.c_in_stride * self.rows
        row_bytes = self.col_vecs * self.v.bytes
        for i in range(self.rows):
            for line in range(-(-row_bytes // CACHE_LINE)):
                self.f.prefetch(next_rows + self.c_in_stride * i + line * CACHE_LINE, cache=2)
