"""The machine code that launches a job: it binds kernel arguments, and runs cached calls if their guards hold.

Binding writes the structs of a plan, and relocates their fields by the values of a call. A cached call reads arrays as
objects of the interpreter, in place. It compares their type, dtype, shape, strides and flags with those of the arrays
of a checked call, and refuses a written array that may share memory with another. The caller holds references to the
arrays.
:mod:`fusedrnn.jit.ndarray_abi` knows how objects are laid out,
:mod:`fusedrnn.engines.cpu.guarded_call` writes the structs.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.jit.builder import I32, I64, Function, Module, Value, Variable
from fusedrnn.jit.c_function import c_function, emit_c_function
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import function, load, load_once
from fusedrnn.jit.ndarray_abi import DTYPE, FLAGS, NDIM, SHAPE, STRIDES
from fusedrnn.jit.struct import Struct
from fusedrnn.runtime.pool_kernel import RAN, emit_run_on_pool

RELOC = Struct("symbol", "addend")
"""How a field is made: the value of a symbol, by its number, plus an addend."""
CONSTANT = -1
"""The ``symbol`` of a field that is the same at every call; its value is its ``addend``."""
GUARD = Struct(
    "object", "dtype", "ndim", "flag_mask", "flags", "extent", "written", "symbol",
    "shape0", "shape1", "shape2", "stride0", "stride1", "stride2",
)  # fmt: skip
"""What an argument must be: the very ``object`` if that is not 0, else an array with these attributes.

``flags`` are compared under ``flag_mask``. ``extent`` is the number of bytes from the array's first element to the end
of its last. The array's address becomes the value of that ``symbol``.
"""
CALL_CACHE = Struct(
    "items_offset", "type_offset", "data_offset", "ndarray_type", "guards", "num_guards", "extents_offset",
    "values", "values_size", "weights_symbol", "reserve_symbol", "seed_symbol", "workspace_symbol",
    "dx_partials_symbol", "unpacked_base", "unpacked_first", "dparams_base", "dparams_first", "param_offsets",
    "num_params", "relocs", "num_fields", "args_symbol", "args_offset", "workspace_offset", "job", "num_threads",
    "dispatch", "control", "threads",
)  # fmt: skip
"""A cached call: how objects are laid out; the guards; the values of the symbols of kernel arguments; the job.

``values`` holds the values that are the same at every call; a field named ``*_symbol`` is the number of a symbol whose
value differs from call to call. Unpacked parameters and their gradients have ``num_params`` symbols each, from number
``*_first`` on. Their values are the value of symbol ``*_base`` plus ``param_offsets``, or 0 if that value is 0. Number
0 stands for no symbol.

These offsets are relative to the scratch buffer: ``extents_offset`` (where the first and last byte of each argument are
noted), ``args_offset`` (the kernel arguments) and ``workspace_offset`` (the workspace). If ``num_threads`` is not 1,
``dispatch`` hands the job to a thread pool of ``threads``; ``control`` is where the address of its control block is.
"""

DIFFERS = -1
"""What a guarded call returns if an argument differs from its guard."""


@load_once()
def load_bind() -> Callable[..., None]:
    """The function ``bind(relocs, num_fields, values, dest)``."""
    return function(load("bind", current_target(), build_bind), "bind", 4)


def build_bind() -> Module:
    """The module of ``bind(relocs, num_fields, values, dest)``."""
    module = Module("bind")
    emit_bind(module, exported=True)
    return module


def emit_bind(module: Module, *, exported: bool = False) -> Function:
    """Emit the function. A symbol of value 0 is a null pointer: its field is 0 whatever the addend."""
    f = Function(module, "bind", ["relocs", "num_fields", "values", "dest"], exported=exported)
    relocs, num_fields, values, dest = f.arguments
    with f.loop(0, num_fields) as number:
        reloc = RELOC.read(f, relocs + number * RELOC.size)
        field = f.var(reloc.addend)
        with f.if_(reloc.symbol.compare("!=", CONSTANT)):
            value = f.load(values + reloc.symbol * 8)
            field.set(value.equals(0).select(0, value + reloc.addend))
        f.store(field.get(), dest + number * 8)
    f.ret()
    return f


@load_once()
def load_guarded_call() -> Callable[..., int]:
    """The function of :func:`build_guarded_call`."""
    code = load("guarded_call", current_target(), build_guarded_call)
    return c_function("call_if_guards_hold", code)


def build_guarded_call() -> Module:
    """The module of ``call_if_guards_hold(cache, scratch, arguments, weights, reserve, seed)``.

    It returns what :func:`fusedrnn.runtime.pool_kernel.emit_run_on_pool` does, or :data:`DIFFERS`. ``arguments`` is a
    tuple of the interpreter. It is a builtin function of the interpreter.
    """
    module = Module("guarded_call")
    bind = emit_bind(module)
    guards_hold = _emit_guards_hold(module)
    no_alias, run_on_pool = _emit_no_alias(module), emit_run_on_pool(module)
    names = ["cache", "scratch", "arguments", "weights", "reserve", "seed"]
    f = Function(module, "call_if_guards_hold", names, returns=True)
    cache, scratch, arguments, weights, reserve, seed = f.arguments
    c = CALL_CACHE.read(f, cache)
    f.copy(scratch, c.values, c.values_size)
    status, held = f.var(DIFFERS), f.var(f.call(guards_hold, cache, scratch, arguments))
    with f.if_(held.get().is_set):
        held.set(f.call(no_alias, c.guards, c.num_guards, scratch + c.extents_offset))
    with f.if_(held.get().is_set):
        workspace, kernel_args = scratch + c.workspace_offset, scratch + c.args_offset
        values = (
            (c.weights_symbol, weights), (c.reserve_symbol, reserve), (c.seed_symbol, seed),
            (c.workspace_symbol, workspace), (c.args_symbol, kernel_args),
        )  # fmt: skip
        for symbol, value in values:
            f.store(value, scratch + symbol * 8)
        _set_addresses(f, scratch, c.unpacked_base, c.unpacked_first, c.param_offsets, c.num_params)
        _set_addresses(f, scratch, c.dparams_base, c.dparams_first, c.param_offsets, c.num_params)
        with f.if_(c.dx_partials_symbol.is_set):
            f.store(workspace, scratch + c.dx_partials_symbol * 8)
        f.call(bind, c.relocs, c.num_fields, scratch, kernel_args)
        with f.if_else(c.num_threads.equals(1)) as (single, several):
            with single:
                f.call_address(c.job, kernel_args, f.constant(0))
                status.set(RAN)
            with several:
                status.set(f.call(run_on_pool, c.control, c.threads, c.dispatch, c.job, kernel_args, c.num_threads))
    f.ret(status.get())
    emit_c_function(module, f, objects=(names.index("arguments"),))
    return module


def _set_addresses(f: Function, values: Value, base: Value, first: Value, offsets: Value, count: Value) -> None:
    """Set the values of symbols from ``first`` on to the value of ``base`` plus each offset."""
    with f.if_(base.is_set):
        begin = f.load(values + base * 8)
        with f.loop(0, count) as index:
            address = begin.is_zero.select(0, begin + f.load(offsets + index * 8))
            f.store(address, values + (first + index) * 8)


def _emit_guards_hold(module: Module) -> Function:
    """A function of (cache, scratch, arguments): whether each argument is as its guard says; notes its extent."""
    f = Function(module, "guards_hold", ["cache", "scratch", "arguments"], returns=True)
    cache, scratch, arguments = f.arguments
    c = CALL_CACHE.read(f, cache)
    held = f.var(1)
    with f.loop(0, c.num_guards) as index:
        guard = c.guards + index * GUARD.size
        g = GUARD.read(f, guard)
        item = f.load(arguments + c.items_offset + index * 8)
        extent = scratch + c.extents_offset + index * 16
        data, end = f.var(0), f.var(0)
        with f.if_else(g.object.is_set) as (is_object, is_array):
            with is_object, f.if_(item.compare("!=", g.object)):
                held.set(0)
            with is_array, f.if_else(f.load(item + c.type_offset).equals(c.ndarray_type)) as (array, other):
                with array:
                    array_at = item + c.data_offset
                    ndim = f.load(array_at + NDIM, I32, 4).sext(I64)
                    same = ndim.equals(g.ndim) & f.load(array_at + DTYPE).equals(g.dtype)
                    same = same & (f.load(array_at + FLAGS, I32, 4).sext(I64) & g.flag_mask).equals(g.flags)
                    with f.if_else(same) as (alike, unlike):
                        with alike:
                            _compare_axes(f, array_at, guard, g.ndim, held)
                            data.set(f.load(array_at))
                            end.set(data.get() + g.extent)
                        with unlike:
                            held.set(0)
                with other:
                    held.set(0)
        f.store(data.get(), scratch + g.symbol * 8)
        f.store(data.get(), extent)
        f.store(end.get(), extent + 8)
    f.ret(held.get())
    return f


def _compare_axes(f: Function, array_at: Value, guard: Value, ndim: Value, held: Variable) -> None:
    """Clear ``held`` if the array differs from its guard in a size or a stride."""
    shape, strides = f.load(array_at + SHAPE), f.load(array_at + STRIDES)
    shape0, stride0 = (guard + 8 * GUARD.index[name] for name in ("shape0", "stride0"))
    with f.loop(0, ndim) as axis:
        same_size = f.load(shape + axis * 8).equals(f.load(shape0 + axis * 8))
        same_stride = f.load(strides + axis * 8).equals(f.load(stride0 + axis * 8))
        held.set((same_size & same_stride).select(held.get(), 0))


def _emit_no_alias(module: Module) -> Function:
    """A function of (guards, count, extents): whether no written argument shares memory with another."""
    f = Function(module, "no_alias", ["guards", "count", "extents"], returns=True)
    guards, count, extents = f.arguments
    apart = f.var(1)
    with f.loop(0, count) as index:
        written = GUARD.read(f, guards + index * GUARD.size).written
        with f.if_(written.is_set):
            begin, end = f.load(extents + index * 16), f.load(extents + index * 16 + 8)
            with f.loop(0, count) as other:
                other_begin, other_end = f.load(extents + other * 16), f.load(extents + other * 16 + 8)
                shared = other.compare("!=", index) & (begin < other_end) & (other_begin < end)
                apart.set(shared.select(0, apart.get()))
    f.ret(apart.get())
    return f
