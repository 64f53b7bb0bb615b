"""A loop of nothing but independent fused multiply-adds: the most that any kernel can reach."""

from __future__ import annotations

from fusedrnn.codegen.build import Function, Module
from fusedrnn.codegen.target import Target
from fusedrnn.codegen.vector import Vectors

# More chains than latency times throughput asks for on any processor known, few enough for sixteen registers.
CHAINS = 12
TURNS = 250_000
RESULT_BYTES = 256


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
