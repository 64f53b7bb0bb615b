"""The machine code of slots: a call claims some of them, copies their rows into arrays and back, and releases them.

A slot holds one row of each of several arrays (layers, rows, elements). It has an owner: a number that is never used
again. At most one call has a claim on a slot. A claim is a number above 0, and each call has a different one. When a
call ends its claim, the negative number stays with the slot until another call claims the slot. So a call can undo what
it did even after its claim, and it never undoes what another call has done since.

The interpreter's lock is held during a call. So a call is done as a whole: signals are handled, and other threads run,
only before or after it.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.jit.builder import I64, Function, Module, Value
from fusedrnn.jit.c_function import c_function, emit_c_function
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import load, load_once
from fusedrnn.jit.struct import Struct

SLOTS = Struct(
    "owners", "claims", "first_free", "capacity", "rows", "row_bytes", "parts", "num_parts", "num_owners",
    "items_offset", "data_offset",
)  # fmt: skip
"""``owners``: the owner of each slot, :data:`NOBODY` if it is free. ``claims``: the claim on each slot; if none, the
negative number of the last claim, or 0. ``first_free``: no slot before it is free. ``rows``: the rows of the slots,
``row_bytes`` each; ``parts``: what a row consists of. ``num_owners``: how many owners there have been.
``items_offset``, ``data_offset``: where a tuple has its items, and an array its address. An owner's number modulo
``capacity`` is the number of its slot."""
PART = Struct("offset", "layers", "bytes")
"""The part of one array in a row: where it begins, how many layers it has, and the bytes of each."""
NOBODY = -1
CLAIM, JOIN, GATHER, SCATTER, CLEAR, FREE, OWN, RELEASE = (1 << number for number in range(8))
"""What a call does, in this order: claim slots, or take a free one for a new owner; copy rows into arrays, copy arrays
into rows, or set rows to zero; make the slots free, or give them back to their owners; end the claim. All but the first
two only concern slots on which the claim is, or was the last one."""
UNKNOWN, REPEATED, CLAIMED = 1, 2, 3
"""Why a slot cannot be claimed: it has another owner or none, this call has claimed it already, or another call has."""
KINDS = 4
"""A call returns 0, or ``kind + KINDS * index``: the kind of its error, and the index of the owner among those that the
call was given. With JOIN it returns the new owner, :data:`NOBODY` if no slot is free."""


@load_once(2)
def load_use_slots(reads_objects: bool) -> Callable[..., int]:
    """The function of :func:`build_use_slots`."""
    name = "use_slots" if reads_objects else "use_slots_by_address"
    return c_function(name, load(name, current_target(), build_use_slots, reads_objects))


def build_use_slots(reads_objects: bool) -> Module:
    """The module of ``use_slots(slots, actions, claim, owners, count, rows, arrays)``.

    ``owners`` is an array of ``count`` integers. ``arrays`` is a tuple with an array (layers, rows, elements) for each
    part. Its first ``count`` rows are those of the owners; GATHER sets its other rows to zero. If the module does not
    read objects, ``owners`` is the address of the integers, and ``arrays`` that of the arrays' addresses.
    """
    module = Module("use_slots")
    claim_all, take, release, set_owners, copy_rows = (
        emit(module) for emit in (_emit_claim, _emit_take, _emit_release, _emit_set_owners, _emit_copy(reads_objects))
    )
    names = ["slots", "actions", "claim", "owners", "count", "rows", "arrays"]
    f = Function(module, "use_slots", names, returns=True)
    slots, actions, claim, owners, count, rows, arrays = f.arguments
    c, new_owner, result = SLOTS.read(f, slots), f.alloca(8), f.var(0)
    used = f.var(f.load(owners + c.data_offset) if reads_objects else owners)
    with f.if_((actions & CLAIM).is_set):
        result.set(f.call(claim_all, slots, claim, used.get(), count))
    joins = (actions & JOIN).is_set
    with f.if_(joins):
        result.set(f.call(take, slots, claim))
        f.store(result.get(), new_owner)
        used.set(new_owner)
    with f.if_(joins.select(result.get() >= 0, result.get().is_zero)):
        with f.if_((actions & (GATHER | SCATTER | CLEAR)).is_set):
            f.call(copy_rows, slots, actions, claim, used.get(), count, rows, arrays)
        with f.if_((actions & (FREE | OWN)).is_set):
            f.call(set_owners, slots, (actions & OWN).is_set.zext(I64), claim, used.get(), count)
        with f.if_((actions & RELEASE).is_set):
            f.call(release, slots, claim, used.get(), count)
    f.ret(result.get())
    objects = [names.index(name) for name in ("owners", "arrays")] if reads_objects else ()
    emit_c_function(module, f, objects, keeps_lock=True)
    return module


def _slot(f: Function, slots: Value, owners: Value, number: Value) -> Value:
    """The slot of an owner, by the owner's number among those of a call."""
    return f.load(owners + number * 8) % SLOTS.read(f, slots).capacity


def _is_concerned(f: Function, slots: Value, slot: Value, claim: Value) -> Value:
    """Whether no other claim has been on a slot since this one."""
    last = f.load(SLOTS.read(f, slots).claims + slot * 8)
    return last.equals(claim) | last.equals(0 - claim)


def _emit_claim(module: Module) -> Function:
    """A function of (slots, claim, owners, count): claim the slots of all, or of none, and return the call's result."""
    undo = _emit_release(module, "undo")
    f = Function(module, "claim", ["slots", "claim", "owners", "count"], returns=True)
    slots, claim, owners, count = f.arguments
    c, error, number = SLOTS.read(f, slots), f.var(0), f.var(0)
    with f.forever() as loop:
        f.break_if(loop, number.get() >= count)
        owner, slot = f.load(owners + number.get() * 8), _slot(f, slots, owners, number.get())
        before = f.load(c.claims + slot * 8)
        is_owner = (owner >= 0) & f.load(c.owners + slot * 8).equals(owner)
        refusal = before.equals(claim).select(REPEATED, f.constant(CLAIMED))
        error.set(is_owner.select((before <= 0).select(0, refusal), UNKNOWN))
        f.break_if(loop, error.get().is_set)
        f.store(claim, c.claims + slot * 8)
        number.set(number.get() + 1)
    with f.if_(error.get().is_set):
        f.call(undo, slots, claim, owners, number.get())
        error.set(error.get() + number.get() * KINDS)
    f.ret(error.get())
    return f


def _emit_release(module: Module, name: str = "release") -> Function:
    """A function of (slots, claim, owners, count): end this claim on those slots of the owners that have it."""
    f = Function(module, name, ["slots", "claim", "owners", "count"])
    slots, claim, owners, count = f.arguments
    with f.loop(0, count) as number:
        address = SLOTS.read(f, slots).claims + _slot(f, slots, owners, number) * 8
        with f.if_(f.load(address).equals(claim)):
            f.store(0 - claim, address)
    f.ret()
    return f


def _emit_set_owners(module: Module) -> Function:
    """A function of (slots, owned, claim, owners, count): give slots back to their owners, or make them free."""
    f = Function(module, "set_owners", ["slots", "owned", "claim", "owners", "count"])
    slots, owned, claim, owners, count = f.arguments
    c = SLOTS.read(f, slots)
    with f.loop(0, count) as number:
        slot = _slot(f, slots, owners, number)
        with f.if_(_is_concerned(f, slots, slot, claim)):
            f.store(owned.is_set.select(f.load(owners + number * 8), NOBODY), c.owners + slot * 8)
            f.store(slot.at_most(c.first_free), slots + SLOTS.offset("first_free"))
    f.ret()
    return f


def _emit_take(module: Module) -> Function:
    """A function of (slots, claim): claim a free slot for a new owner; return the owner, NOBODY if no slot is free."""
    f = Function(module, "take", ["slots", "claim"], returns=True)
    slots, claim = f.arguments
    c, owner = SLOTS.read(f, slots), f.var(NOBODY)
    slot = f.var(c.first_free)
    with f.forever() as loop:
        f.break_if(loop, slot.get() >= c.capacity)
        address = c.owners + slot.get() * 8
        with f.if_(f.load(address).equals(NOBODY)):
            owner.set(c.num_owners * c.capacity + slot.get())
            f.store(c.num_owners + 1, slots + SLOTS.offset("num_owners"))
            f.store(owner.get(), address)
            f.store(claim, c.claims + slot.get() * 8)
        f.break_if(loop, owner.get() >= 0)
        slot.set(slot.get() + 1)
    f.store(slot.get(), slots + SLOTS.offset("first_free"))
    f.ret(owner.get())
    return f


def _emit_copy(reads_objects: bool) -> Callable[[Module], Function]:
    """The emitter of a function of (slots, actions, claim, owners, count, rows, arrays): GATHER, SCATTER or CLEAR."""

    def emit(module: Module) -> Function:
        names = ["slots", "actions", "claim", "owners", "count", "rows", "arrays"]
        f = Function(module, "copy_rows", names)
        slots, actions, claim, owners, count, rows, arrays = f.arguments
        c, gathers, clears = SLOTS.read(f, slots), (actions & GATHER).is_set, (actions & CLEAR).is_set

        def array_of(number: Value) -> Value:
            """The address of the array of a part."""
            item = f.load(arrays + number * 8 + (c.items_offset if reads_objects else 0))
            return f.load(item + c.data_offset) if reads_objects else item

        with f.loop(0, count) as index:
            slot = _slot(f, slots, owners, index)
            row = c.rows + slot * c.row_bytes
            with f.if_(_is_concerned(f, slots, slot, claim)), f.if_else(clears) as (to_zero, copied):
                with to_zero:
                    f.fill_zero(row, c.row_bytes)
                with copied, f.loop(0, c.num_parts) as number:
                    part = PART.read(f, c.parts + number * PART.size)
                    array, stored = array_of(number) + index * part.bytes, row + part.offset
                    with f.loop(0, part.layers) as layer:
                        element, in_row = array + layer * rows * part.bytes, stored + layer * part.bytes
                        f.copy(gathers.select(element, in_row), gathers.select(in_row, element), part.bytes)
        with f.if_(gathers & (rows > count)), f.loop(0, c.num_parts) as number:
            part = PART.read(f, c.parts + number * PART.size)
            with f.loop(0, part.layers) as layer:
                unused = array_of(number) + (layer * rows + count) * part.bytes
                f.fill_zero(unused, (rows - count) * part.bytes)
        f.ret()
        return f

    return emit
