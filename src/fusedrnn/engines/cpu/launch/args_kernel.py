"""The kernel that binds kernel arguments: it writes the structs of a plan, with the values of a call relocated."""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.jit.builder import Function, Module
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import function, load, load_once
from fusedrnn.jit.struct import Struct

RELOC = Struct("symbol", "addend")
"""How a field is made: the value of a symbol, by its number, plus an addend."""
CONSTANT = -1
"""The ``symbol`` of a field that is the same at every call: its ``addend``."""


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
