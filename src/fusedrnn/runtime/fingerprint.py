"""A fingerprint of memory, computed at the speed of reading it: has the content changed?

Eight independent 64-bit lanes compute h ← rotate((h ⊕ word)·odd). Every step is a bijection, so a change of a single
word always shows. Any other change is missed with a probability of about 2⁻⁶⁴: the product spreads a difference to
higher bits, and the rotation brings high bits, such as a sign, down to where the next product spreads them. (Without
the rotation, two changed signs in one lane would cancel.) Changes that it misses can be constructed on purpose.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fusedrnn.jit.builder import I32, I64, Function, Module, Value, Variable
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import function, load, load_once
from fusedrnn.jit.struct import Struct

LANES = 8
MEMORY_RANGE = Struct("begin", "size", "copy")
"""A range of memory: its address, its bytes (a multiple of 4), and the address to copy them to; 0 for no copy."""
_BEGIN, _COPY = MEMORY_RANGE.index["begin"], MEMORY_RANGE.index["copy"]
_ODD = 0x9E3779B97F4A7C15
# Not a multiple of 32: that would move the sign bit of one float to the sign bit of another.
_ROTATION = 47


def fingerprint_of(ranges: NDArray[np.int64]) -> bytes:
    """The fingerprints of ranges of memory, the rows of an array; see :data:`MEMORY_RANGE`."""
    result = np.empty((len(ranges), LANES), np.int64)
    load_fingerprint()(ranges.ctypes.data, len(ranges), result.ctypes.data)
    return result.tobytes()


class ScatteredVector:
    """A flat vector whose parts are in different places.

    Args:
        parts: The range of each part, rows of :data:`MEMORY_RANGE`, whose ``begin`` and ``copy`` are offsets in the
            vector.
        addresses: Where each part is; address 0 stands for a part that is all zeros.
    """

    def __init__(self, parts: NDArray[np.int64], addresses: Sequence[int]) -> None:
        ranges = parts.copy()
        ranges[:, _BEGIN] = addresses
        missing = ranges[:, _BEGIN] == 0
        self._zeros = [(int(offset), int(size)) for _, size, offset in ranges[missing]]
        self._ranges = ranges = ranges[~missing]
        self._offsets = ranges[:, _COPY].copy()
        ranges[:, _COPY] = 0
        self._copying = 0, ranges

    def fingerprint(self) -> bytes:
        """The fingerprint of the parts."""
        return fingerprint_of(self._ranges)

    def copy_to(self, flat: int) -> bytes:
        """Copy the parts, one after the other, to this address; return the fingerprint of the copy.

        Another thread may write the parts meanwhile.
        """
        for offset, size in self._zeros:
            ctypes.memset(flat + offset, 0, size)
        last, ranges = self._copying  # a training loop copies to the same memory at every step
        if last != flat:
            ranges = self._ranges.copy()
            ranges[:, _COPY] = self._offsets + flat
            self._copying = flat, ranges
        return fingerprint_of(ranges)


@load_once()
def load_fingerprint() -> Callable[..., None]:
    """Load the function of (ranges, count, result)."""
    return function(load("fingerprint", current_target(), build_fingerprint), "fingerprint", 3)


def build_fingerprint() -> Module:
    """The module of ``fingerprint(ranges, count, result)``, which writes eight integers for each range."""
    module = Module("fingerprint")
    read_only, copying = (_emit_range(module, name) for name in ("read", "copy"))
    f = Function(module, "fingerprint", ["ranges", "count", "result"], exported=True)
    ranges, count, result = f.arguments
    with f.loop(0, count) as number:
        fields = MEMORY_RANGE.read(f, ranges + number * MEMORY_RANGE.size)
        arguments = fields.begin, fields.size, result + number * (8 * LANES), fields.copy
        with f.if_else(fields.copy.is_zero) as (without_copy, with_copy):
            with without_copy:
                f.call(read_only, *arguments)
            with with_copy:
                f.call(copying, *arguments)
    f.ret()
    return module


def _emit_range(module: Module, name: str) -> Function:
    """A function of one range; the function named ``copy`` copies the range as well."""
    f = Function(module, name, ["data", "size", "result", "copy"])
    data, size, result, copy = f.arguments
    lanes = [f.var(lane + 1) for lane in range(LANES)]
    odd, rotation = f.constant(_ODD), f.constant(_ROTATION)

    def mix(lane: Variable, word: Value, offset: Value) -> None:
        if name == "copy":
            f.store(word, copy + offset, align=1)
        wide = word if word.type == I64 else word.zext(I64)
        product = (lane.get() ^ wide) * odd
        lane.set(f.intrinsic("llvm.fshl.i64", I64, [product, product, rotation]))

    whole = size - size % (8 * LANES)
    with f.loop(0, whole, 8 * LANES) as offset:
        for number, lane in enumerate(lanes):
            mix(lane, f.load(data + offset + 8 * number, align=1), offset + 8 * number)
    with f.loop(whole, size, 4) as offset:
        mix(lanes[0], f.load(data + offset, I32, align=1), offset)
    for number, lane in enumerate(lanes):
        f.store(lane.get(), result + 8 * number)
    f.ret()
    return f
