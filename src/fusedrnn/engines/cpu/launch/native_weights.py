"""Packed weights for machine code that runs without the interpreter: packed again when the parameters have changed.

A few slots hold the packed weights of as many parameter vectors. A call locks the slot it uses until it ends, so that
no other call packs into it meanwhile.
"""

from __future__ import annotations

from fusedrnn.engines.cpu.weights.pack_kernel import CALL
from fusedrnn.jit.builder import I64, Function, Module, Value
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.sync import atomic_add, atomic_load, try_lock, unlock, yield_processor
from fusedrnn.runtime.fingerprint import LANES, MEMORY_RANGE
from fusedrnn.runtime.native_memory import SLOT
from fusedrnn.runtime.pool_kernel import CONTROL

WEIGHTS = Struct(
    "slots", "num_slots", "clock", "sizes", "num_arrays", "transpose", "transposes", "flat_offset", "flat_size",
    "packed_size", "packed_size_forward", "tasks", "num_tasks", "num_tasks_forward", "pack", "pack_threads", "repack",
    "fingerprint", "dispatch",
)  # fmt: skip
"""How the parameters of a spec are packed, and the slots. Sizes are in bytes.

The parameters are ``num_arrays`` arrays; ``sizes`` is the address of their sizes. They are the flat vector, or arrays
from which ``transpose`` makes the flat vector: a function of (``transposes``, addresses of the arrays and of the
vector), 0 for none. With ``transpose`` the slot also holds the vector, after the packed weights. ``tasks`` are those of
training, which begin with those of inference. ``pack_threads`` is 1 for few parameters, else 0 for the threads of the
pool. ``repack`` is a function of (slot, params) that packs in place of the tasks, 0 for none. In the end it sets the
slot's ``packed``, which it does not if it fails. The functions ``fingerprint`` and ``dispatch`` are those of the
runtime.
"""
WEIGHTS_SLOT = Struct(
    "busy", "address", "size", "params", "level", "last_use", "packed", "_7", *(f"fingerprint{i}" for i in range(LANES))
)
"""A slot, which begins as :data:`fusedrnn.runtime.native_memory.SLOT`. Then follow the address of the parameters when
they were packed, what is packed of them (:data:`NOTHING`, ...), the ``clock`` at the last use, whether all is packed,
and the fingerprint of the parameters."""
assert WEIGHTS_SLOT.names[:3] == SLOT.names[:3]
NOTHING, FORWARD, TRAINING = range(3)
MAX_ARRAYS = 32
"""Arrays of parameters that a call may have."""


def emit_acquire_weights(module: Module, grow: Function) -> Function:
    """Emit the function of (weights, arrays, level, control) that locks and returns a slot with the packed weights.

    ``arrays`` is where the addresses of the arrays of parameters are, ``level`` is :data:`FORWARD` or :data:`TRAINING`,
    ``control`` the control block of the thread pool, 0 for none. It returns 0 if there is no memory, or if
    ``repack`` failed. ``grow`` is from :func:`fusedrnn.runtime.native_memory.emit_grow`.
    """
    take, pack, flatten = _emit_take_slot(module), _emit_pack(module), _emit_flatten(module)
    f = Function(module, "acquire_weights", ["weights", "arrays", "level", "control"], returns=True)
    weights, arrays, level, control = f.arguments
    w = WEIGHTS.read(f, weights)
    first = f.load(arrays)
    slot = f.var(f.call(take, weights, first))
    fields = WEIGHTS_SLOT.read(f, slot.get())
    f.store(atomic_add(f, weights + WEIGHTS.offset("clock"), 1), slot.get() + WEIGHTS_SLOT.offset("last_use"))
    fingerprint = _fingerprint(f, weights, arrays)
    with f.if_(_is_out_of_date(f, fields.level, level, slot.get(), fingerprint)):
        f.store(NOTHING, slot.get() + WEIGHTS_SLOT.offset("level"))
        packed_size = level.equals(TRAINING).select(w.packed_size, w.packed_size_forward)
        size = w.transpose.is_set.select(w.flat_offset + w.flat_size, packed_size)
        with f.if_else(f.call(grow, slot.get(), size).is_set) as (enough, no_memory):
            with enough:
                params = f.call(flatten, weights, slot.get(), arrays)
                f.call(pack, weights, slot.get(), params, level, control)
                f.store(first, slot.get() + WEIGHTS_SLOT.offset("params"))
                f.store(level, slot.get() + WEIGHTS_SLOT.offset("level"))
                _copy_lanes(f, fingerprint, slot.get() + WEIGHTS_SLOT.offset("fingerprint0"))
            with no_memory:
                f.store(0, slot.get() + WEIGHTS_SLOT.offset("packed"))
        with f.if_(fields.packed.is_zero):  # this call has no weights, and the next one packs again
            f.store(NOTHING, slot.get() + WEIGHTS_SLOT.offset("level"))
            unlock(f, slot.get())
            slot.set(0)
    f.ret(slot.get())
    return f


def _emit_flatten(module: Module) -> Function:
    """A function of (weights, slot, arrays): the address of the flat vector, which it makes in the slot if needed."""
    f = Function(module, "flatten_params", ["weights", "slot", "arrays"], returns=True)
    weights, slot, arrays = f.arguments
    w = WEIGHTS.read(f, weights)
    params = f.var(f.load(arrays))
    with f.if_(w.transpose.is_set):
        params.set(WEIGHTS_SLOT.read(f, slot).address + w.flat_offset)
        buffers = f.alloca(8 * (MAX_ARRAYS + 1))
        f.copy(buffers, arrays, w.num_arrays * 8)
        f.store(params.get(), buffers + w.num_arrays * 8)
        f.call_address(w.transpose, w.transposes, buffers, returns=I64)
    f.ret(params.get())
    return f


def _emit_take_slot(module: Module) -> Function:
    """A function of (weights, params) that locks a slot: that of these parameters, else the one unused for longest."""
    f = Function(module, "take_weights_slot", ["weights", "params"], returns=True)
    weights, params = f.arguments
    w = WEIGHTS.read(f, weights)
    taken = f.var(0)
    with f.forever() as loop:
        oldest, oldest_use = f.var(0), f.var((1 << 63) - 1)
        with f.loop(0, w.num_slots) as number:
            slot = w.slots + number * WEIGHTS_SLOT.size
            fields = WEIGHTS_SLOT.read(f, slot)
            is_known = taken.get().is_zero & fields.params.equals(params) & fields.level.is_set
            with f.if_(is_known), f.if_(try_lock(f, slot)):
                taken.set(slot)
            with f.if_(atomic_load(f, slot).is_zero & (fields.last_use < oldest_use.get())):
                oldest.set(slot)
                oldest_use.set(fields.last_use)
        with f.if_(taken.get().is_zero & oldest.get().is_set), f.if_(try_lock(f, oldest.get())):
            taken.set(oldest.get())
        f.break_if(loop, taken.get().is_set)
        yield_processor(f)
    f.ret(taken.get())
    return f


def _fingerprint(f: Function, weights: Value, arrays: Value) -> Value:
    """The address of the fingerprint of the parameters: the fingerprint of the fingerprints of the arrays."""
    w = WEIGHTS.read(f, weights)
    ranges, results = f.alloca(MEMORY_RANGE.size * MAX_ARRAYS), f.alloca(8 * LANES * MAX_ARRAYS)
    result = f.alloca(8 * LANES)

    def store_range(address: Value, begin: Value, size: Value) -> None:
        for name, value in (("begin", begin), ("size", size), ("copy", f.constant(0))):
            f.store(value, address + MEMORY_RANGE.offset(name))

    with f.loop(0, w.num_arrays) as number:
        store_range(ranges + number * MEMORY_RANGE.size, f.load(arrays + number * 8), f.load(w.sizes + number * 8))
    f.call_address(w.fingerprint, ranges, w.num_arrays, results)
    store_range(ranges, results, w.num_arrays * (8 * LANES))
    f.call_address(w.fingerprint, ranges, f.constant(1), result)
    return result


def _is_out_of_date(f: Function, packed_level: Value, level: Value, slot: Value, fingerprint: Value) -> Value:
    changed = packed_level < level
    for lane in range(LANES):
        before = f.load(slot + WEIGHTS_SLOT.offset(f"fingerprint{lane}"))
        changed = changed | f.load(fingerprint + 8 * lane).compare("!=", before)
    return changed


def _copy_lanes(f: Function, source: Value, dest: Value) -> None:
    for lane in range(LANES):
        f.store(f.load(source + 8 * lane), dest + 8 * lane)


def _emit_pack(module: Module) -> Function:
    """A function of (weights, slot, params, level, control): pack the parameters into the slot's memory."""
    f = Function(module, "pack_weights", ["weights", "slot", "params", "level", "control"])
    weights, slot, params, level, control = f.arguments
    w = WEIGHTS.read(f, weights)
    with f.if_else(w.repack.is_set) as (by_caller, by_job):
        with by_caller:
            f.store(0, slot + WEIGHTS_SLOT.offset("packed"))
            f.call_address(w.repack, slot, params)
        with by_job:
            f.store(1, slot + WEIGHTS_SLOT.offset("packed"))
            packed = WEIGHTS_SLOT.read(f, slot).address
            num_tasks = level.equals(TRAINING).select(w.num_tasks, w.num_tasks_forward)
            call, ran = f.alloca(CALL.size), f.var(0)
            for name, value in (("tasks", w.tasks), ("num_tasks", num_tasks), ("flat", params), ("packed", packed)):
                f.store(value, call + CALL.offset(name))
            with f.if_(control.is_set & w.pack_threads.is_zero):
                threads = CONTROL.read(f, control).workers + 1
                f.store(threads, call + CALL.offset("num_threads"))
                ran.set(f.call_address(w.dispatch, control, w.pack, call, threads, returns=I64))
            with f.if_(ran.get().is_zero):
                f.store(1, call + CALL.offset("num_threads"))
                f.call_address(w.pack, call, f.constant(0))
    f.ret()
    return f
