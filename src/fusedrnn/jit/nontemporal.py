"""Non-temporal stores, which go past the caches: the store, the fence after it, and whether memory gains from it."""

from __future__ import annotations

import sys

from fusedrnn.jit.builder import I32, I64, VOID, Function, Value
from fusedrnn.jit.target import is_x86

_PAGE = 4096


def store_nontemporal(f: Function, value: Value, address: Value, align: int) -> None:
    """Write a value past the caches. Call :func:`fence_nontemporal_stores` before another thread is to read it."""
    store = f.builder.store(value.ir, f.pointer(address), align=align)
    store.set_metadata("nontemporal", f.builder.module.add_metadata([I32(1)]))


def fence_nontemporal_stores(f: Function) -> None:
    """Order stores past the caches before all stores that follow. x86 does so only on request."""
    if is_x86():
        f.intrinsic("llvm.x86.sse.sfence", VOID, [])


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
