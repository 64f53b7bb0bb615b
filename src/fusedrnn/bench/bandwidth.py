"""How fast memory and caches are read: the slanted roofs under which every case lies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fusedrnn.codegen.target import cache_sizes

Array = NDArray[np.float32]

MEMORY = "memory"

_READ = 1 << 27
"""Bytes that each thread reads in a round, whatever lies where: some milliseconds."""

_ROUNDS = 5
_MEMORY_OF_A_THREAD = 16 << 20
"""Bytes, at least: more than a core's share of any processor's last cache."""


def measure_bandwidth(threads: int) -> dict[str, float]:
    """GB/s that ``threads`` threads read together: from ``"L2"``, ``"L3"``, as far as known, and ``"memory"``.

    Every thread looks for the largest number in an array of its own, again and again; the best of a few rounds counts.
    The arrays fill half of a second-level cache, a quarter of the third level all together, three times of that.
    It takes less than a second.
    """
    return {level: _read(size, threads) for level, size in sizes(threads, cache_sizes()).items()}


def sizes(threads: int, caches: dict[str, int]) -> dict[str, int]:
    """Bytes of each thread's array, by what it is to be read from; a level too small to be told apart is left out."""
    near, last = caches.get("L2", 0), caches.get("L3", 0)
    found = {"L2": near // 2} if near else {}
    if last // (4 * threads) >= 2 * near > 0:
        found["L3"] = last // (4 * threads)
    found[MEMORY] = max(3 * last // threads, 2 * near, _MEMORY_OF_A_THREAD)
    return found


def _read(size: int, threads: int) -> float:
    views = [_again_and_again(np.ones(size // 4, np.float32)) for _ in range(threads)]
    return threads * views[0].nbytes / min(_seconds(views) for _ in range(_ROUNDS)) / 1e9


def _again_and_again(array: Array) -> Array:
    """The array as rows that all lie in one place, so that one call of NumPy reads it many times."""
    return as_strided(array, (max(1, _READ // array.nbytes), array.size), (0, array.itemsize), writeable=False)


def _seconds(views: list[Array]) -> float:
    start = threading.Barrier(len(views) + 1)

    def work(view: Array) -> Callable[[], None]:
        def read() -> None:
            start.wait()
            np.maximum.reduce(view, axis=1)

        return read

    workers = [threading.Thread(target=work(view)) for view in views]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began
