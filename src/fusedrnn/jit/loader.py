"""Load compiled kernels into the process, one copy of each, and make them callable."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm

from fusedrnn.jit import object_cache
from fusedrnn.jit.builder import Module
from fusedrnn.jit.compiler import target_machine
from fusedrnn.jit.target import Target
from fusedrnn.locks import Lock

Job = Callable[..., None]
"""A kernel that takes two integers: the address of its arguments, and the number of the thread that runs it."""

_Load = TypeVar("_Load", bound=Callable[..., Any])

# Held while code is compiled or loaded, and during a fork: llvmlite has a lock of its own, and a child that was forked
# while that lock is held could never open it.
lock = Lock(guards_fork=True)


class LoadedObject:
    """An object file in executable memory. Its functions can be called for as long as this object lives.

    Args:
        name: For messages.
        target: What it was compiled for.
        image: The object file.
        links: Object files of functions that it only declares. A copy of each is loaded next to it.
    """

    def __init__(self, name: str, target: Target, image: bytes, links: Sequence[bytes] = ()) -> None:
        self.name, self.image = name, image
        empty = llvm.parse_assembly(f'target triple = "{llvm.get_process_triple()}"')
        self._engine = llvm.create_mcjit_compiler(empty, target_machine(target))
        for file in (image, *links):
            self._engine.add_object_file(llvm.ObjectFileRef.from_data(file))
        self._engine.finalize_object()

    def address(self, function: str) -> int:
        """The address of a function.

        Raises:
            LookupError: If it has no such function.
        """
        address = self._engine.get_function_address(function)
        if not address:
            raise LookupError(f"{self.name} has no function {function!r}")
        return int(address)


def load(
    name: str, target: Target, build: Callable[..., Module], *arguments: Any, links: Sequence[bytes] = ()
) -> LoadedObject:
    """Load the code that ``build(*arguments)`` emits, linked with the object files ``links``; see :func:`fetch`."""
    with lock:
        return LoadedObject(name, target, fetch(name, target, build, *arguments), links)


def fetch(name: str, target: Target, build: Callable[..., Module], *arguments: Any) -> bytes:
    """The object file of the code that ``build(*arguments)`` emits: from the cache, or compiled.

    Args:
        name: A name that no other code for the target has. It must tell the arguments apart, too.
        target: What to compile for.
        build: A function of the module that emits the code. A change in that module, or in any that it imports, makes
            the object files in the cache obsolete.
        arguments: Arguments of ``build``.
    """
    with lock:
        return object_cache.fetch(name, target, build, *arguments)


def function(code: LoadedObject, name: str, arguments: int, returns: bool = False) -> Callable[..., Any]:
    """A function that takes that many integers and returns one or nothing. A call releases the interpreter's lock."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64 if returns else None, *[ctypes.c_int64] * arguments)
    with lock:
        entry = code.address(name)
    callable_: Any = prototype(entry)
    callable_.code, callable_.address = code, entry  # the code lives as long as the callable
    return cast(Callable[..., Any], callable_)


def address(function: Callable[..., Any]) -> int:
    """The address of a function of machine code."""
    known: int | None = getattr(function, "address", None)
    return known or ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def load_once(maxsize: int = 1) -> Callable[[_Load], _Load]:
    """Cache what a function loads, by its arguments; one thread loads at a time. A cached result takes no lock."""

    def decorate(load: _Load) -> _Load:
        load_locked = lru_cache(maxsize)(load)

        def load_with_lock(*args: Any) -> Any:
            with lock:
                return load_locked(*args)

        loaded: Any = wraps(load)(lru_cache(maxsize)(load_with_lock))
        clear_results = loaded.cache_clear

        def cache_clear() -> None:
            load_locked.cache_clear()
            clear_results()

        loaded.cache_clear = cache_clear
        return cast(_Load, loaded)

    return decorate
