"""Initial accumulators that packed weights do not hold: of forward's GEMMs on unpacked weights and projections."""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.states import StateEmitter
from fusedrnn.engines.cpu.kernels.thread_share import Program
from fusedrnn.jit.builder import Value
from fusedrnn.jit.struct import Struct


class InitialAccumulators(StateEmitter):
    """A function of a thread's share of one layer-direction that also stores initial accumulators of its units."""

    def __init__(self, program: Program, name: str, structs: tuple[Struct, Struct]) -> None:
        super().__init__(program, name, structs)
        self.biases = self.scratch + self.c.biases_offset

    def store_initial_accumulators(self) -> None:
        """Store initial accumulators for GEMMs on unpacked weights and for projections."""
        f = self.f
        if self.can_read_unpacked:
            with f.if_(self.is_unpacked):
                self._store_biases()
        if self.cell.projects:
            # A projection has no bias.
            f.fill_zero(self.biases, f.constant(self.one_row_vectors * self.v.bytes))

    def _store_biases(self) -> None:
        """The unpacked biases in the order of the GEMMs' columns: the input's, then the state's."""
        f, c, p, v = self.f, self.c, self.p, self.v
        with f.loop(self.hidden.first, self.hidden.last) as unit_vec:
            units_left = (c.hidden - unit_vec * v.lanes).at_most(v.lanes)
            for gate in range(self.num_gates):
                col_vec = (unit_vec - self.hidden.first) * self.num_gates + gate
                offset = (c.hidden * gate + unit_vec * v.lanes) * v.item
                x_bias, h_bias = (
                    self._bias(base, offset, units_left) for base in (p.unpacked_x_bias, p.unpacked_h_bias)
                )
                into = self.biases + col_vec * v.bytes
                v.store(x_bias + h_bias if self.cell.accumulates_in_place else x_bias, into)
                v.store(h_bias, into + c.biases_size)

    def _bias(self, base: Value, offset: Value, units_left: Value) -> Value:
        """A vector of biases, zeros if there are none."""
        f, v = self.f, self.v
        bias = f.var(v.const(0.0))
        with f.if_(base.is_set):
            bias.set(v.load_masked(base + offset, units_left))
        return bias.get()
