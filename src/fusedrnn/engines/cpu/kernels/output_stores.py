"""How a layer stores the rows of its output: with a residual connection's input, and past the caches where it is large.

In a cell without GEMMs at each step, stores of the output take the most time if it does not fit into the caches. An
ordinary store first reads the cache line that it writes; a non-temporal one of a whole line does not.
"""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.direction_emitter import rows_of_time
from fusedrnn.engines.cpu.kernels.layer_rows import LayerRows
from fusedrnn.jit.builder import I64, Value
from fusedrnn.jit.nontemporal import fence_nontemporal_stores, is_resident, store_nontemporal
from fusedrnn.jit.sync import CACHE_LINE

# How far ahead of the ordinary stores of such a cell the output is prefetched.
_PREFETCHED_BYTES = 1 << 10


class OutputStores(LayerRows):
    """A function of a thread's share of one layer-direction, which stores the layer's output.

    Attributes:
        nontemporal_output: In a cell without stages, the result of :meth:`is_nontemporal`, once for all stores.
    """

    nontemporal_output: Value

    def is_nontemporal(self) -> Value:
        """Whether rows of the output bypass the caches.

        The plan says so, they consist of whole cache lines, and the memory has been used before: new pages are in the
        caches, since the system fills them with zeros, and stores past the caches take longer there.
        """
        f, p, c = self.f, self.p, self.c
        step = p.y_row_offsets.is_set.select(f.constant(0), p.y_step)
        offsets = p.y | p.y_row | step | (c.out * self.v.item)
        nontemporal = f.var(0)
        with f.if_(c.nontemporal_output.is_set & (offsets & (CACHE_LINE - 1)).is_zero):
            last_time = rows_of_time(f, p.y, p.y_step, p.y_row, p.y_row_offsets, c.steps - 1)
            nontemporal.set(is_resident(f, last_time).zext(I64))
        return nontemporal.get().is_set

    def store_output(self, value: Value, unit_vec: Value, y: Value, x: Value | None) -> None:
        """Store a vector of a row of the output, plus that of the row ``x`` if the layer has a residual connection."""
        f, v, offset, size = self.f, self.v, unit_vec * self.v.bytes, self.c.out
        output = f.var(value)
        if x is not None:
            with f.if_(self.p.residual.is_set):
                output.set(value + self.load_tail(x + offset, size - unit_vec * v.lanes))
        if self.stages:
            self.store_tail(output.get(), unit_vec, y + offset, size)
            return
        with f.if_else(self.nontemporal_output) as (nontemporal, cached):
            with nontemporal:
                store_nontemporal(f, output.get(), y + offset, v.bytes)
            with cached:
                f.prefetch(y + offset + _PREFETCHED_BYTES)
                self.store_tail(output.get(), unit_vec, y + offset, size)

    def complete_output(self) -> None:
        """Make what was stored visible to the threads that this one signals next."""
        with self.f.if_(self.nontemporal_output):
            fence_nontemporal_stores(self.f)
