"""Machine code as a C function of the interpreter: a call takes a tenth of the time of a call through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection
from typing import Any

from fusedrnn.jit.builder import I64, VOID, Function, Module
from fusedrnn.jit.loader import LoadedObject

_FASTCALL = 0x80  # METH_FASTCALL: arguments as an array and its length
_ENTRY = "c_function"
# The interpreter keeps pointers to method definitions: these and the code must never be freed.
_immortal: list[object] = []


class _Method(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p),
    )  # fmt: skip


def emit_c_function(
    module: Module, function: Function, objects: Collection[int] = (), keeps_lock: bool = False
) -> None:
    """Emit the entry through which the interpreter calls a function that takes integers and returns one.

    Arguments whose numbers are in ``objects`` are passed on as addresses of Python objects, all others as integers. The
    interpreter's lock is released during the call, unless the function needs it.
    """
    f = Function(module, _ENTRY, ["self", "arguments", "count"], exported=True, returns=True)
    _, arguments, _ = f.arguments
    values = []
    for number in range(len(function.arguments)):
        item = f.load(arguments + 8 * number)
        values.append(item if number in objects else f.intrinsic("PyLong_AsLongLong", I64, [item]))
    thread = None if keeps_lock else f.intrinsic("PyEval_SaveThread", I64, [])
    result = f.call(function, *values)
    if thread is not None:
        f.intrinsic("PyEval_RestoreThread", VOID, [thread])
    f.ret(f.intrinsic("PyLong_FromLongLong", I64, [result]))


def c_function(name: str, code: LoadedObject) -> Callable[..., int]:
    """The function that :func:`emit_c_function` emitted, as a Python object. It lives as long as the process."""
    method = _Method(name.encode(), code.address(_ENTRY), _FASTCALL, None)
    _immortal.append((method, code))
    make: Any = ctypes.pythonapi.PyCFunction_NewEx
    make.restype = ctypes.py_object
    make.argtypes = [ctypes.POINTER(_Method), ctypes.c_void_p, ctypes.c_void_p]
    function: Callable[..., int] = make(ctypes.byref(method), None, None)
    return function
