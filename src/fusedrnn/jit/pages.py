"""Whether memory has been used before, asked from machine code."""

from __future__ import annotations

import sys

from fusedrnn.jit.builder import I32, I64, Function, Value

_PAGE = 4096


def is_resident(f: Function, address: Value) -> Value:
    """Whether the page of an address is in memory; false where the system does not tell.

    A page of new memory is not, until its first use, when the system fills it with zeros.
    """
    if sys.platform != "linux":
        return f.constant(0).is_set
    resident = f.alloca(8)
    f.store(f.constant(0), resident)
    page = address & -_PAGE
    f.intrinsic("mincore", I32, [f.pointer(page), I64(1), f.pointer(resident)])
    return (f.load(resident) & 1).is_set
