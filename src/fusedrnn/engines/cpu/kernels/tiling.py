"""How a spec's units and gates fill vectors and panels, and how memory is rounded up to lines of the cache."""

from __future__ import annotations

from dataclasses import dataclass

from fusedrnn.engines.cpu.kernels.stages import Blocking, StageKernel, lowered_cell, stage_kernels
from fusedrnn.engines.cpu.plan.sizes import Grid
from fusedrnn.jit.target import ITEM_SIZE, Target
from fusedrnn.spec import RNNSpec

_LINE = 64


def round_up_to_cache_line(size: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-size // _LINE) * _LINE


def pad_against_conflicts(size: int) -> int:
    """Rounded up to an odd number of cache lines: rows that far apart do not all fall into the same cache sets."""
    return (-(-size // _LINE) | 1) * _LINE


@dataclass(frozen=True)
class Tiling:
    """How one spec's units and gates fill vectors and panels on one target; the same for every problem size.

    Attributes:
        vector_bytes: Bytes of a vector.
        panel_vectors: Vectors of a panel.
        hidden: H.
        out: S, the size of h.
        stages: The stages of the cell.
        vectors: Gates that have element by element weights.
        item: Bytes of an element.
        directions: D.
    """

    vector_bytes: int
    panel_vectors: int
    hidden: int
    out: int
    stages: tuple[StageKernel, ...]
    vectors: int
    item: int
    directions: int

    @classmethod
    def of(cls, spec: RNNSpec, target: Target) -> Tiling:
        """The tiling of that spec's layers."""
        return cls(
            vector_bytes=target.vector_bits // 8,
            panel_vectors=target.tile[1],
            hidden=spec.hidden_size,
            out=spec.state_size,
            stages=stage_kernels(spec.variant),
            vectors=len(lowered_cell(spec.variant).peepholes),
            item=ITEM_SIZE[spec.dtype],
            directions=spec.num_directions,
        )

    def layers_at_once(self, grid: Grid) -> bool:
        """Whether layers run side by side: in a network of one direction, that is what groups of passes are."""
        return self.directions == 1 and grid[0] > 1

    @property
    def lanes(self) -> int:
        """Elements of a vector."""
        return self.vector_bytes // self.item

    def vectors_of(self, size: int) -> int:
        """Vectors that hold so many elements."""
        return -(-size // self.lanes)

    @property
    def unit_vectors(self) -> int:
        """Vectors that hold the hidden units."""
        return self.vectors_of(self.hidden)

    @property
    def out_vectors(self) -> int:
        """Vectors that hold h."""
        return self.vectors_of(self.out)

    @property
    def gate_stages(self) -> list[StageKernel]:
        """The stages that have gates."""
        return [stage for stage in self.stages if not stage.projects]

    @property
    def projections(self) -> list[StageKernel]:
        """The stage that has none, if there is one."""
        return [stage for stage in self.stages if stage.projects]

    @property
    def gates(self) -> int:
        """Gates of all stages."""
        return sum(stage.num_gates for stage in self.gate_stages)

    def size_of(self, stage: StageKernel) -> int:
        """Units for which a stage has columns."""
        return self.out if stage.projects else self.hidden

    def operand_size(self, stage: StageKernel) -> int:
        """Elements of what a stage multiplies."""
        return self.hidden if stage.index else self.out

    def columns_of(self, stage: StageKernel) -> int:
        """Panels that hold a stage's columns."""
        return -(-self.vectors_of(self.size_of(stage)) * stage.num_gates // self.panel_vectors)

    @property
    def columns(self) -> int:
        """Panels that hold all gates of all units."""
        return sum(self.columns_of(stage) for stage in self.gate_stages)

    def depth_of(self, stage: StageKernel) -> int:
        """Elements of a row of a stage's gradients."""
        return self.vectors_of(self.size_of(stage)) * stage.num_gates * self.lanes

    @property
    def depth(self) -> int:
        """Elements of a row of all gates' gradients."""
        return sum(self.depth_of(stage) for stage in self.gate_stages)

    @property
    def vector_panels(self) -> int:
        """Panels that hold the element by element weights."""
        return -(-self.unit_vectors * self.vectors // self.panel_vectors)

    @property
    def block_col_vecs(self) -> int:
        """Vectors of the columns of a block of units, in the stage where these are most."""
        return max(Blocking(stage.num_gates, self.panel_vectors).block_col_vecs for stage in self.stages)

    @property
    def panel_bytes(self) -> int:
        """Bytes of one row of a panel."""
        return self.panel_vectors * self.vector_bytes

    def panels_of(self, features: int) -> int:
        """Panels that hold that many features."""
        return -(-features * self.item // self.panel_bytes)

    def masked_row(self, spec: RNNSpec) -> int:
        """Bytes from one to the next copy of a layer's output."""
        return pad_against_conflicts(self.panels_of(spec.output_size) * self.panel_bytes)
