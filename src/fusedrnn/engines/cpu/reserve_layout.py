"""What a training call saves for its backward: the layout of the reserve, and its size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.kernels.lowered_cell import derivative_of
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.engines.cpu.varlen import VarLen
from fusedrnn.engines.cpu.weights.cache import PackedWeights, WeightAddresses
from fusedrnn.engines.interface import SavePolicy
from fusedrnn.runtime.buffers import Lease, pad_against_conflicts, round_up_to_cache_line


@dataclass(frozen=True)
class ReserveLayout:
    """The regions of a reserve; offsets and strides in bytes.

    1. A copy of the input (T, N, I).
    2. For each layer its states (T + 2, N, D·H) of the times -1 to T, with the directions adjacent: h, then c, then the
       operands of the cell's later stages. Times -1 and T hold the initial states of the two directions. In a shorter
       sequence, the initial state of the reverse direction follows the last step. With resets, time T + 1 holds the
       states after a reset.
    3. If the output is no state, the output (T, N, D·S) of each layer but the last, in rows like those of the states.
    4. For each layer and direction the saved values (T, N, units, values). Those of a row take ``values_size`` bytes,
       and the means and variances of the row's reductions follow them.
    """

    save: SavePolicy
    steps: int
    batch: int
    states_offset: int
    saved_state_row: int
    saved_state_step: int
    saved_state_size: int
    num_states: int
    outputs_offset: int
    values_offset: int
    values_size: int
    saved_values_row: int
    saved_values_step: int
    size: int

    @classmethod
    def of(cls, tiling: Tiling, steps: int, batch: int, save: SavePolicy, resets: bool = False) -> ReserveLayout:
        """The layout for T steps of N sequences."""
        spec = tiling.spec
        num_saved = len(derivative_of(spec.variant).saved) if save == "gates" else 0
        states_offset = round_up_to_cache_line(steps * batch * spec.input_size * tiling.item)
        saved_state_row = pad_against_conflicts(spec.num_directions * spec.hidden_size * tiling.item)
        saved_state_size = (steps + 2 + resets) * batch * saved_state_row
        num_states = len(spec.state_names) + len(tiling.later_gemm_stages)
        outputs_offset = states_offset + spec.num_layers * num_states * saved_state_size
        outputs_size = (spec.num_layers - 1) * steps * batch * saved_state_row if not spec.output_is_state else 0
        values_offset = outputs_offset + outputs_size
        values_size = tiling.unit_vecs * num_saved * tiling.vector_bytes
        saved_values_row = round_up_to_cache_line(values_size + tiling.num_moments * tiling.item)
        saved_values_size = spec.num_layers * spec.num_directions * steps * batch * saved_values_row
        return cls(
            save, steps, batch, states_offset, saved_state_row, batch * saved_state_row, saved_state_size, num_states,
            outputs_offset, values_offset, values_size, saved_values_row, batch * saved_values_row,
            # Vector loads may read past the end of the last row.
            size=round_up_to_cache_line(values_offset + saved_values_size + 2 * tiling.panel_bytes),
        )  # fmt: skip

    def state_offset(self, layer: int, state: int) -> int:
        """The offset of a layer's state at time 0: h, c, then the operands of later stages."""
        return self.states_offset + (layer * self.num_states + state) * self.saved_state_size + self.saved_state_step

    def output_offset(self, layer: int) -> int:
        """The offset of the output of a layer, if that is no state."""
        return self.outputs_offset + layer * self.steps * self.saved_state_step

    def saved_offset(self, index: int) -> int:
        """The offset of the saved values of a layer and direction."""
        return self.values_offset + index * self.steps * self.saved_values_step


@dataclass(frozen=True, eq=False)
class TrainingCall:
    """What backward needs of its training call besides the reserve's memory and the weights."""

    layout: ReserveLayout
    seed: int
    varlen: VarLen | None
    resets: NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class CpuResiduals:
    """What a training call on arrays saves."""

    call: TrainingCall
    lease: Lease
    weights: PackedWeights | WeightAddresses

    @property
    def nbytes(self) -> int:
        """Bytes of the reserve; weights are shared with other calls and do not count."""
        return self.call.layout.size
