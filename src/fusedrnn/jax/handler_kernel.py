"""The machine code that XLA calls. It finds the prepared call for an operation and its shape, and runs that call.

The calling thread does not hold the interpreter's lock. The code calls Python only for a shape that is not prepared.
"""

from __future__ import annotations

from fusedrnn.engines.cpu.launch.buffer_kernel import NO_MEMORY, OK
from fusedrnn.jax import ffi_layout as ffi
from fusedrnn.jit.builder import I32, I64, Function, Module, Value
from fusedrnn.jit.module_global import Global
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.sync import atomic_add, lock, unlock

TABLE = Struct("lock", "first", "num_threads", "prepare", "messages")
"""The prepared calls of the process: a linked list, and the lock that is held while it is read or changed.

``num_threads`` is the address of the number of threads for calls. ``prepare`` is a function of (frame, key, rows,
columns) that adds a call, and returns 0 if that fails. ``messages`` is the address of an array of addresses of
messages, by status.
"""
ENTRY = Struct("next", "key", "rows", "columns", "threads", "users", "run", "call")
"""A prepared call. It holds its key, the number of threads that run it now, and how to run it: ``run(call, buffers)``.

``rows`` and ``columns`` are the first two axes of its first operand; for a network, these are T and N, or N and T.
"""
NOT_PREPARED, OTHER_VERSION = NO_MEMORY + 2, NO_MEMORY + 3
"""After the statuses of :func:`fusedrnn.engines.cpu.launch.buffer_kernel.emit_run_buffers`, which ``run`` returns."""
MAX_BUFFERS = 64


def build_handler() -> Module:
    """The module of ``handler(frame)``, ``set_table(table)``, ``insert(table, entry)`` and ``remove(table, entry)``.

    The handler uses the :data:`TABLE` at the address given to ``set_table``.
    """
    module = Module("jax_handler")
    table = Global(module, "table")
    _emit_set_table(module, table)
    _emit_insert(module)
    _emit_remove(module)
    _emit_handler(module, table)
    return module


def _emit_set_table(module: Module, table: Global) -> None:
    f = Function(module, "set_table", ["address"], exported=True)
    f.store(f.arguments[0], table.address(f))
    f.ret()


def _emit_handler(module: Module, table: Global) -> None:
    """``handler(frame)``, which XLA calls: it returns 0, or an error of XLA."""
    find = _emit_find(module)
    make_error = _emit_make_error(module)
    run_entry = _emit_run_entry(module)
    f = Function(module, "handler", ["frame"], exported=True, returns=True)
    (frame,) = f.arguments
    table_at = f.load(table.address(f))
    t = TABLE.read(f, table_at)
    status = f.var(OK)
    with f.if_else(_asks_for_metadata(f, frame)) as (metadata, execute):
        with metadata:
            _write_metadata(f, f.load(f.load(frame + ffi.EXTENSION) + ffi.EXTENSION_METADATA))
        with execute, f.if_else(_is_known_version(f, frame)) as (known, unknown):
            with known:
                x = f.load(f.load(frame + ffi.ARGS))
                dims = f.load(x + ffi.BUFFER_DIMS)
                rows, columns = f.load(dims), f.var(0)
                with f.if_(f.load(x + ffi.BUFFER_RANK) > 1):
                    columns.set(f.load(dims + 8))
                key = f.load(f.load(f.load(f.load(frame + ffi.ATTRS)) + ffi.SCALAR_VALUE))
                entry = f.var(0)
                with f.forever() as loop:
                    entry.set(f.call(find, table_at, key, rows, columns.get()))
                    f.break_if(loop, entry.get().is_set)
                    # Try again if the number of threads changes meanwhile, or other calls displace the new one.
                    prepared = f.call_address(t.prepare, frame, key, rows, columns.get(), returns=I64)
                    f.break_if(loop, prepared.is_zero)
                status.set(NOT_PREPARED)
                with f.if_(entry.get().is_set):
                    status.set(f.call(run_entry, entry.get(), frame))
                    atomic_add(f, entry.get() + ENTRY.offset("users"), -1)
            with unknown:
                status.set(OTHER_VERSION)
    error = f.var(0)
    with f.if_(status.get().is_set):
        error.set(f.call(make_error, frame, status.get(), f.load(t.messages + status.get() * 8)))
    f.ret(error.get())


def _asks_for_metadata(f: Function, frame: Value) -> Value:
    extension, asks = f.load(frame + ffi.EXTENSION), f.var(0)
    with f.if_(extension.is_set):
        kind = f.load(extension + ffi.EXTENSION_TYPE, I32, 4).sext(I64)
        asks.set(kind.equals(ffi.METADATA_EXTENSION).zext(I64))
    return asks.get().is_set


def _write_metadata(f: Function, metadata: Value) -> None:
    major, minor = ffi.API_VERSION
    values = ((major, ffi.METADATA_MAJOR), (minor, ffi.METADATA_MINOR), (0, ffi.METADATA_TRAITS))
    for value, offset in values:
        f.store(f.constant(value, I32), metadata + offset, align=4)


def _is_known_version(f: Function, frame: Value) -> Value:
    """Whether the structs of the call have at least the fields that the handler reads."""
    known = f.var((f.load(frame + ffi.STRUCT_SIZE) >= ffi.MIN_FRAME_SIZE).zext(I64))
    with f.if_(known.get().is_set):
        x = f.load(f.load(frame + ffi.ARGS))
        known.set((f.load(x + ffi.STRUCT_SIZE) >= ffi.MIN_BUFFER_SIZE).zext(I64))
    return known.get().is_set


def _emit_run_entry(module: Module) -> Function:
    """A function of (entry, frame): run a prepared call on the arguments and results of a frame."""
    f = Function(module, "run_entry", ["entry", "frame"], returns=True)
    entry, frame = f.arguments
    buffers = f.alloca(8 * MAX_BUFFERS)
    num_args = f.load(frame + ffi.NUM_ARGS)
    for first, items, count in (
        (f.constant(0), f.load(frame + ffi.ARGS), num_args),
        (num_args, f.load(frame + ffi.RETS), f.load(frame + ffi.NUM_RETS)),
    ):
        with f.loop(0, count) as number:
            data = f.load(f.load(items + number * 8) + ffi.BUFFER_DATA)
            f.store(data, buffers + (first + number) * 8)
    e = ENTRY.read(f, entry)
    f.ret(f.call_address(e.run, e.call, buffers, returns=I64))
    return f


def _emit_make_error(module: Module) -> Function:
    """A function of (frame, status, message): an error of XLA."""
    f = Function(module, "make_error", ["frame", "status", "message"], returns=True)
    frame, status, message = f.arguments
    arguments = f.alloca(32)
    f.store(ffi.ERROR_ARGS_SIZE, arguments + ffi.STRUCT_SIZE)
    f.store(0, arguments + ffi.EXTENSION)
    f.store(message, arguments + ffi.ERROR_MESSAGE)
    code = status.equals(NO_MEMORY).select(f.constant(ffi.RESOURCE_EXHAUSTED), ffi.INVALID_ARGUMENT)
    f.store(code, arguments + ffi.ERROR_CODE)
    create = f.load(f.load(frame + ffi.FRAME_API) + ffi.API_ERROR_CREATE)
    f.ret(f.call_address(create, arguments, returns=I64))
    return f


def _emit_find(module: Module) -> Function:
    """A function of (table, key, rows, columns): find the prepared call and add 1 to its users; 0 if there is none."""
    f = Function(module, "find", ["table", "key", "rows", "columns"], returns=True)
    table, key, rows, columns = f.arguments
    t = TABLE.read(f, table)
    threads = f.load(t.num_threads)
    lock(f, table)
    entry = f.var(t.first)
    with f.forever() as loop:
        f.break_if(loop, entry.get().is_zero)
        e = ENTRY.read(f, entry.get())
        same_shape = e.rows.equals(rows) & e.columns.equals(columns)
        f.break_if(loop, e.key.equals(key) & same_shape & e.threads.equals(threads))
        entry.set(e.next)
    with f.if_(entry.get().is_set):
        atomic_add(f, entry.get() + ENTRY.offset("users"), 1)
    unlock(f, table)
    f.ret(entry.get())
    return f


def _emit_insert(module: Module) -> None:
    """``insert(table, entry)``: add a prepared call."""
    f = Function(module, "insert", ["table", "entry"], exported=True)
    table, entry = f.arguments
    lock(f, table)
    f.store(TABLE.read(f, table).first, entry + ENTRY.offset("next"))
    f.store(entry, table + TABLE.offset("first"))
    unlock(f, table)
    f.ret()


def _emit_remove(module: Module) -> None:
    """``remove(table, entry)``: remove a prepared call and return 1, or return 0 if a thread runs it now."""
    f = Function(module, "remove", ["table", "entry"], exported=True, returns=True)
    table, entry = f.arguments
    removed = f.var(0)
    lock(f, table)
    with f.if_(ENTRY.read(f, entry).users.is_zero):
        # The address of the link to the next entry; the link is in the table or in an entry.
        place = f.var(table + TABLE.offset("first"))
        with f.forever() as loop:
            f.break_if(loop, f.load(place.get()).equals(entry))
            place.set(f.load(place.get()) + ENTRY.offset("next"))
        f.store(ENTRY.read(f, entry).next, place.get())
        removed.set(1)
    unlock(f, table)
    f.ret(removed.get())
