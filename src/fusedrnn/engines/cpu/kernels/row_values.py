"""What a row of a chunk holds after its gates: products kept for later, the raw input, random masks, and moments.

All but the moments are values of this thread's units. Moments are the means and variances over all units; each is a
vector that has the number in every lane.
"""

from __future__ import annotations

from fusedrnn.cell.leaves import KeptProduct, Mask, RowMean, RowVariance
from fusedrnn.dropout import step_stream, step_word, threshold
from fusedrnn.engines.cpu.kernels.dropout import DROP_PANEL
from fusedrnn.engines.cpu.kernels.lowered_cell import kept_products, moments
from fusedrnn.engines.cpu.kernels.raw_input import RawInputRows
from fusedrnn.jit.builder import Declared, Value

_FLOAT64_ONE = 0x3FF0000000000000


class RowValues(RawInputRows):
    """A function of a thread's share of one layer-direction, with the values after the gates of a row."""

    draws_masks = False
    """Whether masks are drawn; in inference their expectations take their place."""

    def kept_product(self, kept: KeptProduct, gate_row: Value, unit_vec: Value) -> Value:
        """Where a vector of a product is kept for later stages: after the row's gates."""
        gates, units = kept_products(self.stages), self.hidden
        index = (unit_vec - units.first) * len(gates) + gates.index(kept)
        return gate_row + ((units.last - units.first) * self.num_gates + index) * self.v.bytes

    def _masks(self, gate_row: Value) -> Value:
        """Where the masks of a row begin, after its raw input."""
        vectors = self.num_gates + len(kept_products(self.stages)) + self.cell.reads_raw_input
        return gate_row + (self.hidden.last - self.hidden.first) * (vectors * self.v.bytes)

    def _mask_vectors(self) -> Value:
        """Vectors of a mask: whole panels, so up to one panel more before and after this thread's units."""
        return self.hidden.last - self.hidden.first + 2 * self.panel_vectors

    def mask(self, leaf: Mask, gate_row: Value, unit_vec: Value) -> Value:
        """A vector of a mask."""
        if not self.draws_masks:
            return self.v.const(leaf.keep)
        first = self.hidden.first // self.panel_vectors * self.panel_vectors
        index = self._mask_vectors() * self.cell.masks.index(leaf) + (unit_vec - first)
        return self.v.load(self._masks(gate_row) + index * self.v.bytes)

    def draw_masks(self, gate_row: Value, sequence: Value, time: Value) -> None:
        """Draw the masks of a row at a time, as :func:`fusedrnn.dropout.step_mask` defines them."""
        f, c, v, units = self.f, self.c, self.v, self.hidden
        if not self.draws_masks:
            return
        layer_dir = self.layer * c.directions + self.direction
        drop_panel = Declared(f.module, DROP_PANEL) if self.cell.masks else None
        first, last = units.first // self.panel_vectors, (units.last + (self.panel_vectors - 1)) // self.panel_vectors
        for number, leaf in enumerate(self.cell.masks):
            assert drop_panel is not None
            word = f.constant(step_word(None)) if leaf.per_sequence else time
            into = self._masks(gate_row) + self._mask_vectors() * (number * v.bytes)
            with f.loop(first, last) as panel:
                address = into + (panel - first) * self.panel_bytes
                for vector in range(self.panel_vectors):
                    v.store(v.const(1.0), address + vector * v.bytes)
                feature = panel * (self.panel_vectors * v.lanes)
                counter = sequence, word, layer_dir + step_stream(number, 0)
                f.call(drop_panel, address, feature, *counter, threshold(1.0 - leaf.keep), _FLOAT64_ONE, c.seed)

    def moment_offset(self, leaf: RowMean | RowVariance) -> int:
        """Where a mean or a variance is among those of a row that training saves."""
        return moments(self.stages).index(leaf) * self.v.item

    def moment(self, leaf: RowMean | RowVariance, gate_row: Value) -> Value:
        """Where a mean or a variance of a row is: after its masks."""
        masks = self._mask_vectors() * len(self.cell.masks)
        return self._masks(gate_row) + (masks + moments(self.stages).index(leaf)) * self.v.bytes
