"""The measured rates of one thread of this machine, kept in the folder of compiled kernels.

A file belongs to a processor, its caches, its number of cores and a target. Reading it takes a fraction of a
millisecond, once in a process; measuring takes most of a second, see :mod:`fusedrnn.runtime.bandwidth`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, fields
from functools import lru_cache
from math import isfinite

from fusedrnn import env
from fusedrnn.jit.host import cache_sizes, processor_name
from fusedrnn.jit.object_cache import ObjectCache
from fusedrnn.jit.target import Target

_FORMAT = "rates 1"


@dataclass(frozen=True)
class MachineRates:
    """Rates of one thread; 0 where a level cannot be measured.

    Attributes:
        fma: GFLOP/s of multiply-adds of float32.
        l2, l3, memory: GB/s that it reads from there.
    """

    fma: float
    l2: float
    l3: float
    memory: float


_of_this_process: dict[str, MachineRates | None] = {}
"""By file name: what has been read or measured."""


def kept_rates(target: Target) -> MachineRates | None:
    """What this or an earlier process measured with a target's vectors; None if none has, or if it is emulated."""
    if target.emulated:
        return None
    file = _file(target)
    if file not in _of_this_process:
        folder = env.cache_directory()
        content = None if folder is None else ObjectCache(folder).read(file)
        _of_this_process[file] = None if content is None else _parsed(content)
    return _of_this_process[file]


def keep_rates(target: Target, rates: MachineRates) -> None:
    """Keep what was measured: for this process, and for later ones if the folder of kernels can be written."""
    if target.emulated:
        return
    file, folder = _file(target), env.cache_directory()
    _of_this_process[file] = rates
    if folder is not None:
        lines = [f"{field.name} {getattr(rates, field.name)!r}" for field in fields(rates)]
        ObjectCache(folder).write(file, "\n".join(lines).encode())


def _parsed(content: bytes) -> MachineRates | None:
    """The rates in a file; None if it holds anything else."""
    try:
        values = {name: float(value) for name, value in (line.split() for line in content.decode().splitlines())}
        rates = MachineRates(**values)
    except (ValueError, TypeError):
        return None
    return rates if all(isfinite(value) and value >= 0 for value in values.values()) else None


@lru_cache(maxsize=8)
def _file(target: Target) -> str:
    """The file's name for this machine and the target, or the target's base: dot products do not change these rates."""
    name = (target.base or target).name
    machine = f"{_FORMAT} {processor_name()} {sorted(cache_sizes().items())} {os.cpu_count()}"
    return f"rates-{name}-{hashlib.sha256(machine.encode()).hexdigest()[:32]}.rates"
