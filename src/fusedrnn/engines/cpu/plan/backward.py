"""Who computes what in backward, and where it lies in the workspace."""

from __future__ import annotations

from dataclasses import dataclass

from fusedrnn.engines.cpu.kernels.stages import derivative_of
from fusedrnn.engines.cpu.plan import forward as plan
from fusedrnn.engines.cpu.plan.forward import Split
from fusedrnn.engines.cpu.plan.sizes import Grid, Problem, Share
from fusedrnn.engines.cpu.plan.thread_trials import Forecast
from fusedrnn.engines.cpu.plan.tiling import Geometry, lines, skewed
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
    progress_at: int
    zeroed: int
    parts_at: int
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
    geometry = Geometry.of(spec, target)
    gates_row = _gates_row(geometry)
    problem = Problem.of(spec, target, steps, batch, "backward")
    choices = plan.grids(spec, batch, threads, geometry.unit_vectors)
    grid = plan.choose_grid(problem, target, choices, lambda grid: share_of(geometry, steps, batch, grid), awake)
    passes, row_groups, unit_groups = grid
    chunk, block = _steps_at_once(geometry, gates_row, steps, batch, grid)
    everybody = row_groups * unit_groups
    units, outs = geometry.unit_vectors, geometry.out_vectors
    share = share_of(geometry, steps, batch, grid)
    team = _team(spec, geometry, batch, chunk, block, gates_row)
    member = _member(spec, geometry, batch, share.rows, chunk, block, share.units, recompute)

    progress_at = BARRIER_BYTES * (1 + passes * row_groups + passes)
    team_at = progress_at + plan.progress_bytes(spec, geometry, grid)
    scratch_at = team_at + passes * team["team_size"]
    parts_at = scratch_at + passes * row_groups * unit_groups * member["scratch_member"]
    part_row = skewed(max(spec.output_size, spec.input_size) * geometry.item)
    part_size = steps * batch * part_row
    parts = spec.num_directions * (2 if spec.num_layers > 1 else spec.num_directions - 1)
    return BackwardPlan(
        steps, batch, grid, plan.row_starts(batch, row_groups),
        plan.shared_out(units, unit_groups), plan.shared_out(outs, unit_groups),
        plan.shared_out(units, everybody), plan.shared_out(outs, everybody),
        chunk, block,
        layout=tuple({**team, **member, "team": team_at, "scratch": scratch_at}.items()),
        progress_at=progress_at, zeroed=team_at, parts_at=parts_at, part_size=part_size, part_row=part_row,
        # What is read past the end of a last row must be there.
        size=lines(parts_at + parts * part_size + 2 * geometry.panel_bytes),
        forecast=plan.forecast(problem, target, share, share_of(geometry, steps, batch, plan.ALONE), awake),
    )  # fmt: skip


def share_of(geometry: Geometry, steps: int, batch: int, grid: Grid) -> Share:
    """What the member with most to do has in a backward call."""
    _, row_groups, unit_groups = grid
    gates_row = _gates_row(geometry)
    chunk, block = _steps_at_once(geometry, gates_row, steps, batch, grid)
    units, outs, shared = (
        plan.widest(plan.shared_out(vectors, groups))
        for vectors, groups in (
            (geometry.unit_vectors, unit_groups),
            (geometry.out_vectors, unit_groups),
            (geometry.unit_vectors, row_groups * unit_groups),
        )
    )
    rows, inner = -(-batch // row_groups), min(block * batch, _ROWS_AT_ONCE)
    return Share(grid, rows, units, chunk, inner, shared, outs)


def _steps_at_once(geometry: Geometry, gates_row: int, steps: int, batch: int, grid: Grid) -> tuple[int, int]:
    """Steps to a GEMM of the inputs' gradients, and to one of the weights'."""
    most = plan.chunk_limit(geometry, steps, grid)
    chunk = max(1, min(most, plan.chunk_rows(gates_row, _FEWEST_ROWS_IN_A_CHUNK) // batch))
    return chunk, min(max(1, _ROWS_IN_A_BLOCK // (batch * chunk)) * chunk, -(-steps // chunk) * chunk)


def _gates_row(geometry: Geometry) -> int:
    """Bytes from one row of gradients to the next: of all stages, the projection's behind the gates'."""
    return skewed(sum(geometry.depth_of(part) for part in geometry.parts) * geometry.item)


def _team(
    spec: RNNSpec, geometry: Geometry, batch: int, chunk: int, block: int, gates_row: int
) -> dict[str, int]:
    """What the members that work on a direction share."""
    slots = sum(geometry.vectors_of(geometry.size_of(part)) * part.slots for part in geometry.parts)
    hidden_panels, operand_panels = geometry.panels_of(spec.hidden_size), geometry.panels_of(spec.state_size)
    input_panels = max(geometry.panels_of(spec.layer_input_size(layer)) for layer in range(spec.num_layers))
    carried_stride = skewed(hidden_panels * geometry.panel_bytes)
    upright_stride = skewed(block * batch * geometry.vector_bytes)
    weights_stride = skewed(max(input_panels + operand_panels, hidden_panels) * geometry.panel_bytes)
    rows = sum(geometry.depth_of(part) for part in geometry.parts)
    sizes = {
        "state_gates_at": 2 * batch * gates_row,
        "input_gates_at": 2 * batch * chunk * gates_row,
        "carried_at": len(spec.state_names) * batch * carried_stride,
        "operands_at": (len(geometry.parts) - 1) * batch * carried_stride,
        "upright_at": slots * upright_stride,
        "weights_at": rows * weights_stride,
        "sums_at": lines(slots * geometry.vector_bytes),
    }
    return {
        **_placed(sizes, "team_size"),
        "gates_row": gates_row,
        "carried_size": batch * carried_stride,
        "carried_stride": carried_stride,
        "upright_stride": upright_stride,
        "weights_stride": weights_stride,
    }


def _member(
    spec: RNNSpec, geometry: Geometry, batch: int, rows: int, chunk: int, block: int, widest: int, recompute: bool
) -> dict[str, int]:
    """A member's scratch."""
    inner = min(block * batch, _ROWS_AT_ONCE)
    near = plan.near_cache() // 2
    packed_panels = max(1, near // (inner * geometry.panel_bytes))
    vector = geometry.vector_bytes
    forward_gates_stride = plan.gates_row(geometry, widest)
    masked_row = geometry.masked_row(spec)
    kept = len(derivative_of(spec.variant).kept)
    in_chunk = chunk * rows
    again = in_chunk if recompute and kept else 0
    masked = again if spec.drops else 0
    sizes = {
        "rows_at": lines(16 * len(geometry.parts) * rows + 8 * in_chunk),
        "places_at": lines(16 * block * batch),
        "panel_at": lines(geometry.panel_bytes * (1 + in_chunk)),
        "packed_at": lines(packed_panels * inner * geometry.panel_bytes),
        "kept_at": lines(again * widest * kept * vector),
        "forward_gates_at": again * forward_gates_stride,
        "recurrent_at": lines(again * geometry.block_columns * vector),
        "masked_at": masked * masked_row,
    }
    return {
        **_placed(sizes, "scratch_member"),
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
