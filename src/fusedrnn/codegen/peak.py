"""What any kernel can reach at most: a loop of independent fused multiply-adds, and one that does nothing but read."""

from __future__ import annotations

from fusedrnn.codegen.build import Function, Module
from fusedrnn.codegen.record import Record
from fusedrnn.codegen.target import Target
from fusedrnn.codegen.vector import Vectors

# More chains than latency times throughput asks for on any processor known, few enough for sixteen registers.
CHAINS = 12
TURNS = 250_000
RESULT_BYTES = 256
READING = Record("arrays", "size", "turns", "results")
"""Each member's array lies behind the one before; ``size`` bytes, whole groups of vectors, are read so many times."""
_VECTORS, _AHEAD = 8, 1024


def build_peak(dtype: str, target: Target) -> Module:
    """The module of ``peak(results, member)``, a gang's job of ``TURNS`` turns of ``CHAINS`` operations a member."""
    module = Module(f"peak_{dtype}")
    f = Function(module, "peak", ["results", "member"], exported=True)
    results, member = f.arguments
    v = Vectors(f, target, dtype)
    chains = [f.var(v.const(float(number))) for number in range(CHAINS)]
    # Factors from memory, so that the compiler cannot work out the result: h·0 + 0 of zeros stays a normal number.
    factor, addend = v.broadcast(results), v.broadcast(results + v.item)
    with f.loop(0, TURNS):
        for chain in chains:
            chain.set(v.fma(chain.get(), factor, addend))
    total = chains[0].get()
    for chain in chains[1:]:
        total = total + chain.get()
    v.store(total, results + (member + 1) * RESULT_BYTES)
    f.done()
    return module


def build_reading(target: Target) -> Module:
    """The module of ``read(call, member)``, a gang's job: every vector of an array is added up, again and again."""
    module = Module("reading")
    f = Function(module, "read", ["call", "member"], exported=True)
    call, member = f.arguments
    c, v = READING.read(f, call), Vectors(f, target, "float32")
    begin = c.arrays + member * c.size
    chains = [f.var(v.const(0.0)) for _ in range(_VECTORS)]
    with f.loop(0, c.turns), f.loop(0, c.size, _VECTORS * v.bytes) as at:
        for number, chain in enumerate(chains):
            source = begin + at + number * v.bytes
            f.prefetch(source + _AHEAD)
            chain.set(chain.get() + v.load(source))
    for number, chain in enumerate(chains):
        v.store(chain.get(), c.results + member * (_VECTORS * v.bytes) + number * v.bytes)
    f.done()
    return module


def reading_group(target: Target) -> int:
    """Bytes that are read in a turn of its loop, and that a member's results take."""
    return _VECTORS * target.vector_bits // 8
