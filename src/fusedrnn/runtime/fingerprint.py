"""A fingerprint of memory's content, at the speed at which it is read: has it changed since it was packed?

Eight independent 64-bit lanes of h ← rotate((h ⊕ word)·odd): every step is a bijection, so that a change in a single
word always shows. Any other goes unseen only by a chance of about 2⁻⁶⁴: the product spreads a difference upwards, and
the rotation carries what arrives at the top, such as a sign, down to where the next product spreads it again. (Without
it two changed signs in one lane would cancel.) It is no defence against malice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from fusedrnn.jit.builder import I32, I64, Function, Value, Variable
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import function, load, load_once
from fusedrnn.jit.struct import Struct

LANES = 8
MEMORY_RANGE = Struct("begin", "size", "copy")
"""Memory to look at: its address, its bytes (a multiple of 4), and where to copy what has been seen; 0 for nowhere."""
_ODD = 0x9E3779B97F4A7C15
# No multiple of 32: a sign must not come to lie on another one's place.
_ROTATION = 47


def fingerprint_of(parts: NDArray[np.int64]) -> bytes:
    """A fingerprint of each part of memory, rows of :data:`MEMORY_RANGE`; some may be copied."""
    into = np.empty((len(parts), LANES), np.int64)
    load_fingerprint()(parts.ctypes.data, len(parts), into.ctypes.data)
    return into.tobytes()


@load_once()
def load_fingerprint() -> Callable[..., None]:
    """The function of (parts, count, into)."""
    return function(load("fingerprint", current_target(), build_fingerprint), "fingerprint", 3)


def build_fingerprint() -> ir.Module:
    """The module of ``fingerprint(parts, count, into)``: ``into`` gets eight integers for each part."""
    module = ir.Module("fingerprint")
    plain, copying = (_emit_part(module, name) for name in ("look", "copy"))
    f = Function(module, "fingerprint", ["parts", "count", "into"], exported=True)
    parts, count, into = f.arguments
    with f.loop(0, count) as number:
        part = MEMORY_RANGE.read(f, parts + number * MEMORY_RANGE.size)
        arguments = part.begin, part.size, into + number * (8 * LANES), part.copy
        with f.if_else(part.copy.is_zero) as (look, copy):
            with look:
                f.call(plain, *arguments)
            with copy:
                f.call(copying, *arguments)
    f.ret()
    return module


def _emit_part(module: ir.Module, name: str) -> Function:
    f = Function(module, name, ["data", "size", "into", "copy"])
    data, size, into, copy = f.arguments
    lanes = [f.var(lane + 1) for lane in range(LANES)]
    odd, rotation = Value(f, ir.Constant(I64, _ODD)), f.constant(_ROTATION)

    def mix(lane: Variable, word: Value, at: Value) -> None:
        if name == "copy":
            f.store(word, copy + at, align=1)
        wide = word if word.type == I64 else Value(f, f.builder.zext(word.ir, I64))
        product = (lane.get() ^ wide) * odd
        lane.set(f.intrinsic("llvm.fshl.i64", I64, [product, product, rotation]))

    whole = size - size % (8 * LANES)
    with f.loop(0, whole, 8 * LANES) as at:
        for number, lane in enumerate(lanes):
            mix(lane, f.load(data + at + 8 * number, align=1), at + 8 * number)
    with f.loop(whole, size, 4) as at:
        mix(lanes[0], f.load(data + at, I32, align=1), at)
    for number, lane in enumerate(lanes):
        f.store(lane.get(), into + 8 * number)
    f.ret()
    return f
