"""Compile kernels, or fetch them from the object cache, and load them into the process: one copy of each."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

from fusedrnn.jit import object_cache
from fusedrnn.jit.builder import Module
from fusedrnn.jit.object_cache import LoadedObject
from fusedrnn.jit.target import Target
from fusedrnn.locks import Lock

Job = Callable[..., None]
"""A kernel of two integers: the address of its arguments, and the number of the thread that runs it."""

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
# Held by whoever compiles or loads code: llvmlite has a lock of its own, which no forked child could open.
lock = Lock(guards_fork=True)


def load(
    name: str, target: Target, build: Callable[..., Module], *arguments: Any, links: Sequence[bytes] = ()
) -> LoadedObject:
    """Load the code that ``build(*arguments)`` emits, linked with the object files ``links``."""
    with lock:
        return LoadedObject(name, target, fetch(name, target, build, *arguments), links)


def fetch(name: str, target: Target, build: Callable[..., Module], *arguments: Any) -> bytes:
    """The object file of the code that ``build(*arguments)`` emits: from the cache, or compiled."""
    with lock:
        return object_cache.fetch(name, target, lambda: build(*arguments))


def function(code: LoadedObject, name: str, arguments: int) -> Callable[..., None]:
    """A function of that many integers. Calling it releases the interpreter's lock."""
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)
    with lock:
        callable_ = prototype(code.address(name))
    callable_.code = code  # type: ignore[attr-defined]  # the memory lives as long as the callable
    return callable_


def address(function: Callable[..., None]) -> int:
    """The address of a function of machine code."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def load_once(maxsize: int = 1) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Cache what a function loads, by its arguments; one thread loads at a time."""

    def decorate(load: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        cached: Any = lru_cache(maxsize)(load)

        @wraps(load)
        def loaded(*args: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
            with lock:
                result: _Result = cached(*args, **options)
            return result

        loaded.cache_clear, loaded.cache_info = cached.cache_clear, cached.cache_info  # type: ignore[attr-defined]
        return loaded

    return decorate
