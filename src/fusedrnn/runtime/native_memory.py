"""Memory for machine code that runs without the interpreter: slots of scratch, taken and returned with atomics.

Calls at the same time take different slots, successive calls the same one. A slot's memory grows. That of the scratch
slots is never freed: as many of them have memory as calls have run at once.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fusedrnn.jit.builder import I32, I64, POINTER, VOID, Function, Module, Value
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import function, load, load_once
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


def free_with(owner: object, slots: NDArray[np.int64]) -> None:
    """Free the memory of slots, (slots, fields), with their owner, to which every call that uses them refers.

    The fields begin with those of :data:`SLOT`. At the interpreter's exit nothing is freed: a call may still run, in a
    thread that the interpreter does not know.
    """
    # Loaded now: the garbage collector may run the function anywhere, also in a thread that holds a lock of the loader.
    weakref.finalize(owner, _free_slots, _load_free_slots(), slots).atexit = False


def _free_slots(free: Callable[[int, int, int], None], slots: NDArray[np.int64]) -> None:
    free(slots.ctypes.data, len(slots), slots.strides[0])


@load_once()
def _load_free_slots() -> Callable[[int, int, int], None]:
    return function(load("free_slots", current_target(), _build_free_slots), "free_slots", 3)


def _build_free_slots() -> Module:
    """The module of ``free_slots(slots, num_slots, slot_bytes)``."""
    module = Module("free_slots")
    f = Function(module, "free_slots", ["slots", "num_slots", "slot_bytes"], exported=True)
    slots, num_slots, slot_bytes = f.arguments
    with f.loop(0, num_slots) as number:
        slot = slots + number * slot_bytes
        _free(f, SLOT.read(f, slot).address)
        for name in ("address", "size"):
            f.store(0, slot + SLOT.offset(name))
    f.ret()
    return module


def _allocate(f: Function, alignment: Value, size: Value) -> Value:
    if sys.platform == "win32":
        memory = f.intrinsic("_aligned_malloc", POINTER, [size, alignment])
    else:
        memory = f.intrinsic("aligned_alloc", POINTER, [alignment, size])
    return Value(f, f.builder.ptrtoint(memory.ir, I64))


def _free(f: Function, address: Value) -> None:
    f.intrinsic("_aligned_free" if sys.platform == "win32" else "free", VOID, [f.pointer(address)])
