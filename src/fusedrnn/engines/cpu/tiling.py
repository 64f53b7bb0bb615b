"""How the units and gates of a spec fill vectors and panels on a target; the same for all problem sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fusedrnn.engines.cpu.kernels.scratch import pad_against_conflicts
from fusedrnn.engines.cpu.kernels.stages import Blocking, StageKernel, lowered_cell, stage_kernels
from fusedrnn.jit.target import ITEM_SIZE, Target
from fusedrnn.spec import RNNSpec


@dataclass(frozen=True)
class Tiling:
    """The vectors and panels of a spec's weights, gates and states on a target.

    Attributes:
        vector_bytes: Bytes of a vector.
        panel_vectors: Vectors of a panel.
        hidden: H.
        out: S, the size of h.
        stages: The stages of the cell.
        num_peepholes: Gates that have peephole weights.
        item: Bytes of an element.
        directions: D.
    """

    vector_bytes: int
    panel_vectors: int
    hidden: int
    out: int
    stages: tuple[StageKernel, ...]
    num_peepholes: int
    item: int
    directions: int

    @classmethod
    def of(cls, spec: RNNSpec, target: Target) -> Tiling:
        """The tiling of a spec's layers."""
        return cls(
            vector_bytes=target.vector_bits // 8,
            panel_vectors=target.tile[1],
            hidden=spec.hidden_size,
            out=spec.state_size,
            stages=stage_kernels(spec.variant),
            num_peepholes=len(lowered_cell(spec.variant).peepholes),
            item=ITEM_SIZE[spec.dtype],
            directions=spec.num_directions,
        )

    def is_pipelined(self, layer_dir_groups: int) -> bool:
        """Whether so many groups of layer-directions are pipelined layers: a network of one direction has no others."""
        return self.directions == 1 and layer_dir_groups > 1

    @property
    def lanes(self) -> int:
        """Elements of a vector."""
        return self.vector_bytes // self.item

    @cached_property
    def panel_bytes(self) -> int:
        """Bytes of a row of a panel."""
        return self.panel_vectors * self.vector_bytes

    def num_vectors(self, size: int) -> int:
        """Vectors that hold so many elements."""
        return -(-size // self.lanes)

    def feature_panels(self, features: int) -> int:
        """Panels that hold so many features."""
        return -(-features * self.item // self.panel_bytes)

    @cached_property
    def unit_vecs(self) -> int:
        """Vectors that hold the hidden units."""
        return self.num_vectors(self.hidden)

    @property
    def out_vecs(self) -> int:
        """Vectors that hold h."""
        return self.num_vectors(self.out)

    @property
    def gate_stages(self) -> list[StageKernel]:
        """The stages that have gates."""
        return [stage for stage in self.stages if not stage.projects]

    @property
    def projections(self) -> list[StageKernel]:
        """The projection, if there is one."""
        return [stage for stage in self.stages if stage.projects]

    @property
    def num_gates(self) -> int:
        """Gates of all stages."""
        return sum(stage.num_gates for stage in self.gate_stages)

    def num_units(self, stage: StageKernel) -> int:
        """Units that a stage computes: S of a projection, else H."""
        return self.out if stage.projects else self.hidden

    def operand_size(self, stage: StageKernel) -> int:
        """Elements of a row of a stage's operand."""
        return self.hidden if stage.index else self.out

    def num_panels(self, stage: StageKernel) -> int:
        """Panels that hold a stage's columns."""
        return -(-self.num_vectors(self.num_units(stage)) * stage.num_gates // self.panel_vectors)

    @property
    def gate_panels(self) -> int:
        """Panels that hold the columns of all gates."""
        return sum(self.num_panels(stage) for stage in self.gate_stages)

    @property
    def peephole_panels(self) -> int:
        """Panels that hold the peephole weights."""
        return -(-self.unit_vecs * self.num_peepholes // self.panel_vectors)

    def k_padded(self, stage: StageKernel) -> int:
        """Elements of a row of a stage's gradients, padded to whole vectors: K of its GEMMs in backward."""
        return self.num_vectors(self.num_units(stage)) * stage.num_gates * self.lanes

    @property
    def gates_k_padded(self) -> int:
        """Elements of a row of the gradients of all gates, padded."""
        return sum(self.k_padded(stage) for stage in self.gate_stages)

    @property
    def block_col_vecs(self) -> int:
        """Vectors of columns of a block of units, in the stage where they are most."""
        return max(Blocking(stage.num_gates, self.panel_vectors).block_col_vecs for stage in self.stages)

    def masked_row(self, spec: RNNSpec) -> int:
        """Bytes from one row to the next of a layer's output after dropout."""
        return pad_against_conflicts(self.feature_panels(spec.output_size) * self.panel_bytes)
