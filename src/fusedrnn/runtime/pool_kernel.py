"""The machine code of the thread pool: the loop that its threads live in, and how the caller gives them a job."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fusedrnn.jit.builder import I32, I64, Function, Module, Value
from fusedrnn.jit.c_function import emit_c_function
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.sync import atomic_add, atomic_load, atomic_store, emit_wait, lock, try_lock, unlock, wake

# Fields that different threads write lie on cache lines of their own, eight integers each.
CONTROL = Struct(
    "job_count", "function", "arguments", "num_threads", "stop", "spins", "cpu_of_thread", "_7",
    "num_done", *(f"_{i}" for i in range(9, 16)),
    "num_asleep", *(f"_{i}" for i in range(17, 24)),
    "caller_asleep", *(f"_{i}" for i in range(25, 32)),
    "busy", "workers", "caller_spins", *(f"_{i}" for i in range(35, 40)),
)  # fmt: skip
"""The pool's control block. ``cpu_of_thread`` is the address of a table of the processors that its threads run on; 0 if
they need not be kept apart. ``busy`` is not 0 while a job runs and after the pool is stopped. ``workers`` is how many
threads there are beside the caller's. Such a thread waits for ``spins`` iterations before it sleeps, the caller for
``caller_spins``."""
SPINNING = 2e-4
"""Seconds after a job for which a call counts on its threads still spinning. They do so a little longer."""
CLOSE, MANY_CLOSE = 1e-4, 3
"""Calls are close if less than CLOSE seconds lie between them. After MANY_CLOSE in a row it pays to wake threads."""
NO_POOL, RAN, BUSY = range(3)
"""What :func:`emit_run_on_pool` returns: there is no pool of that size, the job has run, or another has the threads."""
# Whether a thread can tell on which processor it runs, and choose another.
_HAS_AFFINITY = sys.platform == "linux"
# How many processors a mask of the C library holds.
_MAX_CPUS = 1024


def build_pool() -> Module:
    """The module of ``worker_loop``, ``dispatch``, ``stop``, and ``run_on_pool`` as a builtin function."""
    module = Module("pool")
    wait = emit_wait(module)
    spread_out = emit_spread_out(module)
    _emit_worker_loop(module, wait, spread_out)
    _emit_dispatch(module, wait, spread_out)
    _emit_stop(module)
    emit_c_function(module, emit_run_on_pool(module))
    return module


def _field(control: Value, name: str) -> Value:
    return control + CONTROL.offset(name)


def _publish_job(f: Function, control: Value) -> None:
    """Start the threads on the job in the control block."""
    atomic_add(f, _field(control, "job_count"), 1)
    wake(f, _field(control, "job_count"), _field(control, "num_asleep"))


def _emit_stop(module: Module) -> None:
    """``stop(control)``: once no job runs, the threads leave their loops; later jobs are refused."""
    f = Function(module, "stop", ["control"], exported=True)
    (control,) = f.arguments
    with f.if_(CONTROL.read(f, control).stop.is_zero):
        lock(f, _field(control, "busy"))
    f.store(1, _field(control, "stop"))
    _publish_job(f, control)
    f.ret()


def _emit_worker_loop(module: Module, wait: Function, spread_out: Function) -> None:
    """``worker_loop(control, tid, jobs_seen)``: run jobs until the pool is stopped."""
    f = Function(module, "worker_loop", ["control", "tid", "jobs_seen"], exported=True)
    control, tid, initial = f.arguments
    fields = CONTROL.read(f, control)
    jobs_seen = f.var(initial)
    with f.forever() as loop:
        f.call(wait, _field(control, "job_count"), jobs_seen.get(), fields.spins, _field(control, "num_asleep"))
        jobs_seen.set(atomic_load(f, _field(control, "job_count")))
        f.break_if(loop, fields.stop.is_set)
        with f.if_(tid < fields.num_threads):
            f.call(spread_out, fields.cpu_of_thread, tid)
            f.call_address(fields.function, fields.arguments, tid)
        atomic_add(f, _field(control, "num_done"), 1)
        wake(f, _field(control, "num_done"), _field(control, "caller_asleep"))
    f.ret()


def _emit_dispatch(module: Module, wait: Function, spread_out: Function) -> None:
    """``dispatch(control, function, arguments, num_threads)``: run a job; the caller is thread 0.

    It returns 1, or 0 if it has not run the job because another one runs.
    """
    names = ["control", "function", "arguments", "num_threads"]
    f = Function(module, "dispatch", names, exported=True, returns=True)
    control, ran = f.arguments[0], f.var(0)
    with f.if_(try_lock(f, _field(control, "busy"))):
        ran.set(1)
        _run_job(f, f.arguments, wait, spread_out)
        unlock(f, _field(control, "busy"))
    f.ret(ran.get())


def emit_run_on_pool(module: Module) -> Function:
    """Emit a function of (cell, threads, dispatch, job, arguments, num_threads): run a job on the current pool.

    ``cell`` is where the address of the current pool's control block is, ``threads`` the size that the pool must have,
    the caller included. After a fork the child has no pool: to read the cell so late leaves no time for a fork before
    the job.
    """
    names = ["cell", "threads", "dispatch", "job", "arguments", "num_threads"]
    f = Function(module, "run_on_pool", names, returns=True)
    cell, threads, dispatch, job, arguments, num_threads = f.arguments
    status = f.var(NO_POOL)
    control = f.load(cell)
    with f.if_(has_size(f, control, threads)):
        ran = f.call_address(dispatch, control, job, arguments, num_threads, returns=I64)
        status.set(ran.is_set.select(f.constant(RAN), BUSY))
    f.ret(status.get())
    return f


def has_size(f: Function, control: Value, threads: Value) -> Value:
    """Whether there is a control block, not 0, of a pool of that many threads, the caller's included."""
    workers = f.var(-1)
    with f.if_(control.is_set):
        workers.set(CONTROL.read(f, control).workers)
    return (workers.get() + 1).equals(threads)


def _run_job(f: Function, arguments: Sequence[Value], wait: Function, spread_out: Function) -> None:
    """The body of ``dispatch``, for the caller that has locked the pool."""
    control, function, job_arguments, num_threads = arguments
    fields = CONTROL.read(f, control)
    for name, value in (("function", function), ("arguments", job_arguments), ("num_threads", num_threads)):
        f.store(value, _field(control, name))
    atomic_store(f, _field(control, "num_done"), f.constant(0))
    f.call(spread_out, fields.cpu_of_thread, 0)
    _publish_job(f, control)
    f.call_address(function, job_arguments, f.constant(0))
    with f.forever() as loop:
        num_done = atomic_load(f, _field(control, "num_done"))
        f.break_if(loop, num_done >= fields.workers)
        f.call(wait, _field(control, "num_done"), num_done, fields.caller_spins, _field(control, "caller_asleep"))


def current_cpu(f: Function) -> Value:
    """The number of the processor that this thread runs on, -1 where the system does not tell."""
    return f.intrinsic("sched_getcpu", I32, []).sext(I64) if _HAS_AFFINITY else f.constant(-1)


def emit_spread_out(module: Module) -> Function:
    """A function of (cpu_of_thread, tid): thread ``tid`` migrates if a thread of a lower number has its processor.

    The system wakes a thread where it last ran, or where the thread that wakes it runs. If two threads then share a
    processor while another one is idle, the system notices that only milliseconds later. Once apart, threads may again
    run anywhere.
    """
    f = Function(module, "spread_out", ["cpu_of_thread", "tid"])
    cpu_of_thread, tid = f.arguments
    if _HAS_AFFINITY:
        migrate = _emit_migrate(module)
        with f.if_(cpu_of_thread.is_set):
            cpu = current_cpu(f)
            f.store(cpu, cpu_of_thread + tid * 8)
            is_shared = f.var(0)
            with f.loop(0, tid) as other:
                is_shared.set(f.load(cpu_of_thread + other * 8).equals(cpu).select(1, is_shared.get()))
            with f.if_(is_shared.get().is_set):
                f.call(migrate, cpu_of_thread, tid)
    f.ret()
    return f


def _emit_migrate(module: Module) -> Function:
    """A function of (cpu_of_thread, tid): move to an allowed processor that no thread of a lower number has."""
    f = Function(module, "migrate", ["cpu_of_thread", "tid"])
    cpu_of_thread, tid = f.arguments
    allowed, free = (f.alloca(_MAX_CPUS // 8) for _ in range(2))
    size, this_thread = f.constant(_MAX_CPUS // 8), f.constant(0, I32)
    error = f.intrinsic("sched_getaffinity", I32, [this_thread, size, f.pointer(allowed)])
    with f.if_(error.is_zero):
        f.copy(free, allowed, size)
        with f.loop(0, tid) as other:
            taken = f.load(cpu_of_thread + other * 8) & (_MAX_CPUS - 1)
            word = free + (taken // 64) * 8
            f.store(f.load(word) & ((f.constant(1) << (taken & 63)) ^ -1), word)
        any_free = f.var(0)
        with f.loop(0, _MAX_CPUS // 64) as word:
            any_free.set(any_free.get() | f.load(free + word * 8))
        with f.if_(any_free.get().is_set):
            # The system moves the thread to one of the free processors; then it may run on any allowed one again.
            for mask in (free, allowed):
                f.intrinsic("sched_setaffinity", I32, [this_thread, size, f.pointer(mask)])
            f.store(current_cpu(f), cpu_of_thread + tid * 8)
    f.ret()
    return f
