"""How fast memory and caches are read: the slanted roofs under which every case lies."""

from __future__ import annotations

from fusedrnn.jit.host import cache_sizes
from fusedrnn.runtime.peak import measure_reading

MEMORY = "memory"

_READ = 1 << 27
"""Bytes that each thread reads in a round, whatever lies where: some milliseconds."""

_ROUNDS = 5
_MEMORY_OF_A_THREAD = 16 << 20
"""Bytes, at least: more than a core's share of any processor's last cache."""


def measure_bandwidth(threads: int) -> dict[str, float]:
    """GB/s that ``threads`` threads read together: from ``"L2"``, ``"L3"``, as far as known, and ``"memory"``.

    Every thread adds up an array of its own, again and again; the best of a few rounds counts.
    The arrays fill half of a second-level cache, a quarter of the third level all together, three times of that.
    It takes less than a second.
    """
    found = sizes(threads, cache_sizes())
    return {level: measure_reading(size, threads, _READ, _ROUNDS) for level, size in found.items()}


def sizes(threads: int, caches: dict[str, int]) -> dict[str, int]:
    """Bytes of each thread's array, by what it is to be read from; a level too small to be told apart is left out."""
    near, last = caches.get("L2", 0), caches.get("L3", 0)
    found = {"L2": near // 2} if near else {}
    if last // (4 * threads) >= 2 * near > 0:
        found["L3"] = last // (4 * threads)
    found[MEMORY] = max(3 * last // threads, 2 * near, _MEMORY_OF_A_THREAD)
    return found
