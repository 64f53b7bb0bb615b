"""The sizes that the regions of a workspace depend on; a plan computes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorkspaceSizes:
    """What forward and backward have in common. Rows, vectors and the like are those of the thread with most to do.

    Attributes:
        batch: N.
        rows: Sequences.
        unit_vecs: Unit vectors.
        chunk: Steps of a chunk.
        num_directions: D.
        layer_dirs, row_groups: Groups of layer-directions and of rows in the grid.
        num_threads: Threads in use.
        num_states: States of the cell.
        num_stages: Stages with a GEMM.
        head_rows: Rows of which a head reads a part; 0 where weights are full.
        num_operands: Stages whose operands a step computes.
        num_reduced_rows: Rows that reductions read.
        num_moments: Means and variances that reductions compute.
        num_progress: Row groups that publish their progress: those of pipelined layers.
        gates_stride: Bytes from one row of gates to the next.
        unpacked_size: Bytes for GEMMs on unpacked weights.
        recurrent_row: Bytes of a row of a block's products.
        masked_row: Bytes of a row of the layer's input after dropout.
        converted_rows: Rows converted to the format of operands.
        operand_row: Bytes of such a row.
        vector_bytes: Bytes of a vector.
        panel_bytes: Bytes of a row of a panel.
    """

    batch: int
    rows: int
    unit_vecs: int
    chunk: int
    num_directions: int
    layer_dirs: int
    row_groups: int
    num_threads: int
    num_states: int
    num_stages: int
    head_rows: int
    num_operands: int
    num_reduced_rows: int
    num_moments: int
    num_progress: int
    gates_stride: int
    unpacked_size: int
    recurrent_row: int
    masked_row: int
    converted_rows: int
    operand_row: int
    vector_bytes: int
    panel_bytes: int


@dataclass(frozen=True, kw_only=True)
class ForwardSizes(WorkspaceSizes):
    """The sizes of a forward call.

    Attributes:
        state_stride: Bytes from one row of a state to the next.
        one_recurrent_row: Bytes of a row of a block's products, in a GEMM of one row.
        stores_operands: Whether results that GEMMs read are converted as they are stored.
        biases_size: Bytes of the biases of the input, and of those of the state.
        layer_output_row, layer_output_size: Bytes of a row of a layer's output, and of all rows.
        num_layer_outputs: Outputs of layers that are in the workspace.
    """

    state_stride: int
    one_recurrent_row: int
    stores_operands: bool
    biases_size: int
    layer_output_row: int
    layer_output_size: int
    num_layer_outputs: int


@dataclass(frozen=True, kw_only=True)
class BackwardSizes(WorkspaceSizes):
    """The sizes of a backward call.

    Attributes:
        transposed_rows: Rows of transposed gradients: of a block of steps, and those that the block before it left.
        gates_row: Bytes of a row of gate gradients.
        carried_stride, carried_size: Bytes from one row of a state's gradients to the next, and of all rows.
        transposed_stride: Bytes from one vector of transposed gradients to the next.
        weights_stride: Bytes from one row of the weight gradients to the next.
        k_padded: Rows of the weight gradients.
        pre_act_grad_vecs: Distinct vectors of pre-activation gradients.
        row_pairs: Pairs of rows of a block, where pairs are multiplied.
        inner, packed_panels: Groups of rows and panels that a GEMM of the weight gradients packs at once.
        saved_vecs: Vectors that are computed again for each unit vector.
        recomputed_rows: Rows of a chunk that is computed again.
        dx_partial_row, dx_partial_step, dx_partial_size: Bytes of a row, of a step and of all steps of a direction's
            part of dx.
        num_dx_partials: Such parts.
    """

    transposed_rows: int
    gates_row: int
    carried_stride: int
    carried_size: int
    transposed_stride: int
    weights_stride: int
    k_padded: int
    pre_act_grad_vecs: int
    row_pairs: int
    inner: int
    packed_panels: int
    saved_vecs: int
    recomputed_rows: int
    dx_partial_row: int
    dx_partial_step: int
    dx_partial_size: int
    num_dx_partials: int
