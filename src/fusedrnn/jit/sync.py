"""What threads need inside machine code: atomics, waiting, a barrier, progress counters, flush-to-zero mode.

A waiting thread first spins and yields its processor from time to time. Then it sleeps: on a futex where there is one
(Linux), elsewhere for a moment at a time.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fusedrnn.jit.builder import I32, I64, VOID, Function, Module, Value
from fusedrnn.jit.target import is_x86

CACHE_LINE = 64
BARRIER_BYTES = 3 * CACHE_LINE
PROGRESS_BYTES = 2 * CACHE_LINE
# Offsets in a barrier: the generation that threads wait on, how many threads have arrived, how many are asleep. Each
# number has a cache line of its own, because different threads write them.
_GENERATION, _ARRIVED, _ASLEEP = 0, CACHE_LINE, 2 * CACHE_LINE
# Linux: the number of the system call, and its operations on a futex of this process.
_FUTEX_NUMBERS = {"x86_64": 202, "amd64": 202, "aarch64": 98}
_FUTEX = _FUTEX_NUMBERS.get(platform.machine().lower()) if sys.platform == "linux" else None
_FUTEX_WAIT, _FUTEX_WAKE, _EVERYONE = 128, 129, 0x7FFFFFFF
_AARCH64_YIELD = 1
_CAN_YIELD = sys.platform != "win32"
# Iterations of a waiting loop between two yields of the processor: a few microseconds.
_ITERATIONS_PER_YIELD = 256


def atomic_add(f: Function, address: Value, amount: int) -> Value:
    """Add to the integer at an address atomically, and return what it was before."""
    return Value(f, f.builder.atomic_rmw("add", f.pointer(address), I64(amount), "seq_cst"))


def atomic_load(f: Function, address: Value) -> Value:
    """Load the integer at an address; all that the thread which stored it wrote before is visible, too."""
    return Value(f, f.builder.load_atomic(f.pointer(address), "seq_cst", 8, typ=I64))


def atomic_store(f: Function, address: Value, value: Value) -> None:
    """Store an integer; a thread that loads it sees all that this thread wrote before."""
    typed_pointer = f.builder.inttoptr(address.ir, I64.as_pointer())  # llvmlite's atomic store takes no other
    f.builder.store_atomic(value.ir, typed_pointer, "seq_cst", 8)


def try_lock(f: Function, address: Value) -> Value:
    """Set the integer at an address to 1; return whether it was 0 before. Unlock by storing 0 atomically."""
    return Value(f, f.builder.atomic_rmw("xchg", f.pointer(address), I64(1), "seq_cst")).is_zero


def lock(f: Function, address: Value) -> None:
    """Return once this thread has set the integer at an address from 0 to 1: for locks that are held briefly."""
    with f.forever() as loop:
        f.break_if(loop, try_lock(f, address))
        yield_processor(f)


def unlock(f: Function, address: Value) -> None:
    """Let others lock the integer at an address."""
    atomic_store(f, address, f.constant(0))


def yield_processor(f: Function) -> None:
    """Let another thread run on this processor, where the system can."""
    if _CAN_YIELD:
        f.intrinsic("sched_yield", I32, [])


def emit_wait(module: Module) -> Function:
    """A function of (address, value, spins, asleep): return once the integer at the address is not the value.

    After ``spins`` iterations the thread sleeps; ``asleep`` is the address of the number of sleeping threads.
    """
    f = Function(module, "wait", ["address", "value", "spins", "asleep"])
    address, value, spins, asleep = f.arguments
    iterations = f.var(0)
    with f.forever() as loop:
        f.break_if(loop, atomic_load(f, address).compare("!=", value))
        # Tell the processor that this is a waiting loop.
        if is_x86():
            f.intrinsic("llvm.x86.sse2.pause", VOID, [])
        else:
            f.intrinsic("llvm.aarch64.hint", VOID, [I32(_AARCH64_YIELD)])
        iterations.set(iterations.get() + 1)
        # The thread that this one waits for may be waiting for this very processor.
        if _CAN_YIELD:
            with f.if_((iterations.get() & (_ITERATIONS_PER_YIELD - 1)).is_zero):
                yield_processor(f)
        with f.if_(iterations.get() > spins):
            _sleep(f, address, value, asleep)
    f.ret()
    return f


def _sleep(f: Function, address: Value, value: Value, asleep: Value) -> None:
    """Sleep until :func:`wake` is called for the address, or without a futex for a moment."""
    if _FUTEX is not None:
        atomic_add(f, asleep, 1)
        with f.if_(atomic_load(f, address).equals(value)):
            _futex(f, _FUTEX, address, _FUTEX_WAIT, value & 0xFFFFFFFF)
        atomic_add(f, asleep, -1)
    elif sys.platform == "win32":
        f.intrinsic("Sleep", VOID, [I32(1)])
    else:
        f.intrinsic("usleep", I32, [I32(100)])


def wake(f: Function, address: Value, asleep: Value) -> None:
    """Wake all threads that sleep until the integer at an address changes."""
    if _FUTEX is not None:
        with f.if_(atomic_load(f, asleep) > 0):
            _futex(f, _FUTEX, address, _FUTEX_WAKE, f.constant(_EVERYONE))


def _futex(f: Function, number: int, address: Value, operation: int, value: Value) -> None:
    zero = f.constant(0)
    f.intrinsic("syscall", I64, [f.constant(number), address, f.constant(operation), value, zero, zero, zero])


def emit_barrier(module: Module, wait: Function) -> Function:
    """A function of (barrier, num_threads, spins): return once that many threads have called it."""
    f = Function(module, "barrier", ["barrier", "num_threads", "spins"])
    barrier, num_threads, spins = f.arguments
    generation = atomic_load(f, barrier + _GENERATION)
    arrived = atomic_add(f, barrier + _ARRIVED, 1)
    with f.if_else(arrived.equals(num_threads - 1)) as (last, others):
        with last:
            atomic_store(f, barrier + _ARRIVED, f.constant(0))
            atomic_add(f, barrier + _GENERATION, 1)
            wake(f, barrier + _GENERATION, barrier + _ASLEEP)
        with others:
            f.call(wait, barrier + _GENERATION, generation, spins, barrier + _ASLEEP)
    f.ret()
    return f


def emit_wait_for_progress(module: Module, wait: Function) -> Function:
    """A function of (progress, steps, spins): return once :func:`publish_progress` has published that many steps."""
    f = Function(module, "wait_for_progress", ["progress", "steps", "spins"])
    progress, steps, spins = f.arguments
    with f.forever() as loop:
        published = atomic_load(f, progress)
        f.break_if(loop, published >= steps)
        f.call(wait, progress, published, spins, progress + CACHE_LINE)
    f.ret()
    return f


def publish_progress(f: Function, progress: Value, steps: Value) -> None:
    """Tell the threads that wait for this progress how many steps are done."""
    atomic_store(f, progress, steps)
    wake(f, progress, progress + CACHE_LINE)


@contextmanager
def flush_denormals(f: Function) -> Iterator[None]:
    """Treat denormal numbers as zero inside the block; then restore the caller's mode."""
    if is_x86():
        with f.builder.goto_entry_block():
            slot = f.builder.alloca(I32)
        f.intrinsic("llvm.x86.sse.stmxcsr", VOID, [slot])
        before = f.builder.load(slot, typ=I32)
        flush_to_zero, denormals_are_zero = 1 << 15, 1 << 6
        f.builder.store(f.builder.or_(before, I32(flush_to_zero | denormals_are_zero)), slot)
        f.intrinsic("llvm.x86.sse.ldmxcsr", VOID, [slot])
        yield
        f.builder.store(before, slot)
        f.intrinsic("llvm.x86.sse.ldmxcsr", VOID, [slot])
    else:
        control = f.intrinsic("llvm.aarch64.get.fpcr", I64, [])
        f.intrinsic("llvm.aarch64.set.fpcr", VOID, [control | (1 << 24)])
        yield
        f.intrinsic("llvm.aarch64.set.fpcr", VOID, [control])
