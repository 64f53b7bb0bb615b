"""What the sizes of scratch regions depend on; :mod:`fusedrnn.engines.cpu.kernels.scratch` declares the regions.

A *row* or *stride* is the number of bytes from one row to the next.
"""

from __future__ import annotations

from types import SimpleNamespace

from fusedrnn.engines.cpu.kernels.scratch import pad_against_conflicts, round_up_to_cache_line
from fusedrnn.engines.cpu.kernels.stages import derivative_of
from fusedrnn.engines.cpu.plan.sizes import ThreadShare
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.spec import RNNSpec


def gates_stride(tiling: Tiling, unit_vecs: int) -> int:
    """The stride of the gates of so many unit vectors."""
    return pad_against_conflicts(unit_vecs * tiling.num_gates * tiling.vector_bytes)


def gradients_stride(tiling: Tiling) -> int:
    """The stride of the gate gradients of all stages."""
    return pad_against_conflicts(sum(tiling.k_padded(stage) for stage in tiling.stages) * tiling.item)


def forward_sizes(
    spec: RNNSpec, tiling: Tiling, steps: int, batch: int, share: ThreadShare, training: bool
) -> SimpleNamespace:
    """The sizes of a forward call."""
    sizes = _common_sizes(spec, tiling, batch, share)
    sizes.state_stride = pad_against_conflicts(tiling.unit_vecs * tiling.vector_bytes)
    sizes.masked_row = tiling.masked_row(spec) if training and spec.drops else 0
    biases = share.unit_vecs * tiling.num_gates * tiling.vector_bytes
    # A projection takes zeros from there, a panel of them.
    sizes.biases_size = max(round_up_to_cache_line(biases), tiling.panel_bytes)
    sizes.layer_output_row = pad_against_conflicts(spec.output_size * tiling.item)
    sizes.layer_output_size = steps * batch * sizes.layer_output_row
    # Layers write one and read the other in turns; in training the reserve holds them.
    sizes.num_layer_outputs = 0 if training else min(2, spec.num_layers - 1)
    return sizes


def backward_sizes(
    spec: RNNSpec, tiling: Tiling, steps: int, batch: int, share: ThreadShare, block: int, packed: int, recompute: bool
) -> SimpleNamespace:
    """The sizes of a backward call. A GEMM of the weight gradients takes ``block`` steps and packs ``packed`` bytes."""
    panel_bytes, panels = tiling.panel_bytes, tiling.feature_panels
    sizes = _common_sizes(spec, tiling, batch, share)
    sizes.block, sizes.gates_row = block, gradients_stride(tiling)
    # Gradients of a state; transposed gradients; gradients of the weights: of the input's, then of the recurrent ones.
    sizes.carried_stride = pad_against_conflicts(panels(spec.hidden_size) * panel_bytes)
    sizes.carried_size = batch * sizes.carried_stride
    sizes.transposed_stride = pad_against_conflicts(block * batch * tiling.vector_bytes)
    x_panels = max(panels(spec.layer_input_size(layer)) for layer in range(spec.num_layers))
    weight_panels = max(x_panels + panels(spec.state_size), panels(spec.hidden_size))
    sizes.weights_stride = pad_against_conflicts(weight_panels * panel_bytes)
    sizes.k_padded = sum(tiling.k_padded(stage) for stage in tiling.stages)
    sizes.pre_act_grad_vecs = sum(
        tiling.num_vectors(tiling.num_units(stage)) * stage.num_grads for stage in tiling.stages
    )
    # Rows and panels that a GEMM of the weight gradients packs at once.
    sizes.inner = share.block
    sizes.packed_panels = max(1, packed // (sizes.inner * panel_bytes))
    sizes.saved_vecs = len(derivative_of(spec.variant).saved) if recompute else 0
    sizes.recomputed_rows = share.chunk * share.rows if sizes.saved_vecs else 0
    sizes.masked_row = tiling.masked_row(spec)
    # A direction's part of dx: those of this layer and the one above exist, or of the two directions.
    sizes.dx_partial_row = pad_against_conflicts(max(spec.output_size, spec.input_size) * tiling.item)
    sizes.dx_partial_step = batch * sizes.dx_partial_row
    sizes.dx_partial_size = steps * sizes.dx_partial_step
    sizes.num_dx_partials = spec.num_directions * (2 if spec.num_layers > 1 else spec.num_directions - 1)
    return sizes


def _common_sizes(spec: RNNSpec, tiling: Tiling, batch: int, share: ThreadShare) -> SimpleNamespace:
    """The sizes that both have."""
    return SimpleNamespace(
        spec=spec,
        tiling=tiling,
        batch=batch,
        rows=share.rows,
        unit_vecs=share.unit_vecs,
        chunk=share.chunk,
        layer_dirs=share.grid.layer_dirs,
        row_groups=share.grid.rows,
        num_threads=share.num_threads,
        num_states=len(spec.state_names),
        num_stages=len(tiling.stages),
        # Row groups of pipelined layers publish their progress.
        num_progress=spec.num_layers * share.grid.rows * tiling.is_pipelined(share.grid.layer_dirs),
        gates_stride=gates_stride(tiling, share.unit_vecs),
        # The products of a block of units, before the cell's maths.
        recurrent_row=tiling.block_col_vecs * tiling.vector_bytes,
    )
