"""What threads need in machine code: atomics, waiting, a barrier, jobs for a pool, and the rounding mode's flush bits.

Who waits spins for a while, yielding its processor now and then, and at last sleeps: on a futex where there is one
(Linux), elsewhere for a moment at a time.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from fusedrnn.jit.builder import I32, I64, VOID, Function, Value
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.target import is_x86

CACHE_LINE = 64
BARRIER_BYTES = 3 * CACHE_LINE
PROGRESS_BYTES = 2 * CACHE_LINE
# Fields that different threads write lie on cache lines of their own: eight integers each.
CONTROL = Struct(
    "job", "function", "arguments", "members", "stop", "spins", "places", "_7",
    "done", *(f"_{i}" for i in range(9, 16)),
    "asleep", *(f"_{i}" for i in range(17, 24)),
    "caller_asleep", *(f"_{i}" for i in range(25, 32)),
)  # fmt: skip
"""``places`` is where members note the processors that they run on, a number each; 0 if they need not be told apart."""
# The generation that a barrier's members wait on, the number that have arrived, the number asleep.
_GENERATION, _ARRIVED, _ASLEEP = 0, CACHE_LINE, 2 * CACHE_LINE
_FUTEX = {"x86_64": 202, "amd64": 202, "aarch64": 98}.get(platform.machine().lower())
_WAIT, _WAKE, _EVERYONE = 128, 129, 0x7FFFFFFF
_YIELD_HINT = 1
# Turns of a waiting loop between two yields of the processor: a few microseconds.
_YIELD_EVERY = 256
# Processors that a mask tells apart, as many as the C library's.
_PROCESSORS = 1024


def has_futex() -> bool:
    """Whether threads can sleep inside machine code."""
    return sys.platform == "linux" and _FUTEX is not None


def atomic_add(f: Function, address: Value, amount: int) -> Value:
    """Add to the integer at an address, all at once; what it was before."""
    return Value(f, f.builder.atomic_rmw("add", f.pointer(address), ir.Constant(I64, amount), "seq_cst"))


def atomic_load(f: Function, address: Value) -> Value:
    """The integer at an address, with all that its writer had written before it."""
    return Value(f, f.builder.load_atomic(f.pointer(address), "seq_cst", 8, typ=I64))


def atomic_store(f: Function, address: Value, value: Value) -> None:
    """Write an integer, after all that this thread has written before it."""
    typed = f.builder.inttoptr(address.ir, I64.as_pointer())  # what llvmlite's atomic store insists on
    f.builder.store_atomic(value.ir, typed, "seq_cst", 8)


def pause(f: Function) -> None:
    """Tell the processor that this is a waiting loop."""
    if is_x86():
        f.intrinsic("llvm.x86.sse2.pause", VOID, [])
    else:
        f.intrinsic("llvm.aarch64.hint", VOID, [ir.Constant(I32, _YIELD_HINT)])


def emit_wait(module: ir.Module) -> Function:
    """A function of (address, value, spins, asleep counter): return once the integer there is another one."""
    f = Function(module, "wait", ["address", "value", "spins", "asleep"])
    address, value, spins, asleep = f.arguments
    waited = f.var(0)
    with f.forever() as done:
        f.break_if(done, atomic_load(f, address).compare("!=", value))
        pause(f)
        waited.set(waited.get() + 1)
        # Who is waited for may be waiting for this very processor.
        if sys.platform != "win32":
            with f.if_((waited.get() & (_YIELD_EVERY - 1)).is_zero):
                f.intrinsic("sched_yield", I32, [])
        with f.if_(waited.get() > spins):
            _sleep(f, address, value, asleep)
    f.ret()
    return f


def _sleep(f: Function, address: Value, value: Value, asleep: Value) -> None:
    """Sleep until someone wakes those who wait on the address, or without a futex for a moment."""
    if has_futex():
        atomic_add(f, asleep, 1)
        with f.if_(atomic_load(f, address).equals(value)):
            _futex(f, address, _WAIT, value & 0xFFFFFFFF)
        atomic_add(f, asleep, -1)
    elif sys.platform == "win32":
        f.intrinsic("Sleep", VOID, [ir.Constant(I32, 1)])
    else:
        f.intrinsic("usleep", I32, [ir.Constant(I32, 100)])


def wake(f: Function, address: Value, asleep: Value) -> None:
    """Wake whoever sleeps on an address."""
    if has_futex():
        with f.if_(atomic_load(f, asleep) > 0):
            _futex(f, address, _WAKE, f.constant(_EVERYONE))


def _futex(f: Function, address: Value, operation: int, value: Value) -> None:
    zero = f.constant(0)
    f.intrinsic("syscall", I64, [f.constant(_FUTEX or 0), address, f.constant(operation), value, zero, zero, zero])


def emit_barrier(module: ir.Module, wait: Function) -> Function:
    """A function of (barrier, members, spins): return once that many threads have called it."""
    f = Function(module, "barrier", ["barrier", "members", "spins"])
    barrier, members, spins = f.arguments
    generation = atomic_load(f, barrier + _GENERATION)
    arrived = atomic_add(f, barrier + _ARRIVED, 1)
    with f.if_else(arrived.equals(members - 1)) as (last, others):
        with last:
            atomic_store(f, barrier + _ARRIVED, f.constant(0))
            atomic_add(f, barrier + _GENERATION, 1)
            wake(f, barrier + _GENERATION, barrier + _ASLEEP)
        with others:
            f.call(wait, barrier + _GENERATION, generation, spins, barrier + _ASLEEP)
    f.ret()
    return f


def emit_wait_for_progress(module: ir.Module, wait: Function) -> Function:
    """A function of (progress, steps, spins): return once what lies there says that so many steps are done."""
    f = Function(module, "wait_for_progress", ["progress", "steps", "spins"])
    progress, steps, spins = f.arguments
    with f.forever() as done:
        reached = atomic_load(f, progress)
        f.break_if(done, reached >= steps)
        f.call(wait, progress, reached, spins, progress + CACHE_LINE)
    f.ret()
    return f


def publish_progress(f: Function, progress: Value, steps: Value) -> None:
    """Let those who wait know that so many steps are done."""
    atomic_store(f, progress, steps)
    wake(f, progress, progress + CACHE_LINE)


def build_gang() -> ir.Module:
    """The module of ``work``, in which a member lives, ``dispatch``, which gives all a job, and ``stop``."""
    module = ir.Module("pool")
    wait = emit_wait(module)
    settle = emit_settle(module)
    _emit_work(module, wait, settle)
    _emit_dispatch(module, wait, settle)
    _emit_stop(module)
    return module


def _place(control: Value, name: str) -> Value:
    return control + 8 * CONTROL.index[name]


def _call_up(f: Function, control: Value) -> None:
    """Let the members see what has been written for them."""
    atomic_add(f, _place(control, "job"), 1)
    wake(f, _place(control, "job"), _place(control, "asleep"))


def _emit_stop(module: ir.Module) -> None:
    f = Function(module, "stop", ["control"], exported=True)
    (control,) = f.arguments
    f.store(1, _place(control, "stop"))
    _call_up(f, control)
    f.ret()


def _emit_work(module: ir.Module, wait: Function, settle: Function) -> None:
    f = Function(module, "work", ["control", "member", "seen"], exported=True)
    control, member, first = f.arguments
    fields = CONTROL.read(f, control)
    seen = f.var(first)
    with f.forever() as done:
        f.call(wait, _place(control, "job"), seen.get(), fields.spins, _place(control, "asleep"))
        seen.set(atomic_load(f, _place(control, "job")))
        f.break_if(done, fields.stop.is_set)
        with f.if_(member < fields.members):
            f.call(settle, fields.places, member)
            f.call_address(fields.function, fields.arguments, member)
        atomic_add(f, _place(control, "done"), 1)
        wake(f, _place(control, "done"), _place(control, "caller_asleep"))
    f.ret()


def _emit_dispatch(module: ir.Module, wait: Function, settle: Function) -> None:
    """``dispatch(control, function, arguments, members, workers, spins)``: the caller is member 0 of the job."""
    names = ["control", "function", "arguments", "members", "workers", "spins"]
    f = Function(module, "dispatch", names, exported=True)
    control, function, arguments, members, workers, spins = f.arguments
    for name, value in (("function", function), ("arguments", arguments), ("members", members)):
        f.store(value, _place(control, name))
    atomic_store(f, _place(control, "done"), f.constant(0))
    f.call(settle, CONTROL.read(f, control).places, 0)
    _call_up(f, control)
    f.call_address(function, arguments, f.constant(0))
    with f.forever() as done:
        finished = atomic_load(f, _place(control, "done"))
        f.break_if(done, finished >= workers)
        f.call(wait, _place(control, "done"), finished, spins, _place(control, "caller_asleep"))
    f.ret()


def has_affinity() -> bool:
    """Whether a thread can tell on which processor it runs, and choose another."""
    return sys.platform == "linux"


def emit_settle(module: ir.Module) -> Function:
    """A function of (places, member): a member that shares a processor with one before it moves to another.

    The system wakes a thread where it was last, or where the one runs that wakes it; that two of a pool share a
    processor while another idles, it finds out milliseconds later. Members' threads may then go where they like again.
    """
    f = Function(module, "settle", ["places", "member"])
    places, member = f.arguments
    if has_affinity():
        move = _emit_move(module)
        with f.if_(places.is_set):
            here = processor(f)
            f.store(here, places + member * 8)
            shared = f.var(0)
            with f.loop(0, member) as other:
                shared.set(f.load(places + other * 8).equals(here).select(1, shared.get()))
            with f.if_(shared.get().is_set):
                f.call(move, places, member)
    f.ret()
    return f


def processor(f: Function) -> Value:
    """The number of the processor that this thread runs on, where :func:`has_affinity`."""
    return Value(f, f.builder.sext(f.intrinsic("sched_getcpu", I32, []).ir, I64))


def _emit_move(module: ir.Module) -> Function:
    """A function of (places, member): go to a processor that this thread may use and no member before it does."""
    f = Function(module, "move", ["places", "member"])
    places, member = f.arguments
    allowed, free = (f.alloca(_PROCESSORS // 8) for _ in range(2))
    size, self = ir.Constant(I64, _PROCESSORS // 8), ir.Constant(I32, 0)
    found = f.intrinsic("sched_getaffinity", I32, [self, size, f.pointer(allowed)])
    with f.if_(found.is_zero):
        f.copy(free, allowed, f.constant(_PROCESSORS // 8))
        with f.loop(0, member) as other:
            taken = f.load(places + other * 8) & (_PROCESSORS - 1)
            word = free + (taken // 64) * 8
            f.store(f.load(word) & ((f.constant(1) << (taken & 63)) ^ -1), word)
        left = f.var(0)
        with f.loop(0, _PROCESSORS // 64) as word:
            left.set(left.get() | f.load(free + word * 8))
        with f.if_(left.get().is_set):
            for mask in (free, allowed):
                f.intrinsic("sched_setaffinity", I32, [self, size, f.pointer(mask)])
            f.store(processor(f), places + member * 8)
    f.ret()
    return f


@contextmanager
def flush_denormals(f: Function) -> Iterator[None]:
    """Treat denormal numbers as zero inside the block, then restore what was."""
    if is_x86():
        with f.builder.goto_entry_block():
            slot = f.builder.alloca(I32)
        f.intrinsic("llvm.x86.sse.stmxcsr", VOID, [slot])
        before = f.builder.load(slot, typ=I32)
        flush_to_zero, denormals_are_zero = 1 << 15, 1 << 6
        f.builder.store(f.builder.or_(before, ir.Constant(I32, flush_to_zero | denormals_are_zero)), slot)
        f.intrinsic("llvm.x86.sse.ldmxcsr", VOID, [slot])
        yield
        f.builder.store(before, slot)
        f.intrinsic("llvm.x86.sse.ldmxcsr", VOID, [slot])
    else:
        control = f.intrinsic("llvm.aarch64.get.fpcr", I64, [])
        f.intrinsic("llvm.aarch64.set.fpcr", VOID, [control | (1 << 24)])
        yield
        f.intrinsic("llvm.aarch64.set.fpcr", VOID, [control])
