"""The GEMM of one row on targets with tiles: by vectors, with the bits of tiles.

A tile of one row takes as long as one of sixteen: each product waits for the one before it.
"""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.accumulators import add_products
from fusedrnn.engines.cpu.kernels.gemm import Microkernel
from fusedrnn.jit.builder import Function, Module, Value
from fusedrnn.jit.dot_products import halves_as_float
from fusedrnn.jit.target import Target
from fusedrnn.jit.tiles import TILE_ROWS


def emit_one_row_kernels(module: Module, target: Target, compute: str) -> dict[int, Function]:
    """Micro-kernels of one row by number of vectors: up to a panel's, and those of ``target.one_row_panels`` panels."""
    width = target.tile[1]
    kind = _TileOrderMicrokernel if compute == "bfloat16" else Microkernel
    widths = [*range(1, width + 1), width * target.one_row_panels]
    return {col_vecs: kind(module, target, compute, 1, col_vecs, transposed=False).emit() for col_vecs in widths}


class _TileOrderMicrokernel(Microkernel):
    """Adds products of bfloat16 in the order of ``tdpbf16ps``.

    Sixteen groups are summed from zero: the low halves of their pairs in one sum, the high halves in another. The two
    sums are added, and the result is added to the total. Sums of integers are the same
    in any order.
    """

    def _add_all_products(self, unroll: int) -> None:
        f, zero = self.f, self.v.const(0.0)
        whole = self.k - self.k % TILE_ROWS
        with f.loop(0, whole, TILE_ROWS) as step:
            for total, (low, high) in zip(self.sums[0], self._step_sums(step, step + TILE_ROWS), strict=True):
                total.set(total.get() + (low + high))
        with f.if_(whole < self.k):
            for total, (low, high) in zip(self.sums[0], self._step_sums(whole, self.k), strict=True):
                # A tile is filled up with zeros, whose products make a negative zero positive; adding a zero does too.
                total.set(total.get() + ((low + zero) + (high + zero)))

    def _step_sums(self, first: Value, last: Value) -> list[tuple[Value, Value]]:
        """For each vector of columns the sums of the low and of the high halves of a K-block's k-groups."""
        f, v = self.f, self.v
        sums = [[f.var(v.const(0.0)) for _ in range(self.col_vecs)] for _ in range(2)]
        # More than one group in an iteration would take more registers than there are.
        with f.loop(first, last) as k:
            b_rows = [panel + k * self.b_step for panel in self.panels]
            for b_row in b_rows:
                self._prefetch_b(b_row, 0)
            a_halves = halves_as_float(v, v.splat_word(self.a[0] + k * self.products.a_bytes))
            b_vecs = [halves_as_float(v, f.load(slot, v.itype, v.bytes)) for slot in self._slots(b_rows)]
            for half_sums, a_half, b_halves in zip(sums, a_halves, zip(*b_vecs, strict=True), strict=True):
                [results] = add_products([a_half], b_halves, [[total.get() for total in half_sums]], v.fma)
                for total, result in zip(half_sums, results, strict=True):
                    total.set(result)
        return [(low.get(), high.get()) for low, high in zip(*sums, strict=True)]
