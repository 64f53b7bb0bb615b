"""The tuning parameters of the CPU engine's plans, caches and thread trials. No bit of a result depends on them.

Plans take a :class:`Tuning`; without one they take the installed one. :func:`tuned` installs another for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import inf
from typing import Any

from fusedrnn.jit.host import cache_sizes
from fusedrnn.jit.target import Target
from fusedrnn.runtime.machine_rates import MachineRates, kept_rates

_DEFAULT_L2_BYTES = 1 << 20
# Seconds of a cycle of a nominal core: the model's rates matter only in relation to one another.
_CYCLE = 1 / 3.6e9
# The largest factor between a measured rate and the assumed one; a measurement beyond it was disturbed.
_MAX_DEVIATION = 8.0


def _l2_bytes() -> int:
    return cache_sizes().get("L2", _DEFAULT_L2_BYTES)


def _l3_bytes() -> int:
    return cache_sizes().get("L3", 4 * _l2_bytes())


def _narrow_int8_rows() -> tuple[tuple[float, int], ...]:
    """The most rows for which int8 weights are narrow, by the bytes that these weights take as float32.

    Multiplying more rows takes longer than reading the weights as float32: in part from L2, in part from L3, or from
    memory. Measured, see docs/benchmarks/formats.md. If weights are a little larger than L3, a step reads a part of
    them from L3.
    """
    return (8 * _l2_bytes(), 1), (2 * _l3_bytes(), 2), (inf, 4)


@dataclass(frozen=True)
class MachineModel:
    """The processor as the cost model sees it. Rates are those of one thread, per second; times are in seconds."""

    fma_rate: float  # multiply-adds of whole vectors
    l2_bandwidth: float  # bytes read
    l3_bandwidth: float
    memory_bandwidth: float
    l2_bytes: int
    l3_bytes: int
    instruction: float  # a vector instruction of a cell's maths
    conversion: float = 8 * _CYCLE  # of a vector to bfloat16 or int8
    transpose: float = 4 * _CYCLE  # of a vector of unpacked weights, or waiting for the sums of a few rows
    tile: float = 2e-9  # entering and leaving a micro-kernel
    row: float = 3e-9  # overhead of a row in a step
    step: float = 20e-9  # overhead of a time step
    layer: float = 0.5e-6  # overhead of a layer-direction
    barrier: float = 0.3e-6  # from the last thread's arrival until all continue
    wake_spinning: float = 1.5e-6  # handing a job to threads that spin
    wake_sleeping: float = 60e-6  # handing a job to threads that sleep
    call: float = 2e-6  # overhead of a call
    reserve: float = 3.5e-6  # what a reserve adds to that overhead
    stream_trips: int = 3  # streamed data is fetched, written, and fetched again by its reader
    exposed_latency: float = 0.15  # part of the extra time for weights beyond L2 that multiply-adds never hide
    prefetching_tiles: int = 4  # tiles of a panel that prefetch the next panel
    usable_l2: float = 0.85  # part of L2 that is left for weights; other data streams through the rest

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, target: Target) -> MachineModel:
        """Assumed rates of a processor with this target's vectors and this machine's caches."""
        l2_bytes = _l2_bytes()
        is_wide = target.vector_bits == 512
        return cls(
            fma_rate=(1 if is_wide or not target.fma else 2) / _CYCLE,
            l2_bandwidth=31 / _CYCLE,
            l3_bandwidth=20 / _CYCLE,
            memory_bandwidth=10e9,
            l2_bytes=l2_bytes,
            l3_bytes=_l3_bytes(),
            instruction=(0.9 if is_wide else 0.6) * _CYCLE,
        )

    def with_rates(self, rates: MachineRates, target: Target) -> MachineModel:
        """The model with rates that were measured with the target's vectors; what was not measured stays."""
        fma_rate = rates.fma * 1e9 / (2 * target.lanes("float32"))
        l2_bandwidth = _plausible(rates.l2 * 1e9, self.l2_bandwidth)
        l3_bandwidth = min(_plausible(rates.l3 * 1e9, self.l3_bandwidth), l2_bandwidth)
        return replace(
            self,
            fma_rate=_plausible(fma_rate, self.fma_rate),
            l2_bandwidth=l2_bandwidth,
            l3_bandwidth=l3_bandwidth,
            memory_bandwidth=min(_plausible(rates.memory * 1e9, self.memory_bandwidth), l3_bandwidth),
        )


def _plausible(measured: float, assumed: float) -> float:
    """A measured rate, limited to a factor from the assumed one; the assumed one if nothing was measured."""
    limited = min(max(measured, assumed / _MAX_DEVIATION), assumed * _MAX_DEVIATION)
    return limited if measured else assumed


@dataclass(frozen=True)
class Tuning:
    """Thresholds of the CPU engine. Times are in seconds."""

    # Plans.
    l2_bytes: int = field(default_factory=_l2_bytes)  # the sizes of buffers that should stay in L2 follow from it
    min_chunk_rows: int = 24  # rows of an input GEMM
    max_chunk_rows: int = 96
    max_tile_chunk_rows: int = 256  # of an input GEMM on tiles whose weights do not stay in L2
    min_dx_chunk_rows: int = 80  # of a GEMM for dx: with fewer, its weights are not reused often enough
    min_pipeline_chunks: int = 16  # chunks of a sequence where layers are pipelined
    block_rows: int = 1152  # rows summed before the partial weight gradients are read and written again
    gemm_rows: int = 1152  # rows of such a block that a GEMM takes at once
    min_speedup: float = 1.1  # of several threads over one: other programs may want the processors
    machine: MachineModel | None = None  # for the cost model; None for what was measured, or else assumed
    # Chooses one of the grids for a problem size, in place of the cost model.
    choose_grid: Callable[[Any, Sequence[Any]], Any] | None = None

    # Larger outputs bypass the caches, in cells without GEMMs at each step.
    max_cached_output_bytes: int = field(default_factory=_l3_bytes)

    # Weights. Those of a layer-direction that take more bytes as float32 are packed narrow and widened in registers.
    wide_weight_bytes: int = field(default_factory=lambda: _l2_bytes() // 2)
    # But int8 weights are packed narrow only for so many rows, by the bytes that they would take as float32.
    narrow_int8_rows: tuple[tuple[float, int], ...] = field(default_factory=_narrow_int8_rows)
    # Calls that read the weights at most so often, once at each step, use them unpacked: looking for changes would take
    # longer, and training would mostly have to pack them anew.
    max_unpacked_reads: int = 3
    max_unpacked_reads_training: int = 4
    # So do calls whose further reads are of at most so many floats in total: each read transposes the weights.
    max_unpacked_floats: int = 500_000
    max_unpacked_floats_training: int = 640_000
    unpacked_rows_training: int = 12  # rows of a training step that take as long as another read
    # Training on unpacked weights uses the calling thread alone for at most so many steps and multiply-adds.
    max_own_steps: int = 32
    max_own_work: int = 1_200_000
    max_packed_vectors: int = 4  # parameter vectors that an op keeps packed
    max_packed_owners: int = 256  # parameter sets of owners, such as modules, that an op keeps packed
    parallel_pack_bytes: int = 1 << 19  # several threads pack if there is more to pack
    max_idle_reserves: int = 16  # reserves that an op keeps for its next calls

    # Trials of one thread.
    max_trial_call: float = 20e-3  # calls with a longer forecast are not tried: a trial would cost too much
    late_calls: int = 4  # a trial starts when late calls exceed calls in time by this many
    recent_calls: int = 8  # calls that a trial is compared with
    min_recent_calls: int = 3  # calls before the first trial: the first call of an op always takes long
    trial_calls: int = 5  # calls of a trial
    min_trial_calls: int = 2  # calls of a trial whose result is clear
    clear_ratio: float = 2.0  # clear: every call of one kind takes so many times as long as any of the other
    settling_time: float = 1e-3  # start of a trial that does not count: threads wake up or stop spinning
    min_trial_pause: float = 0.1  # between two trials; it doubles while the result stays the same
    max_trial_pause: float = 2.0
    trial_interval: float = 50.0  # time without trials, as a multiple of what the last trial lost

    def machine_of(self, target: Target) -> MachineModel:
        """The rates for the cost model: those kept for this machine, or else assumed ones."""
        if self.machine is not None:
            return self.machine
        assumed, rates = MachineModel.of(target), kept_rates(target)
        return assumed if rates is None else assumed.with_rates(rates, target)


_installed: Tuning | None = None


def current() -> Tuning:
    """The installed tuning. Ops and plans read it when they are made."""
    global _installed
    if _installed is None:
        _installed = Tuning()
    return _installed


@contextmanager
def tuned(**changes: Any) -> Iterator[Tuning]:
    """Install a changed tuning, in the whole process, while the ``with`` block runs; for tests and experiments."""
    global _installed
    before = current()
    _installed = replace(before, **changes)
    try:
        yield _installed
    finally:
        _installed = before
