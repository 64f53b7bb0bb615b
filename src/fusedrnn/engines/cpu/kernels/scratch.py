"""The scratch memory of the forward and the backward kernels: what its regions hold and how large they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fusedrnn.engines.cpu.kernels.arena import Arena, Scratch
from fusedrnn.engines.cpu.kernels.stages import derivative_of
from fusedrnn.engines.cpu.kernels.tiling import Tiling, pad_against_conflicts, round_up_to_cache_line
from fusedrnn.jit.sync import BARRIER_BYTES, PROGRESS_BYTES
from fusedrnn.spec import RNNSpec

_POINTER_BYTES = 8


@dataclass(frozen=True)
class CallSizes:
    """What the sizes of scratch depend on.

    Attributes:
        steps, batch: T and N.
        layer_dirs, row_groups, unit_groups: The grid of threads.
        rows, unit_vecs: The rows and unit vectors of the thread that has most.
        chunk: Steps of an input GEMM, in backward of one for dx.
    """

    spec: RNNSpec
    tiling: Tiling
    steps: int
    batch: int
    layer_dirs: int
    row_groups: int
    unit_groups: int
    rows: int
    unit_vecs: int
    chunk: int

    @property
    def num_stages(self) -> int:
        """Stages of the cell."""
        return len(self.tiling.stages)

    @property
    def num_threads(self) -> int:
        """Threads in use."""
        return self.layer_dirs * self.row_groups * self.unit_groups

    @property
    def progress_bytes(self) -> int:
        """Bytes in which pipelined layers publish their progress."""
        return PROGRESS_BYTES * self.spec.num_layers * self.row_groups * self.tiling.is_pipelined(self.layer_dirs)

    @cached_property
    def gates_stride(self) -> int:
        """Bytes from one row of a thread's gates to the next."""
        return gates_stride(self.tiling, self.unit_vecs)

    @property
    def recurrent_row(self) -> int:
        """Bytes of the products of a block of units, before the cell's maths."""
        return self.tiling.block_col_vecs * self.tiling.vector_bytes


@dataclass(frozen=True)
class ForwardSizes(CallSizes):
    """The sizes of a forward call."""

    is_training: bool

    @cached_property
    def state_stride(self) -> int:
        """Bytes from one row of a state to the next."""
        return pad_against_conflicts(self.tiling.unit_vecs * self.tiling.vector_bytes)

    @cached_property
    def masked_row(self) -> int:
        """Bytes from one row to the next of inputs after dropout."""
        return self.tiling.masked_row(self.spec) if self.is_training and self.spec.drops else 0

    @cached_property
    def biases_size(self) -> int:
        """Bytes of the biases of a thread's units; a projection takes zeros from there, a panel of them."""
        row = self.unit_vecs * self.tiling.num_gates * self.tiling.vector_bytes
        return max(round_up_to_cache_line(row), self.tiling.panel_bytes)

    @cached_property
    def layer_output_row(self) -> int:
        """Bytes from one row of a layer's output to the next."""
        return pad_against_conflicts(self.spec.output_size * self.tiling.item)

    @property
    def layer_output_size(self) -> int:
        """Bytes of a layer's output."""
        return self.steps * self.batch * self.layer_output_row


_STATES = Arena[ForwardSizes](
    "states_stride",
    # h of even steps, then of odd steps: a step reads one while it writes the other.
    h=lambda s: 2 * s.batch * s.state_stride,
    c=lambda s: (len(s.spec.state_names) - 1) * s.batch * s.state_stride,
    operands=lambda s: (s.num_stages - 1) * s.batch * s.state_stride,
)
_FORWARD_THREAD = Arena[ForwardSizes](
    "scratch_stride",
    # Addresses of a chunk's input rows, and of the rows that stages multiply: h's twice.
    x_rows=lambda s: _POINTER_BYTES * s.chunk * s.rows,
    h_rows=lambda s: _POINTER_BYTES * (1 + s.num_stages) * s.rows,
    gates=lambda s: s.chunk * s.rows * s.gates_stride,
    recurrent=lambda s: s.rows * s.recurrent_row,
    masked=lambda s: s.chunk * s.rows * s.masked_row,
    # Those of the input, then those of the state.
    biases=lambda s: 2 * s.biases_size,
)
FORWARD = Scratch(
    Arena[ForwardSizes](
        "size",
        barriers=lambda s: BARRIER_BYTES * (1 + s.layer_dirs * s.row_groups),
        progress=lambda s: s.progress_bytes,
        states=lambda s: max(s.spec.num_directions, s.layer_dirs) * _STATES.size(s),
        scratch=lambda s: s.num_threads * _FORWARD_THREAD.size(s),
        # Layers write one and read the other in turns; in training the reserve holds them.
        layer_outputs=lambda s: 0 if s.is_training else min(2, s.spec.num_layers - 1) * s.layer_output_size,
    ),
    _STATES, _FORWARD_THREAD,
    strides=("state_stride", "gates_stride", "masked_row", "biases_size"),
)  # fmt: skip


@dataclass(frozen=True)
class BackwardSizes(CallSizes):
    """The sizes of a backward call.

    Attributes:
        block: Steps of a GEMM of the weight gradients.
        gemm_rows: Rows that such a GEMM takes at once, within reason.
        packed_bytes: Bytes of packed operands that should stay in L2.
        recompute: Whether the values that the gradients need are computed again.
    """

    block: int
    gemm_rows: int
    packed_bytes: int
    recompute: bool

    @cached_property
    def gates_row(self) -> int:
        """Bytes from one row of gradients to the next: those of the gates, then those of a projection."""
        return gradients_stride(self.tiling)

    @cached_property
    def carried_stride(self) -> int:
        """Bytes from one row to the next of the gradient of a state."""
        return pad_against_conflicts(self.tiling.feature_panels(self.spec.hidden_size) * self.tiling.panel_bytes)

    @property
    def carried_size(self) -> int:
        """Bytes of the gradient of a state."""
        return self.batch * self.carried_stride

    @cached_property
    def transposed_stride(self) -> int:
        """Bytes from one vector of transposed gradients to the next."""
        return pad_against_conflicts(self.block * self.batch * self.tiling.vector_bytes)

    @cached_property
    def weights_stride(self) -> int:
        """Bytes from one row of weight gradients to the next: those of the input weights, then the recurrent ones."""
        spec, tiling = self.spec, self.tiling
        x_panels = max(tiling.feature_panels(spec.layer_input_size(layer)) for layer in range(spec.num_layers))
        both = x_panels + tiling.feature_panels(spec.state_size)
        return pad_against_conflicts(max(both, tiling.feature_panels(spec.hidden_size)) * tiling.panel_bytes)

    @cached_property
    def pre_act_grad_vecs(self) -> int:
        """Vectors of distinct pre-activation gradients of a row."""
        tiling = self.tiling
        return sum(tiling.num_vectors(tiling.num_units(stage)) * stage.num_grads for stage in tiling.stages)

    @cached_property
    def inner(self) -> int:
        """Rows that a GEMM of the weight gradients takes at once."""
        return min(self.block * self.batch, self.gemm_rows)

    @cached_property
    def packed_panels(self) -> int:
        """Panels that such a GEMM packs at once."""
        return max(1, self.packed_bytes // (self.inner * self.tiling.panel_bytes))

    @property
    def forward_gates_stride(self) -> int:
        """Bytes from one row of recomputed gates to the next."""
        return self.gates_stride

    @cached_property
    def masked_row(self) -> int:
        """Bytes from one row to the next of inputs after dropout."""
        return self.tiling.masked_row(self.spec)

    @cached_property
    def saved_vecs(self) -> int:
        """Vectors that are computed again for each unit vector."""
        return len(derivative_of(self.spec.variant).saved) if self.recompute else 0

    @property
    def recomputed_rows(self) -> int:
        """Rows of a chunk for which values are computed again."""
        return self.chunk * self.rows if self.saved_vecs else 0

    @cached_property
    def dx_partial_row(self) -> int:
        """Bytes from one row to the next of a direction's part of dx."""
        return pad_against_conflicts(max(self.spec.output_size, self.spec.input_size) * self.tiling.item)

    @property
    def dx_partial_step(self) -> int:
        """Bytes of a step of a direction's part of dx."""
        return self.batch * self.dx_partial_row

    @property
    def dx_partial_size(self) -> int:
        """Bytes of a direction's part of dx."""
        return self.steps * self.dx_partial_step

    @property
    def num_dx_partials(self) -> int:
        """Parts of dx that exist at a time: those of the layer above and of this one, or of two directions."""
        return self.spec.num_directions * (2 if self.spec.num_layers > 1 else self.spec.num_directions - 1)


_DIRECTION_GROUP = Arena[BackwardSizes](
    "group_stride",
    # Gate gradients of even steps, then of odd steps, for the recurrent GEMM; likewise of chunks, for dx.
    state_gates=lambda s: 2 * s.batch * s.gates_row,
    input_gates=lambda s: 2 * s.batch * s.chunk * s.gates_row,
    # Gradients of the states, from the step after; of the operands of later stages.
    carried=lambda s: len(s.spec.state_names) * s.carried_size,
    operands=lambda s: (s.num_stages - 1) * s.carried_size,
    # Transposed gate gradients, and what is summed from them: gradients of weights and biases.
    transposed=lambda s: s.pre_act_grad_vecs * s.transposed_stride,
    weights=lambda s: sum(s.tiling.k_padded(stage) for stage in s.tiling.stages) * s.weights_stride,
    sums=lambda s: s.pre_act_grad_vecs * s.tiling.vector_bytes,
)
_BACKWARD_THREAD = Arena[BackwardSizes](
    "scratch_stride",
    # Addresses of rows: two tables for each stage, one for a chunk.
    row_tables=lambda s: _POINTER_BYTES * (2 * s.num_stages + s.chunk) * s.rows,
    # Time and sequence of each row of a block.
    places=lambda s: 2 * _POINTER_BYTES * s.block * s.batch,
    # A row of zeros, the initial accumulators, then a panel of dx.
    panel=lambda s: s.tiling.panel_bytes * (1 + s.chunk * s.rows),
    packed=lambda s: s.packed_panels * s.inner * s.tiling.panel_bytes,
    recomputed=lambda s: s.recomputed_rows * s.unit_vecs * s.saved_vecs * s.tiling.vector_bytes,
    forward_gates=lambda s: s.recomputed_rows * s.forward_gates_stride,
    recurrent=lambda s: s.recomputed_rows * s.recurrent_row,
    masked=lambda s: s.recomputed_rows * s.masked_row * s.spec.drops,
)
BACKWARD = Scratch(
    Arena[BackwardSizes](
        "size",
        barriers=lambda s: BARRIER_BYTES * (1 + s.layer_dirs * s.row_groups + s.layer_dirs),
        progress=lambda s: s.progress_bytes,
        groups=lambda s: s.layer_dirs * _DIRECTION_GROUP.size(s),
        scratch=lambda s: s.num_threads * _BACKWARD_THREAD.size(s),
        # Kernels read up to two panels past the end of the last row.
        dx_partials=lambda s: s.num_dx_partials * s.dx_partial_size + 2 * s.tiling.panel_bytes,
    ),
    _DIRECTION_GROUP, _BACKWARD_THREAD,
    strides=(
        "gates_row", "carried_size", "carried_stride", "transposed_stride", "weights_stride", "inner", "packed_panels",
        "forward_gates_stride", "masked_row", "dx_partial_step", "dx_partial_row", "dx_partial_size",
    ),
)  # fmt: skip


def gates_stride(tiling: Tiling, unit_vecs: int) -> int:
    """Bytes from one row of the gates of so many unit vectors to the next."""
    return pad_against_conflicts(unit_vecs * tiling.num_gates * tiling.vector_bytes)


def gradients_stride(tiling: Tiling) -> int:
    """Bytes from one row of the gradients of all stages to the next."""
    return pad_against_conflicts(sum(tiling.k_padded(stage) for stage in tiling.stages) * tiling.item)
