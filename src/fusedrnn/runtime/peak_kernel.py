"""What any kernel can reach at most: a loop of independent fused multiply-adds, and one that does nothing but read."""

from __future__ import annotations

from fusedrnn.jit.builder import Function, Module, Value
from fusedrnn.jit.struct import Fields, Struct
from fusedrnn.jit.sync import emit_barrier, emit_wait, has_affinity, processor
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors

# More chains than latency times throughput asks for on any processor known, few enough for sixteen registers.
CHAINS = 12
TURNS = 250_000
RESULT_BYTES = 256
PROCESSORS_AT = 128
"""Where in a member's results the processors lie that it ran on at its beginning and its end, 64-bit integers."""
MEETING = ("barrier", "members", "spins")
PEAK = Struct("results", *MEETING)
"""The factor and the addend lie at ``results``, what member m computed (m + 1) times ``RESULT_BYTES`` behind them."""
READING = Struct("arrays", "size", "turns", "results", *MEETING)
"""Each member's array lies behind the one before; ``size`` bytes, whole groups of vectors, are read so many times."""
_VECTORS, _AHEAD = 8, 1024


def build_peak(dtype: str, target: Target) -> Module:
    """The module of ``peak(call, member)``, a job of ``TURNS`` turns of ``CHAINS`` operations a member."""
    module = Module(f"peak_{dtype}")
    meet = emit_barrier(module, emit_wait(module))
    f = Function(module, "peak", ["call", "member"], exported=True)
    call, member = f.arguments
    c, v = PEAK.read(f, call), Vectors(f, target, dtype)
    results, own = c.results, c.results + (member + 1) * RESULT_BYTES
    _meet(f, c, meet)
    _note_processor(f, own + PROCESSORS_AT)
    chains = [f.var(v.const(float(number))) for number in range(CHAINS)]
    # Factors from memory, so that the compiler cannot work out the result: h·0 + 0 of zeros stays a normal number.
    factor, addend = v.broadcast(results), v.broadcast(results + v.item)
    with f.loop(0, TURNS):
        for chain in chains:
            chain.set(v.fma(chain.get(), factor, addend))
    total = chains[0].get()
    for chain in chains[1:]:
        total = total + chain.get()
    v.store(total, own)
    _note_processor(f, own + PROCESSORS_AT + 8)
    f.ret()
    return module


def _meet(f: Function, call: Fields, meet: Function) -> None:
    """Wait until every member runs.

    The system may wake a thread on the processor of the thread that woke it, where it waits for a time slice: longer
    than the work that is measured. At a barrier the other lets it run, and it moves to a processor of its own.
    """
    f.call(meet, call.barrier, call.members, call.spins)


def _note_processor(f: Function, address: Value) -> None:
    """Write the number of the processor that this thread runs on, -1 where the system does not tell."""
    f.store(processor(f) if has_affinity() else f.constant(-1), address)


def build_reading(target: Target) -> Module:
    """The module of ``read(call, member)``, a job: every vector of an array is added up, again and again."""
    module = Module("reading")
    meet = emit_barrier(module, emit_wait(module))
    f = Function(module, "read", ["call", "member"], exported=True)
    call, member = f.arguments
    c, v = READING.read(f, call), Vectors(f, target, "float32")
    _meet(f, c, meet)
    begin = c.arrays + member * c.size
    chains = [f.var(v.const(0.0)) for _ in range(_VECTORS)]
    with f.loop(0, c.turns), f.loop(0, c.size, _VECTORS * v.bytes) as at:
        for number, chain in enumerate(chains):
            source = begin + at + number * v.bytes
            f.prefetch(source + _AHEAD)
            chain.set(chain.get() + v.load(source))
    for number, chain in enumerate(chains):
        v.store(chain.get(), c.results + member * (_VECTORS * v.bytes) + number * v.bytes)
    f.ret()
    return module


def reading_group(target: Target) -> int:
    """Bytes that are read in a turn of its loop, and that a member's results take."""
    return _VECTORS * target.vector_bits // 8
