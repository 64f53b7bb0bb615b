"""A whole call on NumPy arrays in machine code: are they like those of the call before, then the records, then the job.

Arrays are looked at where they are, as objects of the interpreter: their type, dtype, shape, strides and flags against
what was checked once at length, and, where something is written, whether it lies apart from everything else. Whoever
calls holds on to them. :mod:`fusedrnn.engines.cpu.launch.guarded_call` finds out how objects are laid out here, and
writes the blocks.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.engines.cpu.launch.args_kernel import emit_fill
from fusedrnn.jit.builder import I32, Function, Module, Value
from fusedrnn.jit.c_function import c_function, emit_c_function
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import load, load_once
from fusedrnn.jit.struct import Struct

SLOT = Struct(
    "absent", "descr", "dims", "mask", "flags", "extent", "written", "into",
    "shape0", "shape1", "shape2", "stride0", "stride1", "stride2",
)  # fmt: skip
"""What the object in that place must be: ``absent`` itself if that is not 0, else an array whose flags under ``mask``
are ``flags`` and whose elements lie within ``extent`` bytes. Its address is the value of number ``into``."""
BLOCK = Struct(
    "items_at", "type_at", "data_at", "type", "slots", "count", "objects_at",
    "values", "values_size", "weights_into", "reserve_into", "seed_into", "workspace_into", "parts_into",
    "loose_from", "loose_into", "wanted_from", "wanted_into", "offsets", "offset_count",
    "fields", "field_count", "records_into", "records_at", "plan_at", "job", "members", "workers", "dispatch", "spins",
)  # fmt: skip
"""How objects are laid out; their slots; the values that records are filled from, as they are at every call, and where
those go that are not; the records, and what runs.

The parameters that come as they lie, and their gradients, are ``offset_count`` values each, so far behind a base as
``offsets`` says: from the value ``loose_from`` to those from ``loose_into`` on, likewise ``wanted``; where the base is
0 they are 0. ``objects_at`` is scratch for the first and last byte of each object. ``members`` is 1, or ``dispatch``
gives the job to a pool.
"""
# Behind an array's data pointer: dimensions, their number and strides, base, dtype, flags.
_DIMS, _SHAPE, _STRIDES, _DESCR, _FLAGS = 8, 16, 24, 40, 48


@load_once()
def load_serve() -> Callable[..., int]:
    """The function that runs a whole call on arrays like those before."""
    code = load("serving", current_target(), build_serving)
    return c_function("serve", code)


def build_serving() -> Module:
    """The module of ``serve(block, base, objects, control, weights, reserve, seed)``, which returns 1 if it has run.

    ``base`` is where the workspace begins, ``objects`` a tuple of the interpreter, ``control`` a pool's control block.
    It is a builtin function of the interpreter.
    """
    module = Module("serving")
    fill = emit_fill(module)
    alike = _emit_alike(module)
    apart = _emit_apart(module)
    names = ["block", "base", "objects", "control", "weights", "reserve", "seed"]
    f = Function(module, "serve", names, returns=True)
    block, base, objects, control, weights, reserve, seed = f.arguments
    b = BLOCK.read(f, block)
    f.copy(base, b.values, b.values_size)
    good = f.var(f.result(alike, block, base, objects))
    with f.if_(good.get().is_set):
        good.set(f.result(apart, b.slots, b.count, base + b.objects_at))
    with f.if_(good.get().is_set):
        workspace = base + b.plan_at
        given = (b.weights_into, weights), (b.reserve_into, reserve), (b.seed_into, seed)
        for into, value in (*given, (b.workspace_into, workspace), (b.records_into, base + b.records_at)):
            f.store(value, base + into * 8)
        _spread(f, base, b.loose_from, b.loose_into, b.offsets, b.offset_count)
        _spread(f, base, b.wanted_from, b.wanted_into, b.offsets, b.offset_count)
        with f.if_(b.parts_into.is_set):
            f.store(workspace, base + b.parts_into * 8)
        records = base + b.records_at
        f.call(fill, b.fields, b.field_count, base, records)
        with f.if_else(b.members.equals(1)) as (alone, together):
            with alone:
                f.call_address(b.job, records, f.constant(0))
            with together:
                f.call_address(b.dispatch, control, b.job, records, b.members, b.workers, b.spins)
    f.ret(good.get())
    emit_c_function(module, f, objects=(names.index("objects"),))
    return module


def _spread(f: Function, base: Value, source: Value, into: Value, offsets: Value, count: Value) -> None:
    """Addresses behind that of number ``source``, if there is such a number."""
    with f.if_(source.is_set):
        begin = f.load(base + source * 8)
        with f.loop(0, count) as number:
            at = begin.is_zero.select(0, begin + f.load(offsets + number * 8))
            f.store(at, base + (into + number) * 8)


def _emit_alike(module: Module) -> Function:
    """A function of (block, base, objects): whether every object is as its slot says; notes where each lies."""
    f = Function(module, "alike", ["block", "base", "objects"], returns=True)
    block, base, objects = f.arguments
    b = BLOCK.read(f, block)
    good = f.var(1)
    with f.loop(0, b.count) as number:
        slot = b.slots + number * SLOT.size
        s = SLOT.read(f, slot)
        item = f.load(objects + b.items_at + number * 8)
        extent = base + b.objects_at + number * 16
        data, end = f.var(0), f.var(0)
        with f.if_else(s.absent.is_set) as (absent, present):
            with absent, f.if_(item.compare("!=", s.absent)):
                good.set(0)
            with present, f.if_else(f.load(item + b.type_at).equals(b.type)) as (array, other):
                with array:
                    at = item + b.data_at
                    same = _integer(f, at + _DIMS).equals(s.dims) & f.load(at + _DESCR).equals(s.descr)
                    same = same & (_integer(f, at + _FLAGS) & s.mask).equals(s.flags)
                    with f.if_else(same) as (like, unlike):
                        with like:
                            shape, strides = f.load(at + _SHAPE), f.load(at + _STRIDES)
                            shape0, stride0 = (slot + 8 * SLOT.index[name] for name in ("shape0", "stride0"))
                            with f.loop(0, s.dims) as axis:
                                size = f.load(shape + axis * 8).equals(f.load(shape0 + axis * 8))
                                step = f.load(strides + axis * 8).equals(f.load(stride0 + axis * 8))
                                good.set((size & step).select(good.get(), 0))
                            data.set(f.load(at))
                            end.set(data.get() + s.extent)
                        with unlike:
                            good.set(0)
                with other:
                    good.set(0)
        f.store(data.get(), base + s.into * 8)
        f.store(data.get(), extent)
        f.store(end.get(), extent + 8)
    f.ret(good.get())
    return f


def _integer(f: Function, address: Value) -> Value:
    """A C int."""
    return Value(f, f.builder.sext(f.load(address, I32, 4).ir, f.constant(0).type))


def _emit_apart(module: Module) -> Function:
    """A function of (slots, count, extents): whether what is written lies apart from every other object."""
    f = Function(module, "apart", ["slots", "count", "extents"], returns=True)
    slots, count, extents = f.arguments
    good = f.var(1)
    with f.loop(0, count) as one:
        written = SLOT.read(f, slots + one * SLOT.size).written
        with f.if_(written.is_set):
            begin, end = f.load(extents + one * 16), f.load(extents + one * 16 + 8)
            with f.loop(0, count) as other:
                first, last = f.load(extents + other * 16), f.load(extents + other * 16 + 8)
                shared = other.compare("!=", one) & (begin < last) & (first < end)
                good.set(shared.select(0, good.get()))
    f.ret(good.get())
    return f
