"""A fingerprint of an array's bytes, at the speed at which memory is read: has it changed since it was packed?

Eight independent 64-bit lanes of h ← (h ⊕ word)·odd: every step is a bijection, so that a change in a single word
always shows, and any other goes unseen with a chance of at most 2⁻⁶⁴. It is no defence against malice.
"""

from __future__ import annotations

from llvmlite import ir

from fusedrnn.codegen.build import I32, I64, Function, Value

LANES = 8
_ODD = 0x9E3779B97F4A7C15


def build_fingerprint() -> ir.Module:
    """The module of ``fingerprint(data, bytes, into)``: bytes a multiple of 4, ``into`` eight integers."""
    module = ir.Module("fingerprint")
    f = Function(module, "fingerprint", ["data", "bytes", "into"], exported=True)
    data, size, into = f.arguments
    lanes = [f.var(lane + 1) for lane in range(LANES)]
    odd = Value(f, ir.Constant(I64, _ODD))
    whole = size - size % (8 * LANES)
    with f.loop(0, whole, 8 * LANES) as at:
        for number, lane in enumerate(lanes):
            lane.set((lane.get() ^ f.load(data + at + 8 * number, align=1)) * odd)
    with f.loop(whole, size, 4) as at:
        word = Value(f, f.builder.zext(f.load(data + at, I32, align=1).ir, I64))
        lanes[0].set((lanes[0].get() ^ word) * odd)
    for number, lane in enumerate(lanes):
        f.store(lane.get(), into + 8 * number)
    f.done()
    return module
