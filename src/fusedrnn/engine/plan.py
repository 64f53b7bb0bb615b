"""Who computes what: sizes, the split over threads, where everything lies. Decided once per problem, printable."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from fusedrnn.codegen.sync import BARRIER_BYTES
from fusedrnn.codegen.target import ITEM_SIZE, Target, cache_sizes
from fusedrnn.engine.forward import Blocking
from fusedrnn.spec import RNNSpec

_LINE = 64
_DEFAULT_L2 = 1 << 20
# Below this much work a second thread costs more than it brings: a job's hand-over takes about a microsecond when the
# gang is awake, twenty-five when it sleeps; a barrier about one.
_FLOPS_WORTH_A_JOB = 2_000_000
_FLOPS_WORTH_A_BARRIER = 400_000
_ROWS_IN_A_CHUNK = 96


@dataclass(frozen=True)
class Geometry:
    """How one spec's units and gates fill vectors and panels on one target; the same for every problem size."""

    vector_bytes: int
    unit_vectors: int
    blocking: Blocking
    tile_rows: int
    item: int

    @classmethod
    def of(cls, spec: RNNSpec, target: Target) -> Geometry:
        """The geometry of that spec's layers."""
        rows, vectors = target.tile
        lanes = target.lanes(spec.dtype)
        return cls(
            vector_bytes=target.vector_bits // 8,
            unit_vectors=-(-spec.hidden_size // lanes),
            blocking=Blocking(spec.num_gates, vectors),
            tile_rows=rows,
            item=ITEM_SIZE[spec.dtype],
        )

    @property
    def panels(self) -> int:
        """Panels that hold all gates of all units."""
        return -(-self.unit_vectors * self.blocking.gates // self.blocking.panel_vectors)

    @property
    def panel_bytes(self) -> int:
        """Bytes of one row of a panel."""
        return self.blocking.panel_vectors * self.vector_bytes


@dataclass(frozen=True)
class Plan:
    """One problem's split and layout. Sizes and strides in bytes; positions relative to the workspace's start."""

    steps: int
    batch: int
    grid: tuple[int, int, int]
    row_starts: tuple[int, ...]
    unit_starts: tuple[int, ...]
    chunk: int
    state_stride: int
    state_direction: int
    cell_at: int
    scratch_member: int
    h_rows_at: int
    gates_at: int
    gates_stride: int
    recurrent_at: int
    between_row: int
    barriers_at: int
    states_at: int
    scratch_at: int
    between_at: tuple[int, int]
    size: int

    @property
    def members(self) -> int:
        """Threads at work."""
        directions, rows, units = self.grid
        return directions * rows * units

    def __str__(self) -> str:
        directions, rows, units = self.grid
        return (
            f"T={self.steps} N={self.batch}: {self.members} thread(s) = {directions} direction(s) x {rows} row group(s)"
            f" x {units} unit group(s); {self.chunk} step(s) per input GEMM; workspace {self.size / 2**20:.2f} MiB"
        )


def make_plan(spec: RNNSpec, target: Target, steps: int, batch: int, threads: int) -> Plan:
    """Choose the split for T steps of N sequences on at most that many threads, and lay out the workspace."""
    geometry = Geometry.of(spec, target)
    grid = _grid(spec, geometry, steps, batch, threads)
    directions, row_groups, unit_groups = grid
    row_starts = tuple(batch * group // row_groups for group in range(row_groups + 1))
    rows = -(-batch // row_groups)
    unit_starts = _unit_starts(geometry, unit_groups)
    widest = max(last - first for first, last in pairwise(unit_starts))
    columns = -(-widest * geometry.blocking.gates // geometry.blocking.panel_vectors) * geometry.blocking.panel_vectors
    gates_stride = _skewed(columns * geometry.vector_bytes)
    chunk = max(1, min(steps, _chunk_rows(gates_stride) // rows))

    state_stride = _skewed(geometry.unit_vectors * geometry.vector_bytes)
    copies = 2 + (len(spec.state_names) - 1)
    h_rows_at = _lines(8 * chunk * rows)
    gates_at = h_rows_at + _lines(16 * rows)
    recurrent_at = gates_at + _lines(chunk * rows * gates_stride)
    scratch_member = recurrent_at + _lines(rows * geometry.blocking.block_columns * geometry.vector_bytes)
    between_row = _skewed(spec.output_size * geometry.item)

    barriers_at = 0
    states_at = barriers_at + BARRIER_BYTES * (1 + directions * row_groups)
    scratch_at = states_at + spec.num_directions * copies * batch * state_stride
    between = scratch_at + scratch_member * directions * row_groups * unit_groups
    layer_bytes = steps * batch * between_row
    buffers = min(2, spec.num_layers - 1)
    return Plan(
        steps, batch, grid, row_starts, unit_starts, chunk,
        state_stride=state_stride,
        state_direction=copies * batch * state_stride,
        cell_at=2 * batch * state_stride,
        scratch_member=scratch_member, h_rows_at=h_rows_at, gates_at=gates_at, gates_stride=gates_stride,
        recurrent_at=recurrent_at, between_row=between_row,
        barriers_at=barriers_at, states_at=states_at, scratch_at=scratch_at,
        between_at=(between, between + layer_bytes),
        size=between + buffers * layer_bytes,
    )  # fmt: skip


def _grid(spec: RNNSpec, geometry: Geometry, steps: int, batch: int, threads: int) -> tuple[int, int, int]:
    """Directions first, for they share nothing; then rows, if every thread's cache holds the weights; else units."""
    per_step = spec.flops(1, batch) // spec.num_layers
    if threads == 1 or spec.flops(steps, batch) < _FLOPS_WORTH_A_JOB:
        return 1, 1, 1
    directions = min(spec.num_directions, threads)
    left = threads // directions
    if left == 1:
        return directions, 1, 1
    recurrent = geometry.panels * geometry.panel_bytes * spec.state_size
    if recurrent <= cache_sizes().get("L2", _DEFAULT_L2) // 2 and batch >= left * geometry.tile_rows:
        return directions, left, 1
    if per_step < _FLOPS_WORTH_A_BARRIER:
        return directions, 1, 1
    blocks = -(-geometry.unit_vectors // geometry.blocking.block_units)
    return directions, 1, min(left, blocks)


def _unit_starts(geometry: Geometry, groups: int) -> tuple[int, ...]:
    """The first vector of units of each group, at a block's edge, and the end."""
    size = geometry.blocking.block_units
    blocks = -(-geometry.unit_vectors // size)
    return tuple(min(geometry.unit_vectors, blocks * group // groups * size) for group in range(groups + 1))


def _chunk_rows(gates_stride: int) -> int:
    """Rows of an input GEMM whose pre-activations fill half of the second-level cache, within reason."""
    fitting = cache_sizes().get("L2", _DEFAULT_L2) // 2 // gates_stride
    return max(24, min(_ROWS_IN_A_CHUNK, fitting))


def _lines(size: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-size // _LINE) * _LINE


def _skewed(size: int) -> int:
    """Rounded up to an odd number of cache lines: rows that far apart do not all fall into the same cache sets."""
    return (-(-size // _LINE) | 1) * _LINE
