"""A fingerprint of an array's bytes, at the speed at which memory is read: has it changed since it was packed?

Eight independent 64-bit lanes of h ← rotate((h ⊕ word)·odd): every step is a bijection, so that a change in a single
word always shows. Any other goes unseen only by a chance of about 2⁻⁶⁴: the product spreads a difference upwards, and
the rotation carries what arrives at the top, such as a sign, down to where the next product spreads it again. (Without
it two changed signs in one lane would cancel.) It is no defence against malice.
"""

from __future__ import annotations

from llvmlite import ir

from fusedrnn.codegen.build import I32, I64, Function, Value, Variable

LANES = 8
_ODD = 0x9E3779B97F4A7C15
# No multiple of 32: a sign must not come to lie on another one's place.
_ROTATION = 47


def build_fingerprint() -> ir.Module:
    """The module of ``fingerprint(data, parts, count, into)``.

    ``parts`` are pairs of where a part begins, relative to ``data``, and its bytes, a multiple of 4; ``into`` gets
    eight integers for each.
    """
    module = ir.Module("fingerprint")
    f = Function(module, "fingerprint", ["data", "parts", "count", "into"], exported=True)
    data, parts, count, into = f.arguments
    with f.loop(0, count) as part:
        begin, size = data + f.load(parts + part * 16), f.load(parts + part * 16 + 8)
        _emit_part(f, begin, size, into + part * (8 * LANES))
    f.done()
    return module


def _emit_part(f: Function, data: Value, size: Value, into: Value) -> None:
    lanes = [f.var(lane + 1) for lane in range(LANES)]
    odd, rotation = Value(f, ir.Constant(I64, _ODD)), f.constant(_ROTATION)

    def mix(lane: Variable, word: Value) -> None:
        product = (lane.get() ^ word) * odd
        lane.set(f.intrinsic("llvm.fshl.i64", I64, [product, product, rotation]))

    whole = size - size % (8 * LANES)
    with f.loop(0, whole, 8 * LANES) as at:
        for number, lane in enumerate(lanes):
            mix(lane, f.load(data + at + 8 * number, align=1))
    with f.loop(whole, size, 4) as at:
        word = Value(f, f.builder.zext(f.load(data + at, I32, align=1).ir, I64))
        mix(lanes[0], word)
    for number, lane in enumerate(lanes):
        f.store(lane.get(), into + 8 * number)
