"""The plan of a call: how threads divide it, and the layout of its workspace; made once for a problem, printable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusedrnn.engines.cpu import tuning as tunings
from fusedrnn.engines.cpu.kernels.lowered_cell import derivative_of
from fusedrnn.engines.cpu.kernels.row_groups import K_BLOCK_ROWS
from fusedrnn.engines.cpu.kernels.tile_gemm import GROUPS
from fusedrnn.engines.cpu.kernels.workspace import (
    BACKWARD_REGIONS,
    FORWARD_REGIONS,
    WorkspaceLayout,
    operand_row_bytes,
    packed_part_bytes,
)
from fusedrnn.engines.cpu.kernels.workspace_sizes import BackwardSizes, ForwardSizes
from fusedrnn.engines.cpu.plan import partition
from fusedrnn.engines.cpu.plan.sizes import LargestShare, Phase, ProblemSize, ThreadGrid
from fusedrnn.engines.cpu.plan.thread_trials import Forecast
from fusedrnn.engines.cpu.tuning import Tuning
from fusedrnn.jit.target import Target
from fusedrnn.runtime.buffers import pad_against_conflicts, round_up_to_cache_line
from fusedrnn.spec import RNNSpec


@dataclass(frozen=True)
class Plan:
    """How a call is divided among threads, and the layout of its workspace.

    Attributes:
        phase: What the call computes.
        steps, batch: T and N.
        share: The largest share of a thread.
        bounds: The first row or unit vector of each group, and the end, by the names of the kernels' fields.
        workspace: The layout of the workspace.
        forecast: Predicted times; None on one thread, or if something other than the cost model chose the grid.
        layer_output_row, layer_output_size: In inference, bytes of a row of a layer's output, and of all rows.
        nontemporal_output: Whether stores of the output bypass the caches.
        recomputes: In backward, whether values that were not saved are computed again.
    """

    phase: Phase
    steps: int
    batch: int
    share: LargestShare
    bounds: Mapping[str, tuple[int, ...]]
    workspace: WorkspaceLayout
    forecast: Forecast | None
    layer_output_row: int = 0
    layer_output_size: int = 0
    nontemporal_output: bool = False
    recomputes: bool = False

    @property
    def grid(self) -> ThreadGrid:
        """How threads divide the problem."""
        return self.share.grid

    @property
    def num_threads(self) -> int:
        """Threads in use."""
        return self.grid.num_threads

    @property
    def row_starts(self) -> tuple[int, ...]:
        """The first row of each group, and the end."""
        return self.bounds["row_starts"]

    def __str__(self) -> str:
        layer_dirs, rows, units = self.grid
        prefix, gemms = "", f"{self.share.chunk} step(s) per input GEMM"
        if self.phase == "backward":
            prefix = "backward of "
            gemms = f"{self.share.chunk} step(s) per gradient GEMM of inputs, {self.share.block} of weights"
        return (
            f"{prefix}T={self.steps} N={self.batch}: {self.num_threads} thread(s) = {layer_dirs} direction(s) or "
            f"layer(s) at once x {rows} row group(s) x {units} unit group(s); {gemms}; "
            f"workspace {self.workspace.size / 2**20:.2f} MiB"
        )


def make_plan(
    spec: RNNSpec,
    target: Target,
    steps: int,
    batch: int,
    threads: int,
    phase: Phase = "inference",
    *,
    recompute: bool = False,
    spinning: bool = False,
    packed: bool = False,
    tuning: Tuning | None = None,
) -> Plan:
    """Plan T steps of N sequences on at most so many threads, which are asleep when the call comes, or ``spinning``.

    ``recompute`` is for backward with a reserve that holds the states alone. ``packed`` says that the weights are
    packed, even if the call is short.
    """
    tuning = tuning or tunings.current()
    problem = ProblemSize(spec, target, steps, batch, phase, tuning, packed=packed)
    share, forecast = partition.choose_share(problem, threads, spinning, tuning)
    grid = share.grid
    bounds = {
        "row_starts": _bounds(batch, grid.rows),
        "unit_starts": _bounds(problem.unit_vecs, grid.units),
        "out_starts": _bounds(problem.out_vecs, grid.units),
    }
    if phase != "backward":
        sizes = _forward_sizes(problem, share)
        # With GEMMs at each step, stores take no time of their own.
        nontemporal_output = not problem.gemm_stages and sizes.layer_output_size > tuning.max_cached_output_bytes
        return Plan(
            phase, steps, batch, share, bounds, FORWARD_REGIONS.lay_out(sizes), forecast,
            layer_output_row=sizes.layer_output_row, layer_output_size=sizes.layer_output_size,
            nontemporal_output=nontemporal_output,
        )  # fmt: skip
    everyone = grid.rows * grid.units
    bounds["weight_starts"] = _bounds(problem.unit_vecs, everyone)
    bounds["out_weight_starts"] = _bounds(problem.out_vecs, everyone)
    backward_sizes = _backward_sizes(problem, share, tuning.l2_bytes // 2, recompute)
    return Plan(
        phase, steps, batch, share, bounds, BACKWARD_REGIONS.lay_out(backward_sizes), forecast,
        recomputes=backward_sizes.recomputed_rows > 0,
    )  # fmt: skip


def _bounds(count: int, groups: int) -> tuple[int, ...]:
    """The first item of each group, and the end."""
    return tuple(count * group // groups for group in range(groups + 1))


def _forward_sizes(problem: ProblemSize, share: LargestShare) -> ForwardSizes:
    """The sizes of a forward call."""
    spec, training = problem.spec, problem.phase == "training"
    biases = share.unit_vecs * problem.num_gates * problem.vector_bytes
    # A projection keeps its zeros there: as many as a GEMM of one row reads.
    zeros = problem.target.one_row_panels * problem.panel_bytes
    layer_output_row = pad_against_conflicts(spec.output_size * problem.item)
    return ForwardSizes(
        **_common_sizes(problem, share),
        masked_row=problem.masked_row if training else 0,
        converted_rows=share.chunk * share.rows if problem.converts_rows else 0,
        head_rows=share.rows * (spec.heads > 1),
        state_stride=pad_against_conflicts(problem.unit_vecs * problem.vector_bytes),
        one_recurrent_row=problem.one_row_block_col_vecs * problem.vector_bytes,
        stores_operands=problem.converts_rows and not problem.products.has_scales and bool(problem.gemm_stages),
        biases_size=max(round_up_to_cache_line(biases), zeros),
        layer_output_row=layer_output_row,
        layer_output_size=problem.steps * problem.batch * layer_output_row,
        # Layers take turns with two buffers: each reads one and writes the other. In training the reserve has outputs.
        num_layer_outputs=0 if training else min(2, spec.num_layers - 1),
    )


def _backward_sizes(problem: ProblemSize, share: LargestShare, packed: int, recompute: bool) -> BackwardSizes:
    """The sizes of a backward call. A GEMM of the weight gradients packs ``packed`` bytes."""
    spec, panel_bytes, panels = problem.spec, problem.panel_bytes, problem.feature_panels
    carried_stride = pad_against_conflicts(panels(spec.hidden_size) * panel_bytes)
    weight_panels = max(panels(max(problem.inputs)) + panels(spec.state_size), panels(spec.hidden_size))
    saved_vecs = len(derivative_of(spec.variant).saved) if recompute else 0
    recomputed_rows = share.chunk * share.rows if saved_vecs else 0
    dx_partial_row = pad_against_conflicts(max(spec.output_size, spec.input_size) * problem.item)
    transposed_rows, inner = share.block * problem.batch, share.block_rows
    if problem.multiplies_tiles:  # whole K-blocks of pairs of rows; a block leaves rows for the next one
        transposed_rows, inner = transposed_rows + K_BLOCK_ROWS, -(-inner // K_BLOCK_ROWS) * GROUPS
    return BackwardSizes(
        **_common_sizes(problem, share),
        masked_row=problem.masked_row,
        converted_rows=recomputed_rows if problem.converts_rows else 0,
        head_rows=max(share.rows, recomputed_rows) * (spec.heads > 1),
        gates_row=problem.gradients_stride,
        carried_stride=carried_stride,
        carried_size=problem.batch * carried_stride,
        transposed_rows=transposed_rows,
        transposed_stride=pad_against_conflicts(transposed_rows * problem.vector_bytes),
        # Gradients of the input weights, then of the recurrent weights.
        weights_stride=pad_against_conflicts(weight_panels * panel_bytes),
        k_padded=problem.k_padded(*problem.column_groups),
        pre_act_grad_vecs=sum(
            problem.num_vectors(problem.num_units(stage)) * stage.num_grads for stage in problem.column_groups
        ),
        # A pair has at least one row.
        row_pairs=share.block * problem.batch if problem.target.multiplies_pairs(spec.operand_format) else 0,
        inner=inner,
        packed_panels=max(1, packed // (inner * panel_bytes)),
        saved_vecs=saved_vecs,
        recomputed_rows=recomputed_rows,
        # A direction's parts of dx: for this layer and the one above. A single layer has them with two directions only.
        dx_partial_row=dx_partial_row,
        dx_partial_step=problem.batch * dx_partial_row,
        dx_partial_size=problem.steps * problem.batch * dx_partial_row,
        num_dx_partials=spec.num_directions * (2 if spec.num_layers > 1 else spec.num_directions - 1),
    )


def _common_sizes(problem: ProblemSize, share: LargestShare) -> dict[str, int]:
    """The sizes that forward and backward compute in the same way."""
    spec, grid = problem.spec, share.grid
    gemm_rows, gate_lanes = share.chunk * share.rows, problem.num_gates * problem.lanes
    return {
        "batch": problem.batch, "rows": share.rows, "unit_vecs": share.unit_vecs, "chunk": share.chunk,
        "num_directions": spec.num_directions, "layer_dirs": grid.layer_dirs, "row_groups": grid.rows,
        "num_threads": grid.num_threads, "num_states": len(spec.state_names), "num_stages": len(problem.gemm_stages),
        "num_operands": len(problem.later_gemm_stages),
        "num_reduced_rows": problem.num_reduced_rows, "num_moments": problem.num_moments,
        "num_progress": spec.num_layers * grid.rows * problem.is_pipelined(grid.layer_dirs),
        "gates_stride": problem.gates_stride(share.unit_vecs),
        "unpacked_size": packed_part_bytes(gemm_rows, gate_lanes, problem.panel_bytes) if problem.unpacked else 0,
        "recurrent_row": problem.block_col_vecs * problem.vector_bytes,
        # Inputs and operands of stages are converted in the same place, one after the other.
        "operand_row": operand_row_bytes(max([*problem.inputs, *map(problem.operand_size, problem.gemm_stages)])),
        "vector_bytes": problem.vector_bytes, "panel_bytes": problem.panel_bytes,
    }  # fmt: skip
