"""How the units and gates of a spec fill vectors and panels on a target; the same for all problem sizes."""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.lowered_cell import (
    Blocking,
    LoweredStage,
    column_groups,
    input_groups,
    input_only_groups,
    is_plain,
    kept_products,
    lowered_cell,
    lowered_stages,
    moments,
    reduced_rows,
)
from fusedrnn.engines.cpu.kernels.products import PRODUCTS, ProductsClass, gradient_format, products_class
from fusedrnn.jit.target import ITEM_SIZE, Target
from fusedrnn.layout import Kind
from fusedrnn.lazy import cached_property
from fusedrnn.quantized_params import is_matrix
from fusedrnn.runtime.buffers import pad_against_conflicts
from fusedrnn.spec import RNNSpec

_LONGEST_VECTOR = 64
"""Bytes of a vector on the target with the longest ones."""


def unsupported_heads(spec: RNNSpec) -> str | None:
    """Why there are no kernels for the heads of a spec; None if there are, or if it has no heads.

    Heads must be a whole number of the longest vectors, so all targets refuse the same heads.
    """
    size, multiple = spec.hidden_size // spec.heads, _LONGEST_VECTOR // ITEM_SIZE[spec.dtype]
    if spec.heads == 1 or not size % multiple:
        return None
    return f"a head must have a multiple of {multiple} units in {spec.dtype}; got {size} in each of {spec.mode!r}"


class Tiling:
    """The vectors and panels of a spec's weights, gates and states on a target.

    A *unit vector* is a vector of hidden units; each gate has one vector for it. A *stride* or *row* is the number of
    bytes from one row to the next.

    Attributes:
        spec: The network.
        target: The instruction set.
        hidden: H.
        out: S, the size of h.
        item: Bytes of an element.
        vector_bytes: Bytes of a vector.
        lanes: Elements of a vector.
        panel_vectors: Vectors of a panel.
        panel_bytes: Bytes of a row of a panel.
        gemm_stages: The stages of the cell that have a GEMM.
        later_gemm_stages: Those of ``gemm_stages`` whose operands the step computes.
        num_barriers: Barriers of a step, if threads share rows.
        num_reduced_rows: Rows of values that reductions read.
        num_moments: Means and variances that reductions compute.
        num_masks: Random masks inside a step.
        column_groups: The stages that have a GEMM in each step or gradients of parameters, then the groups of gates
            whose part from the input belongs to no stage.
        recurrent_stages: Those of ``gemm_stages`` that multiply by recurrent weights: all but the projection.
        input_groups: The column groups that have columns of the input weights, in the order of these columns.
        projections: The projection, if there is one.
        num_gates: Gates that have a part from the input.
        kept_products: The products that later stages read.
        reads_raw_input: Whether the cell reads the layer's input itself.
        num_param_vectors: Parameters of one number for each unit, such as peephole weights.
        can_read_unpacked: Whether kernels can read unpacked weights: the cell has one stage and no parameters of its
            own, and the format of operands has GEMMs on unpacked weights.
        multiplies_tiles: Whether GEMMs multiply tiles.
        weight_vector_bytes: Bytes of the packed weights of one vector of columns, for one k.
        unit_vecs: Unit vectors.
        out_vecs: Vectors that hold h.
    """

    def __init__(self, spec: RNNSpec, target: Target) -> None:
        cell = lowered_cell(spec.variant)
        if (refusal := unsupported_heads(spec)) is not None:
            raise NotImplementedError(refusal)
        self.spec, self.target = spec, target
        self.hidden, self.out, self.item = spec.hidden_size, spec.state_size, ITEM_SIZE[spec.dtype]
        self.vector_bytes, self.panel_vectors = target.vector_bits // 8, target.tile[1]
        self.lanes, self.panel_bytes = self.vector_bytes // self.item, self.panel_vectors * self.vector_bytes
        stages = lowered_stages(spec.variant)
        self.gemm_stages = tuple(stage for stage in stages if stage.multiplies)
        self.later_gemm_stages = [stage for stage in self.gemm_stages if stage.operand_number]
        self.num_barriers = len(stages)
        self.num_reduced_rows, self.num_moments = len(reduced_rows(stages)), len(moments(stages))
        self.num_masks = len(cell.masks)
        self.column_groups = column_groups(stages, input_only_groups(spec.variant))
        self.recurrent_stages = [stage for stage in self.gemm_stages if not stage.projects]
        self.input_groups = input_groups(self.column_groups)
        self.projections = [stage for stage in self.gemm_stages if stage.projects]
        self.num_gates = sum(stage.num_gates for stage in self.input_groups)
        self.kept_products = kept_products(self.gemm_stages)
        self.reads_raw_input = cell.reads_raw_input
        self.num_param_vectors = len(cell.param_vectors)
        reads_unpacked = PRODUCTS[spec.operand_format].reads_unpacked and spec.operand_format not in target.dot_products
        self.can_read_unpacked = is_plain(cell) and reads_unpacked
        self.multiplies_tiles = target.multiplies_tiles(spec.operand_format)
        self.weight_vector_bytes = self.lanes * ITEM_SIZE[spec.operand_format if target.narrow_weights else spec.dtype]
        self.unit_vecs, self.out_vecs = self.num_vectors(self.hidden), self.num_vectors(self.out)

    @cached_property
    def scale_offsets(self) -> dict[tuple[int, int, Kind], int]:
        """Where the scales of each quantized matrix are, after a copy of the parameters; by layer, direction, kind."""
        layout, offsets = self.spec.layout, dict[tuple[int, int, Kind], int]()
        if not self.products.has_scales:
            return offsets
        end = layout.size * self.item
        for entry in layout.by_layer_direction:
            if is_matrix(entry):
                offsets[entry.layer, entry.direction, entry.kind] = end
                end += entry.shape[0] * self.item
        return offsets

    @cached_property
    def ranges_offset(self) -> int | None:
        """Where the ranges of operands are, after all scales; None in formats that do not quantize operands."""
        if not (self.products.has_scales and self.converts_rows):
            return None
        num_scales = sum(int(self.spec.layout.entry(*key).shape[0]) for key in self.scale_offsets)
        return (self.spec.layout.size + num_scales) * self.item

    def is_pipelined(self, layer_dir_groups: int) -> bool:
        """Whether so many groups of layer-directions are pipelined layers: several are if there is one direction."""
        return self.spec.num_directions == 1 and layer_dir_groups > 1

    def num_vectors(self, size: int) -> int:
        """Vectors that hold so many elements."""
        return -(-size // self.lanes)

    def feature_panels(self, features: int) -> int:
        """Panels that hold so many features."""
        return -(-features * self.item // self.panel_bytes)

    def num_units(self, stage: LoweredStage) -> int:
        """Units that a stage computes: S of a projection, else H."""
        return self.out if stage.projects else self.hidden

    def operand_size(self, stage: LoweredStage) -> int:
        """Elements of a row of a stage's operand."""
        return self.hidden if stage.index else self.out

    def gemm_k(self, stage: LoweredStage) -> int:
        """Elements of a stage's operand that a unit is multiplied with; with several heads, those of its head."""
        return self.operand_size(stage) // self.spec.heads

    def num_panels(self, stage: LoweredStage) -> int:
        """Panels that hold a stage's columns."""
        return -(-self.num_vectors(self.num_units(stage)) * stage.num_gates // self.panel_vectors)

    @cached_property
    def products(self) -> ProductsClass:
        """How GEMMs multiply, and so how weights are packed."""
        return products_class(self.spec.operand_format, self.target)

    @cached_property
    def gradient_products(self) -> ProductsClass:
        """How the GEMMs of the weights' gradients multiply. Their groups are rows of the batch."""
        return products_class(gradient_format(self.spec.operand_format, self.target), self.target)

    @property
    def converts_rows(self) -> bool:
        """Whether rows of operands are converted."""
        return self.spec.compute is not None and self.products.converts_rows

    def packed_bytes(self, k: int) -> int:
        """Bytes of a panel of packed weights with so many rows, the panel's head included."""
        groups = self.products.head - (-k // self.products.group)
        return groups * self.products.group * self.panel_vectors * self.weight_vector_bytes

    def k_padded(self, *stages: LoweredStage) -> int:
        """Elements of a row of these stages' gradients, padded to whole vectors: K of their GEMMs in backward."""
        return sum(self.num_vectors(self.num_units(stage)) * stage.num_gates * self.lanes for stage in stages)

    @property
    def block_col_vecs(self) -> int:
        """Vectors of columns of a block of units, in the stage that has the most of them."""
        return self._block_col_vecs(1)

    @property
    def one_row_block_col_vecs(self) -> int:
        """The same for a step of one row."""
        return self._block_col_vecs(self.target.one_row_panels)

    def _block_col_vecs(self, panels: int) -> int:
        vectors = panels * self.panel_vectors
        return max((Blocking(stage.num_gates, vectors).block_col_vecs for stage in self.gemm_stages), default=0)

    def gates_stride(self, unit_vecs: int) -> int:
        """The stride of rows of gates of so many unit vectors, and of what follows them: see kernels/row_values.py."""
        vectors = self.num_gates + len(self.kept_products) + self.reads_raw_input
        total = unit_vecs * vectors + (unit_vecs + 2 * self.panel_vectors) * self.num_masks + self.num_moments
        return pad_against_conflicts(total * self.vector_bytes)

    @property
    def gradients_stride(self) -> int:
        """The stride of rows of gradients: of the gates of all stages, then of the raw input."""
        raw = self.reads_raw_input * self.unit_vecs * self.lanes
        return pad_against_conflicts((self.k_padded(*self.column_groups) + raw) * self.item)

    @property
    def masked_row(self) -> int:
        """The row of a layer's input after dropout; 0 if nothing is dropped."""
        spec = self.spec
        sizes = [spec.layer_input_size(layer) for layer in range(min(2, spec.num_layers)) if spec.dropout_of(layer)]
        return pad_against_conflicts(self.feature_panels(max(sizes)) * self.panel_bytes) if sizes else 0
