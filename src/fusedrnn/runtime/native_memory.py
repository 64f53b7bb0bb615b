"""Memory for machine code that runs without the interpreter: slots of scratch, taken and returned with atomics.

Calls at the same time take different slots, successive calls the same one. A slot's memory grows and is never freed:
as many slots have memory as calls have run at once.
"""

from __future__ import annotations

import sys

import numpy as np

from fusedrnn.jit.builder import I32, I64, POINTER, VOID, Function, Module, Value
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.sync import try_lock, yield_processor
from fusedrnn.runtime.buffers import aligned_empty

SLOT = Struct("busy", "address", "size", *(f"_{i}" for i in range(3, 8)))
"""A slot: whether a call has it, the address of its memory, and how many bytes that has. It fills a cache line."""
_NUM_SLOTS = 16
_CACHE_LINE, _HUGE_PAGE = 64, 2 << 20
# Memory of at least this many bytes begins at a huge page, and the system is asked for huge pages.
_MIN_HUGE = 3 << 18
_MADV_HUGEPAGE = 14

_slots = aligned_empty((_NUM_SLOTS, len(SLOT)), np.int64)
_slots[:] = 0


def emit_acquire_scratch(module: Module, grow: Function) -> Function:
    """Emit the function of (slots, size) that takes a slot of at least that many bytes, and returns its address.

    It returns 0 if there is no memory. If all slots are taken, it waits. Return a slot with
    :func:`fusedrnn.jit.sync.unlock`. ``grow`` is from :func:`emit_grow`.
    """
    f = Function(module, "acquire_scratch", ["slots", "size"], returns=True)
    slots, size = f.arguments
    slot = f.var(0)
    with f.forever() as loop:
        with f.loop(0, _NUM_SLOTS) as number:
            candidate = slots + number * SLOT.size
            with f.if_(slot.get().is_zero), f.if_(try_lock(f, candidate + SLOT.offset("busy"))):
                slot.set(candidate)
        f.break_if(loop, slot.get().is_set)
        yield_processor(f)
    fits = f.call(grow, slot.get(), size)
    with f.if_(fits.is_zero):
        f.store(0, slot.get() + SLOT.offset("busy"))
        slot.set(0)
    f.ret(slot.get())
    return f


def scratch_slots() -> int:
    """The address of the slots of the process, for the function of :func:`emit_acquire_scratch`."""
    return int(_slots.ctypes.data)


def emit_grow(module: Module) -> Function:
    """Emit the function of (slot, size) that gives the slot that many bytes, and returns whether it could.

    If the memory has to grow, its content is lost.
    """
    f = Function(module, "grow", ["slot", "size"], returns=True)
    slot, size = f.arguments
    fields = SLOT.read(f, slot)
    fits = f.var(1)
    with f.if_(fields.size < size):
        _free(f, fields.address)
        rounded = (size + (_HUGE_PAGE - 1)) & -_HUGE_PAGE
        huge = size >= _MIN_HUGE
        capacity = huge.select(rounded, (size + (_CACHE_LINE - 1)) & -_CACHE_LINE)
        address = _allocate(f, huge.select(f.constant(_HUGE_PAGE), _CACHE_LINE), capacity)
        if sys.platform == "linux":
            with f.if_(huge & address.is_set):
                f.intrinsic("madvise", I32, [f.pointer(address), capacity, I32(_MADV_HUGEPAGE)])
        f.store(address, slot + SLOT.offset("address"))
        f.store(address.is_set.select(capacity, 0), slot + SLOT.offset("size"))
        fits.set(address.is_set.zext(I64))
    f.ret(fits.get())
    return f


def _allocate(f: Function, alignment: Value, size: Value) -> Value:
    if sys.platform == "win32":
        memory = f.intrinsic("_aligned_malloc", POINTER, [size, alignment])
    else:
        memory = f.intrinsic("aligned_alloc", POINTER, [alignment, size])
    return Value(f, f.builder.ptrtoint(memory.ir, I64))


def _free(f: Function, address: Value) -> None:
    f.intrinsic("_aligned_free" if sys.platform == "win32" else "free", VOID, [f.pointer(address)])
