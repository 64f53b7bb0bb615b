"""Generated machine code as Python callables; one copy of each piece in the process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.codegen import cache
from fusedrnn.codegen.build import Module
from fusedrnn.codegen.fingerprint import LANES, build_fingerprint
from fusedrnn.codegen.sync import build_gang
from fusedrnn.codegen.target import Target, current
from fusedrnn.engine.forward import build_forward
from fusedrnn.engine.locks import Lock

_lock = Lock()


def function(code: cache.MachineCode, name: str, arguments: int) -> Callable[..., None]:
    """A function of that many integers, returning nothing, called without the interpreter's lock."""
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)
    found = prototype(code.address(name))
    found.code = code  # type: ignore[attr-defined]  # the memory lives as long as the callable
    return found


def load(name: str, target: Target, build: Callable[[], Module]) -> cache.MachineCode:
    """Compile or fetch a piece of code, one thread at a time."""
    with _lock:
        return cache.load(name, target, build)


@lru_cache(maxsize=64)
def _forward_code(mode: str, dtype: str, target: Target) -> cache.MachineCode:
    return load(f"forward_{mode}_{dtype}", target, lambda: build_forward(mode, dtype, target))


def forward_code(mode: str, dtype: str, target: Target) -> cache.MachineCode:
    """The forward job of that cell, number format and target."""
    with _lock:
        return _forward_code(mode, dtype, target)


@lru_cache(maxsize=1)
def _fingerprint() -> Callable[..., None]:
    return function(load("fingerprint", current(), build_fingerprint), "fingerprint", 3)


@lru_cache(maxsize=1)
def gang_code() -> cache.MachineCode:
    """What the gang's threads run."""
    return load("gang", current(), build_gang)


def prepare() -> None:
    """Have the code that every call needs, whatever its cell."""
    with _lock:
        _fingerprint()
        gang_code()


def fingerprint(array: NDArray[Any]) -> bytes:
    """A fingerprint of a contiguous array's content."""
    into = np.empty(LANES, np.int64)
    with _lock:
        call = _fingerprint()
    call(array.ctypes.data, array.nbytes, into.ctypes.data)
    return into.tobytes()
