"""The ceilings of this machine, measured: the peak rates of multiply-adds, and the bandwidth of caches and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusedrnn import env
from fusedrnn.jit.builder import Function, Module, Value
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import Job, function, load, load_once
from fusedrnn.jit.struct import Fields, Struct
from fusedrnn.jit.sync import BARRIER_BYTES, emit_barrier, emit_wait
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors
from fusedrnn.runtime.buffers import aligned_empty
from fusedrnn.runtime.peak_instructions import Instruction, instruction_of
from fusedrnn.runtime.pool_kernel import current_cpu
from fusedrnn.runtime.thread_pool import ThreadTeam

_BARRIER_FIELDS = ("barrier", "num_threads", "spins")
PEAK = Struct("results", *_BARRIER_FIELDS)
"""``results`` begins with the operands; a thread's results are at ``(tid + 1) * RESULT_BYTES``."""
RESULT_BYTES = 256
_CPUS_OFFSET = 128
"""Where in a thread's results two 64-bit integers are: the processors on which it began and ended."""
_READING = Struct("arrays", "size", "repeats", "results", *_BARRIER_FIELDS)
"""The threads' arrays, of ``size`` bytes each, lie one behind the other. A thread reads its own ``repeats`` times."""
# Vectors read in an iteration, and bytes of prefetch distance.
_VECTORS_READ, _PREFETCH_DISTANCE = 8, 1024
# Samples of a peak: some 30 ms, in which a processor reaches its full frequency. If the threads have not yet run on as
# many processors as they may use, there are up to _MAX_SAMPLES.
_SAMPLES, _MAX_SAMPLES = 24, 40
# Rounds of a sample, half a millisecond each: shorter than a time slice, so that one of them is undisturbed.
_ROUNDS = 3


@dataclass(frozen=True)
class PeakSample:
    """A short measurement of the peak.

    Attributes:
        gflops: The rate of the threads together, of the best round.
        spread: Whether in that round each thread had its own processor, or all available processors were in use. Also
            true where the system does not tell.
    """

    gflops: float
    spread: bool


Sampler = Callable[[str, int], PeakSample]


def measure_peak(number_format: str = "float32", threads: int = 1, sample: Sampler | None = None) -> float:
    """GFLOP/s of that many threads that only multiply and add numbers of a format, with the target's instructions.

    The best sample counts: other processes and low frequencies only ever lower a rate. Samples in which threads share a
    processor while another is free count only if there are no others.

    Raises:
        RuntimeError: If another call has the threads.
    """
    sample = sample_peak if sample is None else sample
    samples: list[PeakSample] = []
    while len(samples) < _SAMPLES or (len(samples) < _MAX_SAMPLES and not any(taken.spread for taken in samples)):
        samples.append(sample(number_format, threads))
    return max([taken.gflops for taken in samples if taken.spread] or [taken.gflops for taken in samples])


def sample_peak(number_format: str, threads: int) -> PeakSample:
    """A short measurement, of a millisecond or two.

    Raises:
        RuntimeError: If another call has the threads.
    """
    target, dtype = current_target(), number_format if number_format == "float64" else "float32"
    instruction = instruction_of(number_format, target)
    job = _load_peak(instruction, dtype, target)
    results = aligned_empty(((threads + 1) * RESULT_BYTES,), np.uint8)
    results[:] = 0
    timed = _TimedJob(PEAK, threads, results=results.ctypes.data)
    operations = instruction.operations(target, dtype) * instruction.iterations * threads
    first = _CPUS_OFFSET // 8
    cpus = results.view(np.int64).reshape(threads + 1, RESULT_BYTES // 8)[1:, first : first + 2]
    samples = []
    for _ in range(_ROUNDS):
        seconds = timed.run(job)
        samples.append(PeakSample(operations / seconds / 1e9, is_spread(cpus, threads)))
    return max(samples, key=lambda sample: (sample.spread, sample.gflops))


def is_spread(cpus: NDArray[np.int64], threads: int) -> bool:
    """Whether each thread had a processor of its own, or all available processors were in use.

    ``cpus`` (threads, 2) are the processors on which each thread began and ended, -1 where the system does not tell.
    """
    if (cpus < 0).any():
        return True
    available = min(threads, env.processors())
    return all(len(np.unique(column)) >= available for column in cpus.T)


def measure_reading(size: int, threads: int, read: int, rounds: int) -> float:
    """GB/s that the threads read together. Each thread reads its own array again and again.

    Args:
        size: Bytes of a thread's array.
        threads: Their number.
        read: How many bytes a thread reads in a round, at least.
        rounds: How often to measure; the best round counts.

    Raises:
        RuntimeError: If another call has the threads.
    """
    target = current_target()
    group = _VECTORS_READ * target.vector_bits // 8
    size = max(1, size // group) * group
    arrays, results = aligned_empty((threads * size,), np.uint8), aligned_empty((threads * group,), np.uint8)
    arrays[:] = 0
    repeats = -(-read // size)
    job = function(load("reading", target, build_reading, target), "read", 2)
    timed = _TimedJob(
        _READING, threads, arrays=arrays.ctypes.data, size=size, repeats=repeats, results=results.ctypes.data
    )
    seconds = [timed.run(job) for _ in range(rounds)]
    return threads * size * repeats / min(seconds) / 1e9


class _TimedJob:
    """A job on some threads that wait for one another before they begin; ``fields`` are its other arguments."""

    def __init__(self, struct: Struct, threads: int, **fields: int) -> None:
        self._threads, self._team = threads, ThreadTeam(threads)
        self._barrier = aligned_empty((BARRIER_BYTES,), np.uint8)
        self._barrier[:] = 0
        fields |= {"barrier": self._barrier.ctypes.data, "num_threads": threads, "spins": self._team.spins}
        self._arguments = np.array(struct.values(fields), np.int64)

    def run(self, job: Callable[..., None]) -> float:
        """Seconds of a round."""
        began = time.perf_counter()
        if self._threads == 1:
            job(self._arguments.ctypes.data, 0)
        elif not self._team.run(job, self._arguments.ctypes.data, self._threads):
            raise RuntimeError(f"{self._threads} threads cannot be measured while another call uses them")
        return time.perf_counter() - began


@load_once(8)
def _load_peak(instruction: Instruction, dtype: str, target: Target) -> Job:
    name = f"peak_{instruction.name.replace(' ', '_')}_{dtype}"
    return function(load(name, target, build_peak, name, instruction, dtype, target), "peak", 2)


def build_peak(name: str, instruction: Instruction, dtype: str, target: Target) -> Module:
    """The module of ``peak(arguments, tid)``, a job of independent instructions."""
    f, c, v, tid = _begin("peak", name, PEAK, dtype, target)
    own = c.results + (tid + 1) * RESULT_BYTES
    f.store(current_cpu(f), own + _CPUS_OFFSET)
    instruction.emit(v, c.results, own)
    f.store(current_cpu(f), own + _CPUS_OFFSET + 8)
    f.ret()
    return f.module


def build_reading(target: Target) -> Module:
    """The module of ``read(arguments, tid)``, a job that adds up every vector of an array, again and again."""
    f, c, v, tid = _begin("read", "reading", _READING, "float32", target)
    begin = c.arrays + tid * c.size
    sums = [f.var(v.const(0.0)) for _ in range(_VECTORS_READ)]
    with f.loop(0, c.repeats), f.loop(0, c.size, _VECTORS_READ * v.bytes) as offset:
        for number, partial in enumerate(sums):
            source = begin + offset + number * v.bytes
            f.prefetch(source + _PREFETCH_DISTANCE)
            partial.set(partial.get() + v.load(source))
    for number, partial in enumerate(sums):
        v.store(partial.get(), c.results + tid * (_VECTORS_READ * v.bytes) + number * v.bytes)
    f.ret()
    return f.module


def _begin(
    name: str, module_name: str, struct: Struct, dtype: str, target: Target
) -> tuple[Function, Fields, Vectors, Value]:
    """Begin a job: all threads wait for one another. Return it, its arguments, its vectors and its thread's number.

    The system may put a woken thread on the processor of the thread that woke it. There it waits for a time slice:
    longer than the work that is measured. At a barrier the thread that woke it lets it run, and it migrates to a
    processor of its own.
    """
    module = Module(module_name)
    barrier = emit_barrier(module, emit_wait(module))
    f = Function(module, name, ["arguments", "tid"], exported=True)
    arguments, tid = f.arguments
    c = struct.read(f, arguments)
    f.call(barrier, c.barrier, c.num_threads, c.spins)
    return f, c, Vectors(f, target, dtype), tid
