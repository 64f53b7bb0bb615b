"""Who computes what in backward, and where it lies in the workspace."""

from __future__ import annotations

from dataclasses import dataclass

from fusedrnn.engines.cpu.kernels.stages import derivative_of
from fusedrnn.engines.cpu.kernels.tiling import Tiling, pad_against_conflicts, round_up_to_cache_line
from fusedrnn.engines.cpu.plan import forward as plan
from fusedrnn.engines.cpu.plan.forward import Split
from fusedrnn.engines.cpu.plan.sizes import Grid, Problem, Share
from fusedrnn.engines.cpu.plan.thread_trials import Forecast
from fusedrnn.jit.sync import BARRIER_BYTES
from fusedrnn.jit.target import Target
from fusedrnn.spec import RNNSpec

# Rows whose gate gradients wait, upright, for a GEMM of the weights' gradients: enough that reading and writing what
# has been added up so far is little beside multiplying.
_ROWS_IN_A_BLOCK = 1152
# Rows that one of these GEMMs takes at once; more only where a single step has more.
_ROWS_AT_ONCE = 1152
# Rows of a GEMM of the inputs' gradients: with fewer its weights, which come from afar, are not used often enough.
_FEWEST_ROWS_IN_A_CHUNK = 80


@dataclass(frozen=True)
class BackwardPlan(Split):
    """One problem's split and layout. Sizes and strides in bytes; ``layout`` has the positions, by the record's names.

    A team's parts are relative to its start, a member's scratch to its own, everything else to the workspace's.
    """

    steps: int
    batch: int
    grid: Grid
    row_starts: tuple[int, ...]
    unit_starts: tuple[int, ...]
    out_starts: tuple[int, ...]
    weight_starts: tuple[int, ...]
    out_weight_starts: tuple[int, ...]
    chunk: int
    block: int
    layout: tuple[tuple[str, int], ...]
    progress_offset: int
    zeroed: int
    parts_offset: int
    part_size: int
    part_row: int
    size: int
    forecast: Forecast | None

    def __str__(self) -> str:
        return (
            f"backward of {super().__str__()}; {self.chunk} step(s) per gradient GEMM of inputs, "
            f"{self.block} of weights; workspace {self.size / 2**20:.2f} MiB"
        )


def make_backward_plan(
    spec: RNNSpec,
    target: Target,
    steps: int,
    batch: int,
    threads: int,
    *,
    recompute: bool = False,
    awake: bool = False,
) -> BackwardPlan:
    """Choose the split for T steps of N sequences on at most that many threads, and lay out the workspace."""
    tiling = Tiling.of(spec, target)
    gates_row = _gates_row(tiling)
    problem = Problem.of(spec, target, steps, batch, "backward")
    choices = plan.grids(spec, batch, threads, tiling.unit_vectors)
    grid = plan.choose_grid(problem, target, choices, lambda grid: share_of(tiling, steps, batch, grid), awake)
    passes, row_groups, unit_groups = grid
    chunk, block = _steps_at_once(tiling, gates_row, steps, batch, grid)
    everybody = row_groups * unit_groups
    units, outs = tiling.unit_vectors, tiling.out_vectors
    share = share_of(tiling, steps, batch, grid)
    team = _team(spec, tiling, batch, chunk, block, gates_row)
    member = _member(spec, tiling, batch, share.rows, chunk, block, share.units, recompute)

    progress_offset = BARRIER_BYTES * (1 + passes * row_groups + passes)
    team_offset = progress_offset + plan.progress_bytes(spec, tiling, grid)
    scratch_offset = team_offset + passes * team["group_stride"]
    parts_offset = scratch_offset + passes * row_groups * unit_groups * member["scratch_stride"]
    part_row = pad_against_conflicts(max(spec.output_size, spec.input_size) * tiling.item)
    part_size = steps * batch * part_row
    parts = spec.num_directions * (2 if spec.num_layers > 1 else spec.num_directions - 1)
    return BackwardPlan(
        steps, batch, grid, plan.row_starts(batch, row_groups),
        plan.shared_out(units, unit_groups), plan.shared_out(outs, unit_groups),
        plan.shared_out(units, everybody), plan.shared_out(outs, everybody),
        chunk, block,
        layout=tuple({**team, **member, "groups": team_offset, "scratch": scratch_offset}.items()),
        progress_offset=progress_offset, zeroed=team_offset, parts_offset=parts_offset,
        part_size=part_size, part_row=part_row,
        # What is read past the end of a last row must be there.
        size=round_up_to_cache_line(parts_offset + parts * part_size + 2 * tiling.panel_bytes),
        forecast=plan.forecast(problem, target, share, share_of(tiling, steps, batch, plan.ALONE), awake),
    )  # fmt: skip


def share_of(tiling: Tiling, steps: int, batch: int, grid: Grid) -> Share:
    """What the member with most to do has in a backward call."""
    _, row_groups, unit_groups = grid
    gates_row = _gates_row(tiling)
    chunk, block = _steps_at_once(tiling, gates_row, steps, batch, grid)
    units, outs, shared = (
        plan.widest(plan.shared_out(vectors, groups))
        for vectors, groups in (
            (tiling.unit_vectors, unit_groups),
            (tiling.out_vectors, unit_groups),
            (tiling.unit_vectors, row_groups * unit_groups),
        )
    )
    rows, inner = -(-batch // row_groups), min(block * batch, _ROWS_AT_ONCE)
    return Share(grid, rows, units, chunk, inner, shared, outs)


def _steps_at_once(tiling: Tiling, gates_row: int, steps: int, batch: int, grid: Grid) -> tuple[int, int]:
    """Steps to a GEMM of the inputs' gradients, and to one of the weights'."""
    most = plan.chunk_limit(tiling, steps, grid)
    chunk = max(1, min(most, plan.chunk_rows(gates_row, _FEWEST_ROWS_IN_A_CHUNK) // batch))
    return chunk, min(max(1, _ROWS_IN_A_BLOCK // (batch * chunk)) * chunk, -(-steps // chunk) * chunk)


def _gates_row(tiling: Tiling) -> int:
    """Bytes from one row of gradients to the next: of all stages, the projection's behind the gates'."""
    return pad_against_conflicts(sum(tiling.depth_of(part) for part in tiling.stages) * tiling.item)


def _team(
    spec: RNNSpec, tiling: Tiling, batch: int, chunk: int, block: int, gates_row: int
) -> dict[str, int]:
    """What the members that work on a direction share."""
    slots = sum(tiling.vectors_of(tiling.size_of(part)) * part.num_grads for part in tiling.stages)
    hidden_panels, operand_panels = tiling.panels_of(spec.hidden_size), tiling.panels_of(spec.state_size)
    input_panels = max(tiling.panels_of(spec.layer_input_size(layer)) for layer in range(spec.num_layers))
    carried_stride = pad_against_conflicts(hidden_panels * tiling.panel_bytes)
    upright_stride = pad_against_conflicts(block * batch * tiling.vector_bytes)
    weights_stride = pad_against_conflicts(max(input_panels + operand_panels, hidden_panels) * tiling.panel_bytes)
    rows = sum(tiling.depth_of(part) for part in tiling.stages)
    sizes = {
        "state_gates_offset": 2 * batch * gates_row,
        "input_gates_offset": 2 * batch * chunk * gates_row,
        "carried_offset": len(spec.state_names) * batch * carried_stride,
        "operands_offset": (len(tiling.stages) - 1) * batch * carried_stride,
        "transposed_offset": slots * upright_stride,
        "weights_offset": rows * weights_stride,
        "sums_offset": round_up_to_cache_line(slots * tiling.vector_bytes),
    }
    return {
        **_placed(sizes, "group_stride"),
        "gates_row": gates_row,
        "carried_size": batch * carried_stride,
        "carried_stride": carried_stride,
        "transposed_stride": upright_stride,
        "weights_stride": weights_stride,
    }


def _member(
    spec: RNNSpec, tiling: Tiling, batch: int, rows: int, chunk: int, block: int, widest: int, recompute: bool
) -> dict[str, int]:
    """A member's scratch."""
    inner = min(block * batch, _ROWS_AT_ONCE)
    near = plan.near_cache() // 2
    packed_panels = max(1, near // (inner * tiling.panel_bytes))
    vector = tiling.vector_bytes
    forward_gates_stride = plan.gates_row(tiling, widest)
    masked_row = tiling.masked_row(spec)
    kept = len(derivative_of(spec.variant).saved)
    in_chunk = chunk * rows
    again = in_chunk if recompute and kept else 0
    masked = again if spec.drops else 0
    sizes = {
        "rows_at": round_up_to_cache_line(16 * len(tiling.stages) * rows + 8 * in_chunk),
        "places_offset": round_up_to_cache_line(16 * block * batch),
        "panel_offset": round_up_to_cache_line(tiling.panel_bytes * (1 + in_chunk)),
        "packed_offset": round_up_to_cache_line(packed_panels * inner * tiling.panel_bytes),
        "kept_offset": round_up_to_cache_line(again * widest * kept * vector),
        "forward_gates_offset": again * forward_gates_stride,
        "recurrent_offset": round_up_to_cache_line(again * tiling.block_col_vecs * vector),
        "masked_offset": masked * masked_row,
    }
    return {
        **_placed(sizes, "scratch_stride"),
        "inner": inner,
        "packed_panels": packed_panels,
        "forward_gates_stride": forward_gates_stride,
        "masked_row": masked_row,
        "kept_size": again * widest * kept,
    }


def _placed(sizes: dict[str, int], total: str) -> dict[str, int]:
    """One behind the other, and how much that is."""
    places, at = {}, 0
    for name, size in sizes.items():
        places[name] = at
        at += size
    return {**places, total: at}
