"""Who computes what: sizes, the split over threads, where everything lies. Decided once per problem, printable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from fusedrnn.engines.cpu.kernels.tiling import Tiling, pad_against_conflicts, round_up_to_cache_line
from fusedrnn.engines.cpu.plan.cost import Machine, compared, predict
from fusedrnn.engines.cpu.plan.sizes import Grid, Problem, Share
from fusedrnn.engines.cpu.plan.thread_trials import Forecast
from fusedrnn.jit.host import cache_sizes
from fusedrnn.jit.sync import BARRIER_BYTES, PROGRESS_BYTES
from fusedrnn.jit.target import Target
from fusedrnn.spec import RNNSpec

_DEFAULT_L2 = 1 << 20
_ROWS_IN_A_CHUNK = 96
# Chunks that a sequence has at least where layers run side by side.
_CHUNKS_AT_LEAST = 16
ALONE: Grid = (1, 1, 1)
_forced: ContextVar[Grid | None] = ContextVar("fusedrnn_grid", default=None)


class Split:
    """What plans of both ways have: a problem's size, how it is shared out, where layers tell how far they are.

    Positions are relative to the workspace's start, where the barriers are.
    """

    steps: int
    batch: int
    grid: Grid
    progress_offset: int
    forecast: Forecast | None

    @property
    def num_threads(self) -> int:
        """Threads at work."""
        return prod(self.grid)

    def __str__(self) -> str:
        passes, rows, units = self.grid
        return (
            f"T={self.steps} N={self.batch}: {self.num_threads} thread(s) = {passes} direction(s) or layer(s) at once "
            f"x {rows} row group(s) x {units} unit group(s)"
        )


@dataclass(frozen=True)
class Plan(Split):
    """One problem's split and layout. Sizes and strides in bytes; positions relative to the workspace's start."""

    steps: int
    batch: int
    grid: Grid
    row_starts: tuple[int, ...]
    unit_starts: tuple[int, ...]
    out_starts: tuple[int, ...]
    chunk: int
    state_stride: int
    state_direction: int
    cell_offset: int
    operands_offset: int
    scratch_stride: int
    h_rows_offset: int
    gates_offset: int
    gates_stride: int
    recurrent_offset: int
    masked_offset: int
    masked_row: int
    biases_offset: int
    biases_size: int
    between_row: int
    progress_offset: int
    states_offset: int
    scratch_offset: int
    between_offset: tuple[int, int]
    size: int
    forecast: Forecast | None

    @property
    def zeroed(self) -> int:
        """Bytes of the workspace, for meetings, that must be zero at the start."""
        return self.states_offset

    def __str__(self) -> str:
        return f"{super().__str__()}; {self.chunk} step(s) per input GEMM; workspace {self.size / 2**20:.2f} MiB"


def make_forward_plan(
    spec: RNNSpec, target: Target, steps: int, batch: int, threads: int, *, training: bool = False, awake: bool = False
) -> Plan:
    """Choose the split for T steps of N sequences on at most that many threads, and lay out the workspace.

    Threads that are ``awake`` are worth using for less work.

    In training what passes from layer to layer is in the reserve, and with dropout a chunk's inputs are copied.
    """
    tiling = Tiling.of(spec, target)
    problem = Problem.of(spec, target, steps, batch, "training" if training else "inference")
    choices = grids(spec, batch, threads, tiling.unit_vectors)
    grid = choose_grid(problem, target, choices, lambda grid: share_of(tiling, steps, batch, grid), awake)
    passes, row_groups, unit_groups = grid
    share = share_of(tiling, steps, batch, grid)
    rows, chunk = share.rows, share.chunk
    columns = share.units * tiling.gates
    gates_stride = gates_row(tiling, share.units)

    state_stride = pad_against_conflicts(tiling.unit_vectors * tiling.vector_bytes)
    stages = len(tiling.stages)
    copies = 2 + (len(spec.state_names) - 1) + (stages - 1)
    h_rows_offset = round_up_to_cache_line(8 * chunk * rows)
    gates_offset = h_rows_offset + round_up_to_cache_line(8 * (1 + stages) * rows)
    recurrent_offset = gates_offset + round_up_to_cache_line(chunk * rows * gates_stride)
    masked_offset = recurrent_offset + round_up_to_cache_line(rows * tiling.block_col_vecs * tiling.vector_bytes)
    masked_row = tiling.masked_row(spec) if training and spec.drops else 0
    biases_offset = masked_offset + chunk * rows * masked_row
    # Also what a projection begins with, a panel of zeros.
    biases_size = max(round_up_to_cache_line(columns * tiling.vector_bytes), tiling.panel_bytes)
    scratch_stride = biases_offset + 2 * biases_size
    between_row = pad_against_conflicts(spec.output_size * tiling.item)

    progress_offset = BARRIER_BYTES * (1 + passes * row_groups)
    states_offset = progress_offset + progress_bytes(spec, tiling, grid)
    scratch_offset = states_offset + max(spec.num_directions, passes) * copies * batch * state_stride
    between = scratch_offset + scratch_stride * passes * row_groups * unit_groups
    layer_bytes = steps * batch * between_row
    buffers = 0 if training else min(2, spec.num_layers - 1)
    return Plan(
        steps, batch, grid, row_starts(batch, row_groups),
        shared_out(tiling.unit_vectors, unit_groups), shared_out(tiling.out_vectors, unit_groups), chunk,
        state_stride=state_stride,
        state_direction=copies * batch * state_stride,
        cell_offset=2 * batch * state_stride,
        operands_offset=(copies - (stages - 1)) * batch * state_stride,
        scratch_stride=scratch_stride, h_rows_offset=h_rows_offset, gates_offset=gates_offset,
        gates_stride=gates_stride,
        recurrent_offset=recurrent_offset, masked_offset=masked_offset, masked_row=masked_row,
        biases_offset=biases_offset, biases_size=biases_size, between_row=between_row,
        progress_offset=progress_offset, states_offset=states_offset, scratch_offset=scratch_offset,
        between_offset=(between, between + layer_bytes),
        size=between + buffers * layer_bytes,
        forecast=forecast(problem, target, share, share_of(tiling, steps, batch, ALONE), awake),
    )  # fmt: skip


@contextmanager
def forced(grid: Grid) -> Iterator[None]:
    """Have problems planned inside the ``with`` block, by this thread or task, shared out so where possible."""
    token = _forced.set(grid)
    try:
        yield
    finally:
        _forced.reset(token)


def grids(spec: RNNSpec, batch: int, threads: int, unit_groups: int) -> list[Grid]:
    """The ways to share a problem out among at most so many threads and groups of units, one thread first.

    Rows and units are split in groups whose numbers are powers of two, or as many as there are threads for. Of a
    network of one direction layers may run side by side, each some steps behind the one below.
    """
    found = {ALONE: None}
    for passes in {1, min(spec.num_directions if spec.bidirectional else spec.num_layers, threads)}:
        left = threads // passes
        some = {1 << power for power in range(left.bit_length())} | {left}
        pairs = {pair for one in some for pair in ((one, 1), (1, one), (one, left // one), (left // one, one))}
        for rows, units in sorted(pairs):
            found[passes, min(rows, batch), min(units, unit_groups)] = None
    return list(found)


def choose_grid(
    problem: Problem, target: Target, choices: Sequence[Grid], share: Callable[[Grid], Share], awake: bool
) -> Grid:
    """The cheapest of them by the cost model."""
    asked = _forced.get()
    if asked is not None and asked in choices:
        return asked
    if len(choices) == 1:
        return choices[0]
    machine = Machine.of(target)
    shares = [share(grid) for grid in choices]
    return min(shares, key=lambda one: compared(one, predict(problem, one, machine, awake=awake))).grid


def forecast(problem: Problem, target: Target, share: Share, alone: Share, awake: bool) -> Forecast | None:
    """What the cost model expects of a plan and of one thread; None if it is for one thread, or was forced."""
    if share.num_threads == 1 or _forced.get() is not None:
        return None
    machine = Machine.of(target)
    return Forecast(*(predict(problem, each, machine, awake=awake).total for each in (share, alone)))


def share_of(tiling: Tiling, steps: int, batch: int, grid: Grid) -> Share:
    """What the member with most to do has in a forward call."""
    _, row_groups, unit_groups = grid
    rows = -(-batch // row_groups)
    most = widest(shared_out(tiling.unit_vectors, unit_groups))
    chunk = max(1, min(chunk_limit(tiling, steps, grid), chunk_rows(gates_row(tiling, most)) // rows))
    return Share(grid, rows, most, chunk, outs=widest(shared_out(tiling.out_vectors, unit_groups)))


def chunk_limit(tiling: Tiling, steps: int, grid: Grid) -> int:
    """Steps of a chunk at most: layers that run side by side are a chunk behind one another, which must not be much."""
    return -(-steps // _CHUNKS_AT_LEAST) if tiling.layers_at_once(grid) else steps


def progress_bytes(spec: RNNSpec, tiling: Tiling, grid: Grid) -> int:
    """What layers that run side by side need to tell how far they are."""
    return PROGRESS_BYTES * spec.num_layers * grid[1] if tiling.layers_at_once(grid) else 0


def gates_row(tiling: Tiling, units: int) -> int:
    """Bytes from one row of gates to the next, of so many vectors of units."""
    return pad_against_conflicts(units * tiling.gates * tiling.vector_bytes)


def row_starts(batch: int, groups: int) -> tuple[int, ...]:
    """The first row of each group, and the end."""
    return tuple(batch * group // groups for group in range(groups + 1))


def shared_out(vectors: int, groups: int) -> tuple[int, ...]:
    """The first of so many vectors of units of each group, and the end."""
    return tuple(vectors * group // groups for group in range(groups + 1))


def widest(starts: Sequence[int]) -> int:
    """How many of them the group has that has most."""
    return max(last - first for first, last in pairwise(starts))


def near_cache() -> int:
    """Bytes of a core's second-level cache."""
    return cache_sizes().get("L2", _DEFAULT_L2)


def chunk_rows(gates_stride: int, fewest: int = 24) -> int:
    """Rows of an input GEMM whose gates fill half of the second-level cache, within reason."""
    return max(fewest, min(_ROWS_IN_A_CHUNK, near_cache() // 2 // gates_stride))
