"""Every number that the CPU engine's plans, caches and thread trials are tuned by. No bit of a result depends on them.

Plans take a :class:`Tuning`; without one they take the installed one. :func:`tuned` installs another for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from fusedrnn.jit.host import cache_sizes
from fusedrnn.jit.target import Target

_DEFAULT_L2_BYTES = 1 << 20
# Seconds of a cycle of a nominal core: the model's rates matter only in relation to one another.
_CYCLE = 1 / 3.6e9


def _l2_bytes() -> int:
    return cache_sizes().get("L2", _DEFAULT_L2_BYTES)


@dataclass(frozen=True)
class MachineModel:
    """The processor as the cost model sees it. Rates are those of one thread; times are in seconds.

    Attributes:
        fma_rate: Multiply-adds of whole vectors per second.
        l2_bandwidth, l3_bandwidth, memory_bandwidth: Bytes per second read from there.
        l2_bytes, l3_bytes: Sizes of these caches.
        instruction: Time of a vector instruction in a cell's maths.
        tile: Time to enter and leave a micro-kernel.
        row: Overhead of a row in a step.
        step: Overhead of a time step.
        layer: Overhead of a layer-direction.
        barrier: Time from the last thread's arrival at a barrier until all go on.
        wake_spinning, wake_sleeping: Time to hand a job to threads that spin, to threads that sleep.
        call: Overhead of a call.
        reserve: Overhead that a reserve adds to a call.
        stream_trips: Memory transfers per streamed vector: it is fetched, written, and fetched again by its reader.
        exposed_latency: Fraction of the extra time for weights beyond L2 that multiply-adds never hide.
        prefetching_tiles: Tiles of a panel that prefetch the next panel.
        usable_l2: Fraction of L2 that is left to weights beside the data that streams through it.
    """

    fma_rate: float
    l2_bandwidth: float
    l3_bandwidth: float
    memory_bandwidth: float
    l2_bytes: int
    l3_bytes: int
    instruction: float
    tile: float = 2e-9
    row: float = 3e-9
    step: float = 20e-9
    layer: float = 0.5e-6
    barrier: float = 0.3e-6
    wake_spinning: float = 1.5e-6
    wake_sleeping: float = 60e-6
    call: float = 2e-6
    reserve: float = 3.5e-6
    stream_trips: int = 3
    exposed_latency: float = 0.15
    prefetching_tiles: int = 4
    usable_l2: float = 0.85

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
            l3_bytes=cache_sizes().get("L3", 4 * l2_bytes),
            instruction=(0.9 if is_wide else 0.6) * _CYCLE,
        )


@dataclass(frozen=True)
class Tuning:
    """Thresholds of the CPU engine.

    Attributes of plans:
        l2_bytes: Size of a core's second-level cache, by which buffers that should stay in it are sized.
        min_chunk_rows, max_chunk_rows: Rows of an input GEMM.
        min_dx_chunk_rows: Fewest rows of a GEMM for dx: with fewer, its weights are not reused often enough.
        min_pipeline_chunks: Fewest chunks of a sequence where layers are pipelined.
        block_rows: Rows whose gate gradients wait for a GEMM of the weight gradients. More rows mean fewer passes over
            the partial sums.
        gemm_rows: Rows that such a GEMM takes at once; a single step may have more.
        min_speedup: How much faster several threads must be than one. Other programs may want the processors.
        machine: Rates for the cost model; None for the assumed ones of the target.
        choose_grid: Chooses a grid for a problem size from a list of grids, in place of the cost model.

    Attributes of weights:
        unpacked_rows: Rows of a step that read unpacked weights together.
        max_unpacked_reads, max_unpacked_reads_training: Calls that read the weights at most so often use them unpacked.
            Training packs later, since its weights have mostly changed since the last call.
        max_packed_vectors: Parameter vectors that an op keeps packed.
        max_packed_owners: Parameter sets with an owner, such as a module, that an op keeps packed.
        parallel_pack_bytes: Bytes from which several threads pack.
        max_idle_reserves: Idle reserves that an op keeps for its next calls.

    Attributes of thread trials, with times in seconds:
        max_trial_call: Calls with a longer forecast on one thread are not tried: a trial would cost too much.
        late_calls: Calls, more late than in time, that start a trial.
        recent_calls: Calls that a trial is compared with.
        trial_calls: Calls of a trial.
        min_trial_calls: Calls of a trial with a clear result.
        clear_ratio: A result is clear if every call of one kind takes so many times as long as any of the other.
        settling_time: Start of a trial that does not count, while threads wake up or stop spinning.
        min_trial_pause, max_trial_pause: Time between two trials. It doubles while the result stays the same.
        trial_interval: A trial of some seconds is followed by so many times as many seconds without one.
    """

    l2_bytes: int = field(default_factory=_l2_bytes)
    min_chunk_rows: int = 24
    max_chunk_rows: int = 96
    min_dx_chunk_rows: int = 80
    min_pipeline_chunks: int = 16
    block_rows: int = 1152
    gemm_rows: int = 1152
    min_speedup: float = 1.1
    machine: MachineModel | None = None
    choose_grid: Callable[[Any, Sequence[Any]], Any] | None = None

    unpacked_rows: int = 4
    max_unpacked_reads: int = 2
    max_unpacked_reads_training: int = 6
    max_packed_vectors: int = 4
    max_packed_owners: int = 256
    parallel_pack_bytes: int = 1 << 19
    max_idle_reserves: int = 16

    max_trial_call: float = 20e-3
    late_calls: int = 4
    recent_calls: int = 8
    trial_calls: int = 5
    min_trial_calls: int = 2
    clear_ratio: float = 2.0
    settling_time: float = 1e-3
    min_trial_pause: float = 0.1
    max_trial_pause: float = 2.0
    trial_interval: float = 50.0

    def machine_of(self, target: Target) -> MachineModel:
        """The rates for the cost model."""
        return self.machine or MachineModel.of(target)


_installed: Tuning | None = None


def current() -> Tuning:
    """The installed tuning. Ops read it when they are made, plans when they are planned."""
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
