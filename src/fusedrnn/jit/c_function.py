"""Machine code as a builtin function of the interpreter: a tenth of the way there that ctypes takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection
from typing import Any

from fusedrnn.jit.builder import I64, VOID, Function, Module

_FASTCALL = 0x80
# What builtin functions point to and do not hold.
_immortal: list[object] = []


class _Method(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p),
    )  # fmt: skip


def emit_c_function(module: Module, function: Function, objects: Collection[int] = ()) -> None:
    """An entry ``builtin`` to a function of integers that returns one.

    The arguments numbered in ``objects`` are any objects, which the function is given by their addresses. Other threads
    may run meanwhile.
    """
    f = Function(module, "builtin", ["self", "arguments", "count"], exported=True, returns=True)
    _, given, _ = f.arguments
    values = [
        item if number in objects else f.intrinsic("PyLong_AsLongLong", I64, [item])
        for number, item in ((number, f.load(given + 8 * number)) for number in range(len(function.arguments)))
    ]
    thread = f.intrinsic("PyEval_SaveThread", I64, [])
    result = f.result(function, *values)
    f.intrinsic("PyEval_RestoreThread", VOID, [thread])
    f.ret(f.intrinsic("PyLong_FromLongLong", I64, [result]))


def builtin(name: str, address: int, code: object) -> Callable[..., int]:
    """The builtin function at that address, which is in memory that ``code`` holds. It lives as long as the process."""
    method = _Method(name.encode(), address, _FASTCALL, None)
    _immortal.append((method, code))
    make: Any = ctypes.pythonapi.PyCFunction_NewEx
    make.restype = ctypes.py_object
    make.argtypes = [ctypes.POINTER(_Method), ctypes.c_void_p, ctypes.c_void_p]
    made: Callable[..., int] = make(ctypes.byref(method), None, None)
    return made
