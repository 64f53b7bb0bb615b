"""The machine code that runs a call on buffers without the interpreter, for runtimes that call C functions.

:mod:`fusedrnn.engines.cpu.buffer_call` writes the structs.
"""

from __future__ import annotations

import sys

from fusedrnn.engines.cpu.launch.call_kernel import emit_bind
from fusedrnn.engines.cpu.launch.native_weights import WEIGHTS_SLOT, emit_acquire_weights
from fusedrnn.engines.cpu.launch.varlen_kernel import emit_fill_tables
from fusedrnn.jit.builder import I32, I64, Function, Module, Value
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.sync import unlock
from fusedrnn.runtime.native_memory import SLOT, emit_acquire_scratch, emit_grow
from fusedrnn.runtime.pool_kernel import CLOSE, MANY_CLOSE, SPINNING, has_size

BUFFER_ARGS = Struct(
    "num_threads", "relocs", "num_fields", "args_offset", "workspace_offset", "row_starts", "num_groups",
    "unsorted_indices",
)  # fmt: skip
"""The kernel arguments of a plan: how they are bound, and the constants of the tables for different lengths."""
BUFFER_CALL = Struct(
    "steps", "batch", "sleeping", "spinning", "single", "scratch_size", "slots", "values", "values_size",
    "operands", "num_operands", "weights", "level", "params", "dparams", "param_offsets", "num_params",
    "unpacked_symbol", "dparams_symbol", "weights_symbol", "workspace_symbol", "args_symbol", "dx_partials_symbol",
    "tables_symbol", "seed_symbol", "lengths", "seed", "zeroed", "zeroed_size", "tables_offset", "job", "dispatch",
    "control", "threads", "ensure_pool", "clock", "aligned",
)  # fmt: skip
"""A call. The caller passes the addresses of its buffers as an array. These fields are numbers of buffers, -1 for none:

- ``params``: the flat parameters, or the first of the arrays that they are made of; ``dparams``: the flat gradients;
- ``lengths``: 32-bit integers; ``seed``: a 64-bit integer;
- ``zeroed``: an output whose ``zeroed_size`` bytes are set to zero first;
- ``aligned``: a buffer that must begin at a cache line.

``operands`` are pairs: the number of a buffer, and the number of the symbol whose value is its address. Fields named
``*_symbol`` are numbers of symbols, 0 for none. ``sleeping``, ``spinning`` and ``single`` are the addresses of
:data:`BUFFER_ARGS` for threads that sleep, for threads that spin, and for one thread. ``weights`` is the address of a
:data:`fusedrnn.engines.cpu.launch.native_weights.WEIGHTS`, 0 for unpacked flat parameters. ``control`` is where the
address of the control block of the thread pool is; ``ensure_pool`` is a function of (threads) that makes a pool of that
size. ``clock`` is the address of :data:`CLOCK`.
"""
CLOCK = Struct("call_ended", "job_ended", "num_close")
"""When the last call ended, and the last one on several threads, in nanoseconds; calls in a row that were close."""
OK, BAD_LENGTH, NO_MEMORY, NOT_ALIGNED = range(4)
"""What :func:`emit_run_buffers` returns."""
_SPINNING, _CLOSE = (round(seconds * 1e9) for seconds in (SPINNING, CLOSE))
_MONOTONIC = 1


def emit_run_buffers(module: Module) -> Function:
    """Emit ``run_buffers(call, buffers)``: run a call on buffers at these addresses; returns :data:`OK` or an error."""
    grow = emit_grow(module)
    acquire_scratch, acquire_weights = emit_acquire_scratch(module, grow), emit_acquire_weights(module, grow)
    run_locked = _emit_run_locked(module)
    f = Function(module, "run_buffers", ["call", "buffers"], returns=True)
    call, buffers = f.arguments
    c = BUFFER_CALL.read(f, call)
    status = f.var(OK)
    with f.if_(c.aligned >= 0), f.if_((_buffer(f, buffers, c.aligned) & 63).is_set):
        status.set(NOT_ALIGNED)
    control = _current_control(f, call)
    with f.if_(status.get().equals(OK)):
        slot = f.call(acquire_scratch, c.slots, c.scratch_size)
        weights = f.var(0)
        status.set(slot.is_zero.select(f.constant(NO_MEMORY), OK))
        with f.if_(slot.is_set & c.weights.is_set):
            weights.set(f.call(acquire_weights, c.weights, buffers + c.params * 8, c.level, control))
            status.set(weights.get().is_zero.select(f.constant(NO_MEMORY), OK))
        with f.if_(status.get().equals(OK)):
            packed = f.var(0)
            with f.if_(weights.get().is_set):
                packed.set(WEIGHTS_SLOT.read(f, weights.get()).address)
            status.set(f.call(run_locked, call, buffers, SLOT.read(f, slot).address, packed.get(), control))
        with f.if_(weights.get().is_set):
            unlock(f, weights.get())
        with f.if_(slot.is_set):
            unlock(f, slot)
    f.ret(status.get())
    return f


def _buffer(f: Function, buffers: Value, number: Value) -> Value:
    return f.load(buffers + number * 8)


def _current_control(f: Function, call: Value) -> Value:
    """The control block of a thread pool of the call's size, which is made if needed; 0 for one thread."""
    c = BUFFER_CALL.read(f, call)
    current = f.var(0)
    with f.if_(c.threads > 1):
        current.set(f.load(c.control))
        with f.if_(has_size(f, current.get(), c.threads).is_zero):
            f.call_address(c.ensure_pool, c.threads)
            current.set(f.load(c.control))
            with f.if_(has_size(f, current.get(), c.threads).is_zero):
                current.set(0)
    return current.get()


def _emit_run_locked(module: Module) -> Function:
    """A function of (call, buffers, scratch, packed, control), for a caller that has locked scratch and weights."""
    fill_tables, bind = emit_fill_tables(module), emit_bind(module)
    is_worth_waking, note_end = _emit_is_worth_waking(module), _emit_note_end(module)
    bind_args = _emit_bind_args(module, bind, fill_tables)
    f = Function(module, "run_locked", ["call", "buffers", "scratch", "packed", "control"], returns=True)
    call, buffers, scratch, packed, control = f.arguments
    c = BUFFER_CALL.read(f, call)
    args, valid, ran = f.var(c.single), f.var(0), f.var(0)
    with f.if_(control.is_set):
        args.set(f.call(is_worth_waking, c.clock).is_set.select(c.spinning, c.sleeping))
    with f.if_(c.zeroed >= 0):
        f.fill_zero(_buffer(f, buffers, c.zeroed), c.zeroed_size)
    valid.set(f.call(bind_args, call, args.get(), buffers, scratch, packed))
    with f.if_(valid.get().is_set):
        a = BUFFER_ARGS.read(f, args.get())
        kernel_args = scratch + a.args_offset
        with f.if_(a.num_threads > 1):
            ran.set(f.call_address(c.dispatch, control, c.job, kernel_args, a.num_threads, returns=I64))
            with f.if_(ran.get().is_zero):  # another call has the threads
                args.set(c.single)
                f.call(bind_args, call, c.single, buffers, scratch, packed)
        with f.if_(ran.get().is_zero):
            f.call_address(c.job, scratch + BUFFER_ARGS.read(f, args.get()).args_offset, f.constant(0))
        f.call(note_end, c.clock, ran.get())
    f.ret(valid.get().is_set.select(f.constant(OK), BAD_LENGTH))
    return f


def _emit_bind_args(module: Module, bind: Function, fill_tables: Function) -> Function:
    """A function of (call, args, buffers, scratch, packed): write the kernel arguments; 0 if a length is not valid."""
    f = Function(module, "bind_args", ["call", "args", "buffers", "scratch", "packed"], returns=True)
    call, args, buffers, scratch, packed = f.arguments
    c, a = BUFFER_CALL.read(f, call), BUFFER_ARGS.read(f, args)
    valid = f.var(1)
    f.copy(scratch, c.values, c.values_size)
    with f.loop(0, c.num_operands) as number:
        pair = c.operands + number * 16
        f.store(_buffer(f, buffers, f.load(pair)), scratch + f.load(pair + 8) * 8)
    workspace, kernel_args = scratch + a.workspace_offset, scratch + a.args_offset
    for symbol, value in (
        (c.weights_symbol, packed), (c.workspace_symbol, workspace), (c.args_symbol, kernel_args),
    ):  # fmt: skip
        f.store(value, scratch + symbol * 8)
    with f.if_(c.dx_partials_symbol.is_set):
        f.store(workspace, scratch + c.dx_partials_symbol * 8)
    with f.if_(c.seed >= 0):
        # The buffer may be a framework's array of 32-bit integers, which begins at any multiple of four.
        f.store(f.load(_buffer(f, buffers, c.seed), align=4), scratch + c.seed_symbol * 8)
    for number, first in ((c.params, c.unpacked_symbol), (c.dparams, c.dparams_symbol)):
        with f.if_((number >= 0) & first.is_set), f.loop(0, c.num_params) as index:
            address = _buffer(f, buffers, number) + f.load(c.param_offsets + index * 8)
            f.store(address, scratch + (first + index) * 8)
    with f.if_(c.lengths >= 0):
        tables, lengths = scratch + c.tables_offset, _buffer(f, buffers, c.lengths)
        f.store(tables, scratch + c.tables_symbol * 8)
        valid.set(f.call(
            fill_tables, lengths, c.steps, c.batch, a.row_starts, a.num_groups, a.unsorted_indices, tables
        ))  # fmt: skip
    f.call(bind, a.relocs, a.num_fields, scratch, kernel_args)
    f.ret(valid.get())
    return f


def _now(f: Function) -> Value:
    """Nanoseconds of a clock that never goes back; 0 on systems without this C function."""
    if sys.platform == "win32":
        return f.constant(0)
    time = f.alloca(16)
    f.intrinsic("clock_gettime", I32, [I32(_MONOTONIC), f.pointer(time)])
    return f.load(time) * 1_000_000_000 + f.load(time + 8)


def _emit_is_worth_waking(module: Module) -> Function:
    """A function of (clock): whether the threads spin, or should spin because calls follow one another closely."""
    f = Function(module, "is_worth_waking", ["clock"], returns=True)
    (clock,) = f.arguments
    fields, now = CLOCK.read(f, clock), _now(f)
    num_close = (now - fields.call_ended < _CLOSE).select(fields.num_close + 1, 0)
    f.store(num_close, clock + CLOCK.offset("num_close"))
    f.ret(((now - fields.job_ended < _SPINNING) | (num_close >= MANY_CLOSE)).zext(I64))
    return f


def _emit_note_end(module: Module) -> Function:
    """A function of (clock, on_several_threads): a call has ended."""
    f = Function(module, "note_end", ["clock", "on_several_threads"])
    clock, on_several_threads = f.arguments
    now = _now(f)
    f.store(now, clock + CLOCK.offset("call_ended"))
    with f.if_(on_several_threads.is_set):
        f.store(now, clock + CLOCK.offset("job_ended"))
    f.ret()
    return f


def build_run_buffers() -> Module:
    """The module of ``run_buffers(call, buffers)``."""
    module = Module("run_buffers")
    run = emit_run_buffers(module)
    f = Function(module, "run", ["call", "buffers"], exported=True, returns=True)
    f.ret(f.call(run, *f.arguments))
    return module
