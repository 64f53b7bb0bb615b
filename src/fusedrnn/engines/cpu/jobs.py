"""Generated machine code as Python callables; one copy of each piece in the process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fusedrnn.cell.cells import Variant
from fusedrnn.engines.cpu.kernels.backward import build_backward
from fusedrnn.engines.cpu.kernels.common import build_common, build_common_training
from fusedrnn.engines.cpu.kernels.forward import build_forward, build_training
from fusedrnn.engines.cpu.launch.args_kernel import build_filling
from fusedrnn.engines.cpu.launch.guard_kernel import build_serving
from fusedrnn.engines.cpu.weights.pack_kernel import build_packing
from fusedrnn.jit import object_cache as cache
from fusedrnn.jit.builder import Module
from fusedrnn.jit.c_function import builtin
from fusedrnn.jit.sync import build_gang
from fusedrnn.jit.target import Target, current
from fusedrnn.locks import Lock
from fusedrnn.runtime.fingerprint import LANES, build_fingerprint
from fusedrnn.runtime.openmp_kernel import build_member

Job = Callable[..., None]

_SHARED = {"common": build_common, "common_training": build_common_training}
# What there is for a cell: what builds it, the function that is the job, which of the above it calls.
_JOBS = {
    "forward": (build_forward, "forward", ("common",)),
    "training": (build_training, "forward", ("common", "common_training")),
    "backward": (build_backward, "backward", ("common", "common_training")),
}

# Whoever compiles or loads code holds it: llvmlite has a lock of its own, which no forked child could open.
_lock = Lock(guards_fork=True)


def function(code: cache.MachineCode, name: str, arguments: int) -> Callable[..., None]:
    """A function of that many integers, called without the interpreter's lock."""
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)
    with _lock:
        found = prototype(code.address(name))
    found.code = code  # type: ignore[attr-defined]  # the memory lives as long as the callable
    return found


def load(
    name: str, target: Target, build: Callable[[], Module], needs: Sequence[bytes] = ()
) -> cache.MachineCode:
    """Compile or fetch a piece of code, one thread at a time."""
    with _lock:
        return cache.load(name, target, build, needs)


@lru_cache(maxsize=64)
def _shared(name: str, dtype: str, target: Target) -> bytes:
    build = _SHARED[name]
    return cache.fetch(f"{name}_{dtype}", target, lambda: build(dtype, target))


@lru_cache(maxsize=128)
def _job(name: str, variant: Variant, dtype: str, target: Target) -> Job:
    build, entry, shared = _JOBS[name]
    needs = [_shared(one, dtype, target) for one in shared]
    code = load(f"{name}_{variant.slug}_{dtype}", target, lambda: build(variant, dtype, target), needs)
    return function(code, entry, 2)


def forward(variant: Variant, dtype: str, target: Target, training: bool = False) -> Job:
    """The forward job of that cell, number format and target."""
    with _lock:
        return _job("training" if training else "forward", variant, dtype, target)


def backward(variant: Variant, dtype: str, target: Target) -> Job:
    """The backward job of that cell, number format and target."""
    with _lock:
        return _job("backward", variant, dtype, target)


@lru_cache(maxsize=32)
def _packing(dtype: str, target: Target) -> Job:
    return function(load(f"packing_{dtype}", target, lambda: build_packing(dtype, target)), "pack", 2)


def packing(dtype: str, target: Target) -> Job:
    """The job that packs weights of that number format."""
    with _lock:
        return _packing(dtype, target)


def address(call: Callable[..., None]) -> int:
    """Where a function of machine code begins."""
    return ctypes.cast(call, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def _common() -> tuple[Callable[..., None], ...]:
    """What every call needs, whatever its cell: ``fill`` and ``fingerprint``."""
    filling = load("filling", current(), build_filling)
    looking = load("fingerprint", current(), build_fingerprint)
    return function(filling, "fill", 4), function(looking, "fingerprint", 3)


@lru_cache(maxsize=1)
def _serving() -> Callable[..., int]:
    code = load("serving", current(), build_serving)
    return builtin("serve", code.address("builtin"), code)


def serving() -> Callable[..., int]:
    """What runs a whole call on arrays like those before; see :mod:`fusedrnn.engines.cpu.launch.guard_kernel`."""
    with _lock:
        return _serving()


@lru_cache(maxsize=1)
def _gang() -> tuple[Callable[..., None], ...]:
    code = load("gang", current(), build_gang)
    return tuple(function(code, name, count) for name, count in (("dispatch", 6), ("stop", 1), ("work", 3)))


def gang() -> tuple[Callable[..., None], ...]:
    """``dispatch``, ``stop`` and ``work``: what a gang runs on."""
    with _lock:
        return _gang()


@lru_cache(maxsize=1)
def _member() -> Callable[..., None]:
    return function(load("member", current(), build_member), "member", 1)


def member() -> Callable[..., None]:
    """What every thread of a foreign team calls; see :mod:`fusedrnn.runtime.openmp_kernel`."""
    with _lock:
        return _member()


def prepare() -> None:
    """Have the code that every call needs, whatever its cell."""
    with _lock:
        _common()
        _gang()


def filling() -> Callable[..., None]:
    """What fills in fields of records; see :mod:`fusedrnn.engines.cpu.launch.args_kernel`."""
    with _lock:
        return _common()[0]


def fingerprint(parts: NDArray[np.int64]) -> bytes:
    """A fingerprint of each part of memory, rows of :data:`fusedrnn.runtime.fingerprint.PART`; some may be copied."""
    into = np.empty((len(parts), LANES), np.int64)
    with _lock:
        call = _common()[1]
    call(parts.ctypes.data, len(parts), into.ctypes.data)
    return into.tobytes()
