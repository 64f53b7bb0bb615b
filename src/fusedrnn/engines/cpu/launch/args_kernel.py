"""KernelArgs from a template: what is the same at every call, and what only the call knows."""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.jit.builder import Function, Module
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import function, load, load_once
from fusedrnn.jit.struct import Struct

FIELD = Struct("value", "offset")
CONSTANT = -1
"""The ``value`` of a field that is the same at every call: its ``offset``."""


@load_once()
def load_fill() -> Callable[..., None]:
    """The function that fills in fields of records."""
    return function(load("filling", current_target(), build_filling), "fill", 4)


def build_filling() -> Module:
    """The module of ``fill(fields, count, values, into)``.

    A field is the value of that number, and so many bytes behind it; what is 0, and so not there, is 0 however far.
    """
    module = Module("filling")
    emit_fill(module, exported=True)
    return module


def emit_fill(module: Module, *, exported: bool = False) -> Function:
    """The function itself."""
    f = Function(module, "fill", ["fields", "count", "values", "into"], exported=exported)
    fields, count, values, into = f.arguments
    with f.loop(0, count) as number:
        field = FIELD.read(f, fields + number * FIELD.size)
        filled = f.var(field.offset)
        with f.if_(field.value.compare("!=", CONSTANT)):
            value = f.load(values + field.value * 8)
            filled.set(value.is_zero.select(0, value + field.offset))
        f.store(filled.get(), into + number * 8)
    f.ret()
    return f
