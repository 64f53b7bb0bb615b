"""The workspace of the forward and the backward kernels, each region declared once.

From a declaration, plans take offsets, and kernels take the fields of a struct. The sizes ``s`` are those that a plan
computes. Regions are declared here and not with the plan, because the order of the struct's fields is part of the
machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

from fusedrnn.engines.cpu.kernels.workspace_sizes import BackwardSizes, ForwardSizes
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.sync import BARRIER_BYTES, CACHE_LINE, PROGRESS_BYTES
from fusedrnn.runtime.buffers import round_up_to_cache_line

Sizes = TypeVar("Sizes")
_ADDRESS_BYTES = 8


OPERAND_ROW_OFFSET = CACHE_LINE
"""Where a converted row of operands begins in its memory: after the scale that it may have."""


def operand_row_bytes(size: int) -> int:
    """Bytes for a converted row of so many elements, in any format and for any length of vectors."""
    return OPERAND_ROW_OFFSET + round_up_to_cache_line(4 * size)


PACKED_K = 256
"""K of the part of a panel that GEMMs on unpacked weights pack at once; more if the gates of a unit vector are more."""


def packed_part_bytes(rows: int, gate_lanes: int, panel_bytes: int) -> int:
    """Bytes for GEMMs of at most so many rows on unpacked weights: the rows' addresses, then a packed part of a panel.

    ``gate_lanes`` are the elements of all gates of a unit vector.
    """
    return round_up_to_cache_line(_ADDRESS_BYTES * rows) + max(PACKED_K, gate_lanes) * panel_bytes


ROW_POSITION = Struct("time", "sequence", "time_before")
"""Where a row of a block of steps comes from; ``time_before`` is the time of the states that its step started from."""
ROW_PAIR = Struct("first_row", "num_rows")
"""Two rows of a step that one instruction multiplies, or the last one of a step."""


class Arena(Generic[Sizes]):
    """A piece of memory that consists of regions, each of which begins at a cache line.

    Args:
        stride: The name of the field for its size, which is the distance between two copies of it.
        regions: The size of each region: a function of the sizes of a plan.
    """

    def __init__(self, stride: str, **regions: Callable[[Sizes], int]) -> None:
        self._regions = regions
        self.names = tuple(regions)
        self.fields = (*(f"{name}_offset" for name in regions), stride)

    def place(self, sizes: Sizes) -> list[int]:
        """The offsets of the regions, then the size."""
        offsets = [0]
        for size in self._regions.values():
            offsets.append(offsets[-1] + round_up_to_cache_line(size(sizes)))
        return offsets

    def size(self, sizes: Sizes) -> int:
        """Bytes of the arena."""
        return self.place(sizes)[-1]


class WorkspaceLayout(NamedTuple):
    """The workspace of a plan."""

    offsets: Mapping[str, int]  # of each region in the workspace
    fields: Mapping[str, int]  # the values of the other fields of the kernels' struct
    zeroed: int  # bytes at the start of the workspace that must be zero when a call begins
    size: int  # bytes of the workspace


class WorkspaceRegions(Generic[Sizes]):
    """The regions of a kernel's workspace, which holds one or several copies of each arena, and strides within arenas.

    It begins with the barriers and the progress of layers, which must be zero.

    Attributes:
        fields: The struct's fields: addresses of the workspace's regions, offsets and sizes of the arenas, strides.
    """

    def __init__(self, workspace: Arena[Sizes], *arenas: Arena[Sizes], strides: tuple[str, ...]) -> None:
        self._workspace, self._arenas, self._strides = workspace, arenas, strides
        self.fields = (*workspace.names, *(name for arena in arenas for name in arena.fields), *strides)

    def lay_out(self, sizes: Sizes) -> WorkspaceLayout:
        """Place everything for the sizes of a plan."""
        *offsets, size = self._workspace.place(sizes)
        fields = {stride: getattr(sizes, stride) for stride in self._strides}
        for arena in self._arenas:
            fields.update(zip(arena.fields, arena.place(sizes), strict=True))
        return WorkspaceLayout(dict(zip(self._workspace.names, offsets, strict=True)), fields, offsets[2], size)


_STATES: Arena[ForwardSizes] = Arena(
    "states_stride",
    # h of even steps, then of odd steps: a step reads one while it writes the other.
    h=lambda s: 2 * s.batch * s.state_stride,
    c=lambda s: (s.num_states - 1) * s.batch * s.state_stride,
    # Operands of later stages, and the rows that reductions read.
    operands=lambda s: (s.num_operands + s.num_reduced_rows) * s.batch * s.state_stride,
    # h as GEMMs read it, if it is rounded as it is stored: of even steps, then of odd ones.
    h_operands=lambda s: 2 * s.batch * s.state_stride * s.stores_operands,
)
_FORWARD_THREAD: Arena[ForwardSizes] = Arena(
    "scratch_stride",
    # Addresses of a chunk's input rows, and of the rows that stages multiply; those of h twice.
    x_rows=lambda s: _ADDRESS_BYTES * s.chunk * s.rows,
    h_rows=lambda s: _ADDRESS_BYTES * (2 + s.num_operands) * s.rows,
    gates=lambda s: s.chunk * s.rows * s.gates_stride,
    recurrent=lambda s: max(s.rows * s.recurrent_row, s.one_recurrent_row),
    masked=lambda s: s.chunk * s.rows * s.masked_row,
    # Rows converted to the format of operands, and their addresses.
    operand_rows=lambda s: s.converted_rows * s.operand_row,
    operand_table=lambda s: s.converted_rows * _ADDRESS_BYTES,
    # The biases of the input, then those of the state.
    biases=lambda s: 2 * s.biases_size,
    # A packed part of a panel, for GEMMs on unpacked weights.
    unpacked=lambda s: s.unpacked_size,
    # Addresses of the part of rows that a head reads.
    head_table=lambda s: _ADDRESS_BYTES * s.head_rows,
)
FORWARD_REGIONS: WorkspaceRegions[ForwardSizes] = WorkspaceRegions(
    Arena(
        "size",
        barriers=lambda s: BARRIER_BYTES * (1 + s.layer_dirs * s.row_groups),
        progress=lambda s: PROGRESS_BYTES * s.num_progress,
        states=lambda s: max(s.num_directions, s.layer_dirs) * _STATES.size(s),
        scratch=lambda s: s.num_threads * _FORWARD_THREAD.size(s),
        layer_outputs=lambda s: s.num_layer_outputs * s.layer_output_size,
    ),
    _STATES, _FORWARD_THREAD,
    strides=("state_stride", "gates_stride", "masked_row", "biases_size", "operand_row"),
)  # fmt: skip

_DIRECTION_GROUP: Arena[BackwardSizes] = Arena(
    "group_stride",
    # Gate gradients of even steps, then of odd steps, for the recurrent GEMM; likewise of chunks, for dx.
    state_gates=lambda s: 2 * s.batch * s.gates_row,
    input_gates=lambda s: 2 * s.batch * s.chunk * s.gates_row,
    # Gradients of the states, from the step after; gradients of the operands of later stages, and what units add to the
    # gradients of means and variances.
    carried=lambda s: s.num_states * s.carried_size,
    operands=lambda s: (s.num_operands + s.num_moments) * s.carried_size,
    # Transposed gate gradients, and what is summed from them: gradients of weights and biases.
    transposed=lambda s: s.pre_act_grad_vecs * s.transposed_stride,
    weights=lambda s: s.k_padded * s.weights_stride,
    sums=lambda s: s.pre_act_grad_vecs * s.vector_bytes,
)
_BACKWARD_THREAD: Arena[BackwardSizes] = Arena(
    "scratch_stride",
    # Addresses of rows: two tables for each stage, one for a chunk; one for the states of a chunk that is recomputed.
    row_tables=lambda s: _ADDRESS_BYTES * ((2 * s.num_stages + s.chunk) * s.rows + s.recomputed_rows),
    row_positions=lambda s: ROW_POSITION.size * s.transposed_rows,
    row_pairs=lambda s: ROW_PAIR.size * s.row_pairs,
    # A row of zeros, the initial accumulators, then a panel of dx.
    panel=lambda s: s.panel_bytes * (1 + s.chunk * s.rows),
    packed=lambda s: s.packed_panels * s.inner * s.panel_bytes,
    recomputed=lambda s: s.recomputed_rows * s.unit_vecs * s.saved_vecs * s.vector_bytes,
    forward_gates=lambda s: s.recomputed_rows * s.gates_stride,
    recurrent=lambda s: s.recomputed_rows * s.recurrent_row,
    masked=lambda s: s.recomputed_rows * s.masked_row,
    # Rows converted to the format of operands, and their addresses.
    operand_rows=lambda s: s.converted_rows * s.operand_row,
    operand_table=lambda s: s.converted_rows * _ADDRESS_BYTES,
    # A packed part of a panel, for GEMMs on unpacked weights.
    unpacked=lambda s: s.unpacked_size,
    # The gradients of means and variances of each row.
    moments=lambda s: s.rows * s.num_moments * s.vector_bytes,
    # Addresses of the part of rows that a head reads.
    head_table=lambda s: _ADDRESS_BYTES * s.head_rows,
)
BACKWARD_REGIONS: WorkspaceRegions[BackwardSizes] = WorkspaceRegions(
    Arena(
        "size",
        barriers=lambda s: BARRIER_BYTES * (1 + s.layer_dirs * s.row_groups + s.layer_dirs),
        progress=lambda s: PROGRESS_BYTES * s.num_progress,
        groups=lambda s: s.layer_dirs * _DIRECTION_GROUP.size(s),
        scratch=lambda s: s.num_threads * _BACKWARD_THREAD.size(s),
        # Kernels read up to two panels past the end of the last row.
        dx_partials=lambda s: s.num_dx_partials * s.dx_partial_size + 2 * s.panel_bytes,
    ),
    _DIRECTION_GROUP, _BACKWARD_THREAD,
    strides=(
        "gates_row", "carried_size", "carried_stride", "transposed_stride", "weights_stride", "inner", "packed_panels",
        "gates_stride", "masked_row", "operand_row", "dx_partial_step", "dx_partial_row", "dx_partial_size",
    ),
)  # fmt: skip
