"""The layer's input itself, for cells that read it: each thread stores its own units, as if the input were a gate."""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.lowered_cell import kept_products
from fusedrnn.engines.cpu.kernels.panel_matrix import Rows
from fusedrnn.engines.cpu.kernels.thread_share import ThreadShare
from fusedrnn.jit.builder import Value


class RawInputRows(ThreadShare):
    """A function of a thread's share of one layer-direction, whose rows of gates also hold the raw input."""

    def raw_input(self, gate_row: Value, unit_vec: Value) -> Value:
        """Where a vector of the layer's input itself is: after a row's gates and kept products."""
        units, vectors = self.hidden, self.num_gates + len(kept_products(self.stages))
        return gate_row + ((units.last - units.first) * vectors + (unit_vec - units.first)) * self.v.bytes

    def copy_raw_input(self, table: Value, num_rows: Value, gates: Rows) -> None:
        """Store this thread's units of the layer's input after the gates, if the cell reads it."""
        f, v, units = self.f, self.v, self.hidden
        if not self.cell.reads_raw_input:
            return
        with f.loop(0, num_rows) as row, f.loop(units.first, units.last) as unit_vec:
            source = f.load(table + row * 8) + unit_vec * v.bytes
            into = self.raw_input(gates.address + row * gates.stride, unit_vec)
            units_left = units.size - unit_vec * v.lanes
            with f.if_else(units_left >= v.lanes) as (whole, tail):
                with whole:
                    v.store(v.load(source, v.item), into)
                with tail:
                    v.store(v.load_masked(source, units_left), into)
