"""What one forward pass keeps for its backward: where everything lies, and how much that is."""

from __future__ import annotations

from dataclasses import dataclass

from fusedrnn.engines.cpu.kernels.stages import derivative_of
from fusedrnn.engines.cpu.kernels.tiling import Tiling, pad_against_conflicts, round_up_to_cache_line
from fusedrnn.engines.cpu.varlen import Ragged
from fusedrnn.engines.cpu.weights.cache import PackedWeights, WeightPointers
from fusedrnn.runtime.buffers import Lease
from fusedrnn.spec import RNNSpec


@dataclass(frozen=True)
class ReserveLayout:
    """Positions and strides in bytes.

    First a copy of the input (T, N, I). Then, for each layer, its states, h before c, and behind these what a second
    stage of the cell multiplies: (T + 2, N, D·H), the directions side by side; at 0 and T + 1 stands what is before the
    first step of either direction, and a shorter sequence has the reverse direction's initial state right behind its
    end. Then, for each pass, (T, N, units, kept values).
    """

    steps: int
    batch: int
    records_at: int
    record_row: int
    record_step: int
    state_size: int
    states: int
    kept_offset: int
    kept_row: int
    kept_step: int
    size: int

    @classmethod
    def of(cls, spec: RNNSpec, tiling: Tiling, steps: int, batch: int, keep: str) -> ReserveLayout:
        """The layout for T steps of N sequences; ``keep`` is ``"gates"``, or ``"states"`` for nothing but these."""
        kept = len(derivative_of(spec.variant).kept) if keep == "gates" else 0
        records_at = round_up_to_cache_line(steps * batch * spec.input_size * tiling.item)
        record_row = pad_against_conflicts(spec.num_directions * spec.hidden_size * tiling.item)
        state_size = (steps + 2) * batch * record_row
        states = len(spec.state_names) + len(tiling.stages) - 1
        kept_offset = records_at + spec.num_layers * states * state_size
        kept_row = round_up_to_cache_line(tiling.unit_vectors * kept * tiling.vector_bytes)
        passes = spec.num_layers * spec.num_directions
        return cls(
            steps, batch, records_at, record_row, batch * record_row, state_size, states, kept_offset, kept_row,
            batch * kept_row,
            # What is read past the end of a last row must be there.
            size=round_up_to_cache_line(kept_offset + passes * steps * batch * kept_row + 2 * tiling.panel_bytes),
        )  # fmt: skip

    def record(self, layer: int, state: int) -> int:
        """Where a layer's states, h and then c, and a second stage's operand behind them, are at time 0."""
        return self.records_at + (layer * self.states + state) * self.state_size + self.record_step

    def kept(self, index: int) -> int:
        """Where the kept values of a pass begin."""
        return self.kept_offset + index * self.steps * self.kept_step


@dataclass(frozen=True, eq=False)
class Kept:
    """What backward must know of its forward beside the memory and the weights that it ran with."""

    layout: ReserveLayout
    keep: str
    seed: int
    ragged: Ragged | None


@dataclass(frozen=True, eq=False)
class KeptHere:
    """The same with these."""

    kept: Kept
    lease: Lease
    packed: PackedWeights | WeightPointers

    @property
    def nbytes(self) -> int:
        """Bytes of the reserve, without the weights, which it shares with other calls."""
        return self.kept.layout.size
