"""An integer that belongs to a loaded module of machine code."""

from __future__ import annotations

from llvmlite import ir

from fusedrnn.jit.builder import I64, Function, Module, Value


class Global:
    """A 64-bit integer inside a module. It is 0 when the module is loaded."""

    def __init__(self, module: Module, name: str) -> None:
        self._variable = ir.GlobalVariable(module, I64, name)
        self._variable.linkage, self._variable.initializer = "internal", I64(0)

    def address(self, f: Function) -> Value:
        """Its address, in a function of the module."""
        return Value(f, f.builder.ptrtoint(self._variable, I64))
